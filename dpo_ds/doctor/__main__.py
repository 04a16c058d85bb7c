"""Examines the pairs before training, and a run's figures if it has any.

python -m dpo_ds.doctor --model gpt2 --dataset pairs.jsonl        (takes the options of dpo_ds.train)
python -m dpo_ds.doctor --config runs/gpt2-pairs/options.yaml --output_dir runs/gpt2-pairs

The reference scores a sample of the pairs, which training then finds in its table. With --reference none, the tokens
alone are examined. --output FILE also writes everything as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.config import parse_options
from dpo_ds.ranks import console, world

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    import numpy as np

    from dpo_ds.doctor.check import Check
    from dpo_ds.runs.prepare import Run

SAMPLE = 256  # pairs that the reference scores


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    own, rest = parser.parse_known_args(argv)
    options = parse_options(rest, "doctor")
    from dpo_ds.doctor.pairs import checks_of
    from dpo_ds.engine import join
    from dpo_ds.runs.prepare import prepare

    run = prepare(options, join.join(), claim=False)
    logps = sampled(run)
    if not world.from_environment().speaks:
        return
    checks = sorted([*checks_of(run, logps), *of_run(run)], key=lambda check: check.step or 0)
    console.say(f"{len(run.train_pairs)} pairs for training, {len(run.eval_pairs)} held out")
    for check in checks:
        when = "" if check.step is None else f"step {check.step}: "
        print(f"  {'ok     ' if check.healthy else 'FINDING'}  {when}{check.figure}")
        if not check.healthy:
            print(f"           {check.advice}")
    found = sum(not check.healthy for check in checks)
    console.say(f"findings: {found} of {len(checks)} checks")
    if own.output is not None:
        write(own.output, checks)


def sampled(run: "Run") -> "np.ndarray | None":
    """The reference's logps of a sample of the training answers, and of those that the table has already."""
    from dpo_ds.doctor.pairs import spread
    from dpo_ds.references.table import sample_table

    if run.table is not None:
        return run.table.training
    if run.options.reference == "none":
        return None
    return sample_table(run, spread(len(run.train_pairs), SAMPLE))


def of_run(run: "Run") -> "list[Check]":
    """What the figures of the run show that its folder holds; nothing if it has not begun."""
    from dpo_ds.doctor.curve import CurveReader
    from dpo_ds.reports.record import Record

    record, reader = Record(run.folder), CurveReader(run.options)
    reader.begin(record, run.schedule.steps)
    step = record.last_steps()[False]
    known = {finding.kind: finding for finding in reader.findings}
    return list(({check.kind: check for check in reader.checks(step)} | known).values()) if step > 0 else []


def write(file: Path, checks: "list[Check]") -> None:
    from dpo_ds.errors import files_of
    from dpo_ds.files import write_whole

    with files_of("--output", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps([check.as_json() | {"healthy": check.healthy} for check in checks], indent=1))


if __name__ == "__main__":
    console.run_main(main)
