"""What safety costs: pairs per second on HH with a checkpoint every 100 steps and without, and what a start verifies.

    python benchmarks/safety.py --output benchmarks/results/safety.json

The two kinds of runs take turns, each in its own process. Saving counts checksums and the wait for the disk. The last
checkpoint is verified, and for comparison its files are read and written beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import work

EVERY = 100


def one(kind: str, place: Path, steps: int) -> dict:
    """One run of `steps` steps, with checkpoints ("saving") or without ("plain")."""
    from dpo_ds.engine import join

    here = join.join()
    from dpo_ds.config import parse_options
    from dpo_ds.reports.watcher import Watcher
    from dpo_ds.runs import checkpoint, folders
    from dpo_ds.runs.prepare import prepare
    from dpo_ds.train import train

    class Timer(Watcher):
        """When the second step began, and the last one was settled."""

        first = last = 0.0

        def step_begins(self, step: int) -> None:
            if step == 2:
                self.first = time.perf_counter()

        def step_settled(self, step: int) -> None:
            self.last = time.perf_counter()

    saves = []
    plain_save = checkpoint.save

    def timed_save(*words):
        began = time.perf_counter()
        try:
            return plain_save(*words)
        finally:
            saves.append(time.perf_counter() - began)

    checkpoint.save = timed_save
    folder = place / kind
    options = parse_options(
        f"--model {place / 'model'} --dataset {place / 'hh.jsonl'} --max_length {work.MAX_LENGTH['hh']} --eval_pairs 0 "
        f"--output_dir {folder} --cache_dir {place / 'cache'} --export none --generations 0 --precision fp32 "
        f"--global_batch_pairs {work.BATCH} --learning_rate {work.LEARNING_RATE} --max_steps {steps} --epochs 9 "
        f"--save_every {EVERY}".split()
    )
    timer = Timer()
    train(prepare(options, here), [timer], save=kind == "saving")
    found = {"pairs/s": (steps - 1) * work.BATCH / (timer.last - timer.first), "save_seconds": saves}
    last = folders.checkpoint_folder(folder, steps)
    if last.is_dir():
        files = [file for file in last.rglob("*") if file.is_file()]
        found["bytes"] = sum(file.stat().st_size for file in files)
        contents: list[bytes] = []
        found["read_seconds"] = _timed(lambda: contents.extend(file.read_bytes() for file in files))
        found["write_seconds"] = _timed(lambda: write(contents, folder / "plain"))
        found["verify_seconds"] = _timed(lambda: folders.damage(last, None))
    return found


def write(contents: list[bytes], folder: Path) -> None:
    """Writes files to the disk, one after the other."""
    folder.mkdir()
    for number, content in enumerate(contents):
        with open(folder / str(number), "wb") as file:
            file.write(content)
            os.fsync(file.fileno())


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2 * EVERY)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "PLACE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, place = arguments.one
        print("RESULT " + json.dumps(one(kind, Path(place), arguments.steps)), flush=True)
        return
    runs: dict[str, list[dict]] = {"plain": [], "saving": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            work.make_model(place / "model")
            work.write_pairs("hh", work.BATCH * 100, place)
            for kind, found in runs.items():
                words = [sys.executable, __file__, "--one", kind, place, "--steps", arguments.steps]
                done = subprocess.run([*map(str, words)], capture_output=True, text=True)
                found.append(work.required_result_of(done))
                print(kind, json.dumps(found[-1]), flush=True)
    speeds = {kind: statistics.median(run["pairs/s"] for run in found) for kind, found in runs.items()}
    result = {
        "machine": work.machine(),
        "steps": arguments.steps,
        "every": EVERY,
        "pairs/s": speeds,
        "ratio": speeds["saving"] / speeds["plain"],
        "runs": runs,
    }
    print(f"saving every {EVERY} steps: {result['ratio']:.3f} of the speed without")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
