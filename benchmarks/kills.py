"""Kills runs at random instants and shows that nothing is lost: each ends as an undisturbed run does.

    python benchmarks/kills.py --kills 200 --seed 1 --output benchmarks/results/kills.json

A run is started with the user's own command, and disturbed several times: a signal (SIGKILL, SIGTERM, SIGINT) to one of
its processes or to all, a byte of one of its files flipped, or no room left on its disk. Instants are drawn evenly
over what an undisturbed run takes, from its first import to its last file. A start that ended before its instant does
not count. At last the run goes on undisturbed, without a launcher, until it has ended. Its weights must be those of the
undisturbed run to the bit, and its metrics.jsonl must have the same lines, each once. If its number of ranks changes on
the way, it must have the same curve. No process may outlive its command.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import work

sys.path.insert(0, str(work.ROOT / "tests" / "tools"))

import launching
import numpy as np
import psutil
import tiny
import torch
from safetensors.torch import load_file

STEPS, SAVE = 12, 3
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
SETTLED = 90.0  # seconds after a signal by which all processes must have ended
# name: (the numbers of ranks that a start may have, options)
RUNS = {
    "full, 1 rank, ZeRO-0": ([1], {"zero": {"stage": 0}}),
    "full, 2 ranks, ZeRO-3 with offload": ([2], {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
    "LoRA with dropout, 1 rank": ([1], {"zero": {"stage": 0}, "lora": "true", "lora_dropout": "0.1"}),
    "LoRA, 2 ranks, ZeRO-2": ([2], {"zero": {"stage": 2}, "lora": "true"}),
    "full, 1 or 2 ranks": ([1, 2], {"zero": {"stage": 3}}),
}
ENDED = "had ended"  # of a start that was over before it could be disturbed
EACH = 5  # disturbances of a run, before it may end
# What is disturbed, drawn evenly: mostly signals.
KINDS = ("signal", "signal", "signal", "signal", "flip", "full disk")


@dataclass
class Disturbance:
    """What was done to a start, and what came of it."""

    kind: str  # a signal's name, or "flip" or "full disk"
    target: str
    ranks: int
    after: float  # seconds from the start; the start's share of an undisturbed run's time is drawn
    last_words: str = ""
    code: int = 0  # the command's exit code


class Run:
    """One run in a folder, which is started, disturbed, and at last ended."""

    def __init__(self, place: Path, name: str, folder: str, draw: random.Random):
        self.place, self.draw = place, draw
        self.ranks, options = RUNS[name]
        config = place / f"{list(RUNS).index(name)}.json"
        config.write_text(json.dumps({"zero_optimization": options["zero"]}))
        self.folder, self.output = place / folder / "run", place / folder / "output.txt"
        self.cache = place / folder / "cache"
        self.folder.parent.mkdir(exist_ok=True)
        more = {key: value for key, value in options.items() if key != "zero"}
        self.options = {
            "model": place / "model", "dataset": "sample", "ds_config": config, "output_dir": self.folder,
            "cache_dir": self.cache, "max_steps": STEPS, "save_every": SAVE, "eval_every": SAVE,
            "global_batch_pairs": 6, "eval_pairs": 6, "max_length": 96, "learning_rate": 1e-3, "generations": 0, **more,
        }  # fmt: skip
        self.size = 0  # ranks of the latest start

    @property
    def words(self) -> list[str]:
        return ["-m", "dpo_ds.train", *(f"--{key}={value}" for key, value in self.options.items())]

    def start(self, ranks: int) -> subprocess.Popen:
        self.size = ranks
        with open(self.output, "ab") as output:
            return subprocess.Popen(
                launching.command(ranks, *self.words), env=launching.environment(), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def duration(self, ranks: int) -> float:
        """Runs the command until it has ended. Returns how long that took."""
        began = time.monotonic()
        code = self.start(ranks).wait(timeout=launching.HANGS)
        self._require_finished(code, self.said())
        return time.monotonic() - began

    def to_the_end(self, ranks: int) -> None:
        """Runs the same ranks until they have ended, without a launcher: nothing is sent to them any more."""
        done = launching.forked(ranks, self.words, check=False)
        self._require_finished(done.returncode, done.stdout)

    def _require_finished(self, code: int, said: str) -> None:
        if code != 0 or not (self.folder / "summary.json").is_file():
            raise SystemExit(f"{self.folder} ended with {code}:\n{said[-4000:]}")

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def disturb(self, usual: float) -> Disturbance:
        """Starts the command and disturbs it at a random instant within `usual` seconds, the time of a whole start."""
        ranks, kind = self.draw.choice(self.ranks), self.draw.choice(KINDS)
        after = self.draw.uniform(0.05, 1.0) * usual
        process = self.start(ranks)
        time.sleep(after)
        family = [process.pid, *launching.descendants(process.pid)] if process.poll() is None else []
        if kind == "signal" or not family:
            done = self._signal(process, family, after)
        elif kind == "flip":
            done = self._flip(process, family, after)
        else:
            done = self._fill(process, family, after)
        done.code = self._all_ended(process, family)
        lines = [line for line in self.said().splitlines() if line.strip()]
        done.last_words = lines[-1][:200] if lines else ""
        return done

    def _signal(self, process: subprocess.Popen, family: list[int], after: float) -> Disturbance:
        name = self.draw.choice(list(SIGNALS))
        if not family:
            return Disturbance(name, ENDED, self.size, after)
        place = self.draw.choice(["command", "all", *range(1, len(family))])
        chosen = family if place == "all" else [family[0]] if place == "command" else [family[place]]
        for pid in chosen:
            _send(pid, SIGNALS[name])
        target = place if isinstance(place, str) else f"process {place} of {len(family) - 1}"
        return Disturbance(name, target, self.size, after)

    def _flip(self, process: subprocess.Popen, family: list[int], after: float) -> Disturbance:
        """Kills everything, and flips a byte of one of the files."""
        for pid in family:
            _send(pid, signal.SIGKILL)
        # The oldest checkpoint stays whole: a run without a whole one is refused.
        checkpoints = sorted((self.folder / "checkpoints").glob("step-*"))[1:]
        files = [
            path
            for root in (*checkpoints, self.cache, self.folder / "merged")
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.stat().st_size
        ]
        if not files:
            return Disturbance("SIGKILL", "all, no file yet", self.size, after)
        file = self.draw.choice(files)
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        return Disturbance("flip", str(file.relative_to(self.folder.parent)), self.size, after)

    def _fill(self, process: subprocess.Popen, family: list[int], after: float) -> Disturbance:
        """Limits the size of every file that the processes write from now on, and lets them run on; at last kills all.

        To a program, it is a disk that is full.
        """
        limit = self.draw.choice([0, 1_000, 100_000])
        for pid in family:
            try:
                psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
            except psutil.Error:
                continue
        try:
            process.wait(timeout=SETTLED)
        except subprocess.TimeoutExpired:
            pass
        for pid in family:
            _send(pid, signal.SIGKILL)
        return Disturbance("full disk", f"files of {limit} bytes at most", self.size, after)

    def _all_ended(self, process: subprocess.Popen, family: list[int]) -> int:
        """Waits until no process is left. Returns the command's exit code. Raises SystemExit if a process outlives its
        command."""
        deadline = time.monotonic() + SETTLED
        while left := [pid for pid in family if _runs(pid)]:
            if time.monotonic() > deadline:
                commands = [" ".join(psutil.Process(pid).cmdline())[:150] for pid in left]
                raise SystemExit(f"{self.folder}: still there after {SETTLED:.0f} s: {commands}")
            process.poll()
            time.sleep(0.05)
        return process.wait()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "merged" / "model.safetensors")

    def lines(self) -> list[dict]:
        return launching.untimed(self.folder)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def difference(run: Run, undisturbed: Run) -> str | None:
    """How the run's result differs from the undisturbed one's; None if it does not."""
    if len(run.ranks) == 1:
        if run.lines() != undisturbed.lines():
            return "metrics.jsonl differs"
        theirs = undisturbed.weights()
        different = [name for name, tensor in run.weights().items() if not torch.equal(tensor, theirs[name])]
        return f"{len(different)} tensors differ" if different else None
    own, theirs = run.lines(), undisturbed.lines()
    if [line["step"] for line in own] != [line["step"] for line in theirs]:
        return "metrics.jsonl has other lines"
    losses = [np.array([line.get("loss", line.get("eval/loss")) for line in lines]) for lines in (own, theirs)]
    far = float(np.abs(losses[0] - losses[1]).max())
    return f"the curve differs by {far:.1e}" if far > 1e-5 else None


def harness(place: Path, kills: int, seed: int, names: list[str]) -> Iterator[dict]:
    """Disturbs runs until there are `kills` disturbances. After each run, yields all of them and how the runs ended."""
    draw = random.Random(seed)
    place.mkdir()
    tiny.make("llama", place / "model")
    undisturbed, usual = {}, {}
    for name in names:
        run = undisturbed[name] = Run(place, name, f"undisturbed-{names.index(name)}", draw)
        usual[name] = run.duration(run.ranks[-1])
    runs, count = [], 0
    while count < kills:
        name = names[len(runs) % len(names)]
        run = Run(place, name, f"run-{len(runs)}", draw)
        done = []
        while len(done) < EACH and count < kills and not (run.folder / "summary.json").is_file():
            done.append(run.disturb(usual[name]))
            count += done[-1].target != ENDED  # what came too late disturbed nothing
        run.to_the_end(draw.choice(run.ranks))
        found = difference(run, undisturbed[name])
        runs.append({"run": name, "difference": found, "disturbances": [asdict(d) for d in done]})
        print(f"{count} of {kills}: {name}: {'equal' if found is None else found}", flush=True)
        if found is None:
            shutil.rmtree(run.folder.parent)
        equal = sum(run["difference"] is None for run in runs)
        late = sum(done["target"] == ENDED for run in runs for done in run["disturbances"])
        yield {"kills": count, "late": late, "seed": seed, "runs": len(runs), "equal": equal, "log": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), help="which runs; by default all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--place", type=Path, default=Path("/tmp/dpo_ds-kills"), help="a new folder to work in")
    arguments = parser.parse_args()
    # A shell's background job ignores SIGINT, and so would everything that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for found in harness(arguments.place, arguments.kills, arguments.seed, arguments.runs):
        if arguments.output:
            arguments.output.write_text(json.dumps({"machine": work.machine(), **found}, indent=1) + "\n")
    print(f"{found['kills']} kills, and {found['late']} starts that had ended before")
    print(f"{found['equal']} of {found['runs']} runs equal to undisturbed ones")
    raise SystemExit(found["equal"] != found["runs"])


if __name__ == "__main__":
    main()
