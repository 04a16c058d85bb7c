"""Prints what a run needs of GPU memory, host memory and disk, before anything is downloaded or loaded.

    python -m dpo_ds.plan --model meta-llama/Meta-Llama-3-70B-Instruct --gpus 8 --gpu_memory 80 --host_memory 1000
    python -m dpo_ds.plan --all

It takes the options of dpo_ds.train. They may describe another machine; the default is this one. Sizes are in GiB, like
those of nvidia-smi and free.
"""

import argparse
import json

from dpo_ds.config import Options, parse_options
from dpo_ds.engine import join
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_models
from dpo_ds.plan import seconds
from dpo_ds.plan.choose import choose
from dpo_ds.plan.footprint import recomputed
from dpo_ds.plan.machine import GIB, NODE_GPUS, Machine, gib
from dpo_ds.plan.plan import Plan
from dpo_ds.plan.refuse import refusal, show
from dpo_ds.plan.speeds import of_memory
from dpo_ds.ranks import console


def everything() -> str:
    """The plans of the twelve models on 8 A100 of 80 or 40 GiB, with 1 or 2 TB of host memory, as a Markdown table."""
    lines = [
        "| model | | " + " | ".join(f"{gpu} GiB, {host} TB" for gpu in (80, 40) for host in (1, 2)) + " |",
        "|---|---|" + "---|" * 4,
    ]
    for name in known_models():
        for lora in (False, True):
            cells = []
            for gpu in (80, 40):
                for host in (1, 2):
                    machine = Machine(NODE_GPUS, NODE_GPUS, gpu * GIB, host * 1000 * GIB, speeds=of_memory(gpu))
                    cells.append(_cell(choose(Options(model=name, lora=lora), machine)))
            lines.append(f"| `{name}` | {'LoRA' if lora else 'full'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(plan: Plan) -> str:
    if not plan.fits:
        return f"no: {', '.join(plan.lacking)}"
    recompute = f", {words}" if (words := recomputed(plan.options, plan.model)) else ""
    need = " + ".join(f"{gib(plan.need(where))}" for where in ("gpu", "host"))
    return f"`{plan.options.ds_config}` {plan.options.micro_batch_tokens:,} tokens{recompute}: {need}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    own, rest = parser.parse_known_args(argv)
    join.quiet_start()
    if own.all:
        print(everything())
        return
    options = parse_options(rest, "plan")
    if not own.json:
        show(options, print)
        return
    plan = choose(options, Machine.of(options))
    print(json.dumps(plan.facts() | seconds.facts(plan), indent=1))
    if not plan.fits:
        raise UserError(refusal(plan, options))


if __name__ == "__main__":
    console.run_main(main)
