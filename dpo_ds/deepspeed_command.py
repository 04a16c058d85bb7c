"""The `deepspeed` command that this package installs: DeepSpeed's own launcher, plus `-m`.

    deepspeed --num_gpus 8 -m dpo_ds.train --model gpt2

DeepSpeed spells it `--module` and refuses `-m`. Installed after DeepSpeed, this script replaces DeepSpeed's script. It
turns `-m` into `--module` and passes everything else on unchanged.
"""

import contextlib
import io
import sys

from deepspeed.launcher import runner


def _launcher_accepts(argv: list[str]) -> bool:
    """Whether DeepSpeed's launcher would run this command line (on `--help` and errors its parser exits)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runner.parse_args(argv)
    except SystemExit:
        return False
    return True


def spell_out_module(argv: list[str]) -> list[str]:
    """The command line with the launcher's `-m` written `--module`; any other command line unchanged.

    A command line is rewritten only if DeepSpeed refuses it as typed and accepts it rewritten. So
    `deepspeed train.py -m x` stays, a mistake gets DeepSpeed's own message, and nothing is rewritten any more once
    DeepSpeed accepts `-m` itself.
    """
    if "-m" not in argv or _launcher_accepts(argv):
        return argv
    at = argv.index("-m")
    rewritten = [*argv[:at], "--module", *argv[at + 1 :]]
    return rewritten if _launcher_accepts(rewritten) else argv


def main() -> None:
    """The console script `deepspeed`."""
    try:
        runner.main(spell_out_module(sys.argv[1:]))
    except KeyboardInterrupt:  # the ranks were interrupted as well, and say what to do
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
