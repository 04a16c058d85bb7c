"""The main job, with a gate: GATE='{"at": PLACE, "ranks": [...], "file": PATH}' gated.py OPTIONS (under any launcher).

At PLACE, the ranks that are named write PATH.RANK, and wait until they are asked to stop, are killed, or PATH.go is
there. So a test can send a signal at a known place, however fast the machine is. PLACE is
    "step N"      in step N, before its first micro-batch
    "tokenise"    in the child process that tokenises
    "table"       once a part of the reference table has been scored
    "export"      once the merged weights are written, under their temporary name
    ""            nowhere
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import dpo_ds.export
import dpo_ds.runs.data
from dpo_ds.config import parse_options
from dpo_ds.engine import join
from dpo_ds.ranks import console, signals, world
from dpo_ds.reports.watcher import Watcher
from dpo_ds.runs.prepare import prepare
from dpo_ds.scoring import sweep
from dpo_ds.train import train

GATE = json.loads(os.environ["GATE"])


def wait(at: str) -> None:
    rank = world.from_environment().rank
    if at != GATE["at"] or rank not in GATE["ranks"]:
        return
    Path(f"{GATE['file']}.{rank}").touch()
    while signals.asked() is None and not Path(f"{GATE['file']}.go").exists():
        time.sleep(0.02)


class Gate(Watcher):
    def step_begins(self, step: int) -> None:
        wait(f"step {step}")


def and_wait(place: object, name: str, at: str, after: int = 1) -> None:
    """Makes a function wait once it has been called so many times."""
    plain: Callable = getattr(place, name)
    calls = []

    def waits(*args, **more):
        result = plain(*args, **more)
        calls.append(name)
        if len(calls) >= after:
            wait(at)
        return result

    setattr(place, name, waits)


def main(argv: list[str]) -> None:
    options = parse_options(argv)
    sweep.CHUNK = 4
    and_wait(dpo_ds.runs.data, "_tokenise", "tokenise")
    and_wait(sweep, "score_answers", "table", after=3)
    and_wait(dpo_ds.export, "write_weights", "export")
    train(prepare(options, join.join()), [Gate()])


if __name__ == "__main__":
    console.run_main(main)
