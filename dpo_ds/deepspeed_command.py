"""The `deepspeed` command that this package installs: DeepSpeed's own launcher, plus `-m` and signals.

    deepspeed --num_gpus 8 -m dpo_ds.train --model gpt2

DeepSpeed spells it `--module` and refuses `-m`. Installed after DeepSpeed, this script replaces DeepSpeed's script. It
turns `-m` into `--module` and passes everything else on unchanged.

It stays the parent of all that it starts. It passes a signal on, so that ranks can save, and a second one ends them. No
rank is left behind, even if the launch.py between them is killed. The exit code says what happened. DeepSpeed's own
script leaves ranks running, and ends with 0 where launch.py was killed.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType, SimpleNamespace

from deepspeed.launcher import runner

from dpo_ds.engine import launch
from dpo_ds.ranks import family, process, signals

THEIRS, OURS = "deepspeed.launcher.launch", "dpo_ds.engine.launch"


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


def ending(words: list[str]) -> list[str]:
    """The runner's command that ends launch.py on other nodes, made to end ours. The runner writes the name of its own
    launch.py without the last letter."""
    return [word.replace(THEIRS[:-1], OURS[:-1]) for word in words]


class Command:
    """What DeepSpeed's runner starts: launch.py on this node, or a launcher for several such as pdsh or srun."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.asked: int | None = None  # the signal that this process has had

    @contextlib.contextmanager
    def supervised(self) -> Iterator[None]:
        """Within it, the runner starts processes through `start`."""
        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": self.start})
        try:
            yield
        finally:
            runner.subprocess = subprocess
            if self.child is not None and (self.asked is not None or self.child.poll() != 0):
                self.end_the_rest()

    def start(self, words: list[str], env: dict[str, str]) -> subprocess.Popen:
        """Starts what the runner has put together, with our launch.py. Other nodes need not have dpo_ds, unless it is
        what runs there."""
        if self.child is not None:  # the runner's command that ends launch.py on other nodes
            return subprocess.Popen(ending(words), env=env)
        local = words[:4] == [sys.executable, "-u", "-m", THEIRS]
        if local or any(word.startswith("dpo_ds.") for word in words):
            words = [OURS if word == THEIRS else word for word in words]
        for number in signals.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.received)
        family.adopt_orphans()
        env = {**env, launch.PARENT: str(os.getpid())} if local else env
        self.child = subprocess.Popen(words, env=env)
        return self.child

    def received(self, number: int, frame: FrameType | None) -> None:
        """Passes the first signal on; the second one ends everything."""
        assert self.child is not None
        if self.asked is not None:
            self.kill()
            raise SystemExit(signals.code_of(number))
        self.asked = number
        if family.catches(self.child.pid, signals.PASSED_ON[number]):
            family.send(self.child.pid, signals.PASSED_ON[number])
        elif number == signal.SIGINT:  # the terminal has sent it to the child as well
            raise KeyboardInterrupt
        else:
            family.send(self.child.pid, number)

    def end_the_rest(self) -> None:
        """Ends what is still there, after a signal or a launch.py that was killed. Ranks may save first."""
        told: set[int] = set()
        while pids := family.descendants():
            takers = [pid for pid in pids if self._takes_requests(pid)]
            for pid in takers:
                if pid not in told:
                    family.send(pid, signals.PASSED_ON[self.asked or signal.SIGTERM])
                    told.add(pid)
            if not takers:
                self.kill()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.1)

    def kill(self) -> None:
        for pid in family.descendants():
            family.send(pid, signal.SIGKILL)

    @staticmethod
    def _takes_requests(pid: int) -> bool:
        found = family.process(pid)
        ready = found is not None and found.alive and not found.stopped
        return ready and family.catches(pid, signals.PASSED_ON[signal.SIGTERM])


def main() -> None:
    """The console script `deepspeed`."""
    command = Command()
    try:
        with command.supervised():
            runner.main(spell_out_module(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        process.end_without_search()
    code = 0 if command.child is None else command.child.returncode
    if code < 0:  # the runner would end with 0
        raise SystemExit(128 - code)


if __name__ == "__main__":
    main()
