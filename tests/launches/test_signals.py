"""Signals: every one, at every process of a run. It saves, ends with the right code, leaves nothing alive, and the same
command goes on bit for bit.

Real runs, one for each row of ONE and TWO, in one folder: each goes on where the one before was stopped. The ranks
wait at a gate for their signal (tests/tools/gated.py). ONE and TWO have each signal and each process once; with EVERY=1
in the environment, each signal is also sent to each process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import launching
import psutil
import pytest
import tiny
import torch
from every import sampled
from safetensors.torch import load_file

STEPS, SAVE = 12, 4
OURS, THEIRS, TORCHRUN = "dpo_ds.deepspeed_command", "deepspeed.launcher.runner", "torch.distributed.run"


@dataclass(frozen=True)
class Stop:
    at: str  # the gate's place
    number: int  # the signal
    target: str  # command, launch, rank 0, rank 1, group, file
    code: int
    launcher: str = OURS
    saves: bool = True
    said: str = "; to go on: "


ONE = [
    Stop("tokenise", signal.SIGTERM, "rank 0", 143, saves=False),
    Stop("table", signal.SIGINT, "rank 0", 130, saves=False),
    Stop("step 2", signal.SIGHUP, "rank 0", 129),
    Stop("step 5", 0, "file", 0),
    Stop("export", signal.SIGTERM, "rank 0", 143, saves=False),
]
DIED = "(SIGKILL, as the kernel sends when memory runs out); the last that it did: step 10; start again"
TWO = [
    Stop("table", signal.SIGUSR1, "rank 1", 0, saves=False),
    Stop("step 2", signal.SIGTERM, "command", 143),
    Stop("step 3", signal.SIGINT, "group", 130),
    Stop("step 4", signal.SIGHUP, "launch", 129),
    Stop("step 5", signal.SIGUSR2, "rank 1", 0),
    Stop("step 6", signal.SIGKILL, "launch", 137),
    Stop("step 7", signal.SIGTERM, "command", 1, TORCHRUN),
    Stop("step 9", signal.SIGTERM, "command", -15, THEIRS),  # it ends at once, and its ranks notice
    Stop("step 10", signal.SIGKILL, "rank 1", 137, saves=False, said=DIED),
]


# Signals that ask a run to stop, with the command's exit code.
ASKING = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 0, signal.SIGUSR2: 0}
# By target, what SIGKILL leaves: the command's exit code, whether the ranks save, what is said.
KILLED = {"command": (-9, True, ""), "launch": (137, True, ""), "group": (-9, False, ""),
          "rank 0": (137, False, "(SIGKILL, as"), "rank 1": (137, False, "(SIGKILL, as")}  # fmt: skip


def every() -> list[Stop]:
    """Each signal to each process, one a step."""
    rows = [(number, target, (code, True, "; to go on: ")) for number, code in ASKING.items() for target in KILLED]
    rows += [(signal.SIGKILL, target, how) for target, how in KILLED.items()]
    return [
        Stop(f"step {step}", number, target, code, saves=saves, said=said)
        for step, (number, target, (code, saves, said)) in enumerate(rows, 2)
    ]


class Started:
    """A run that was started, and its processes."""

    def __init__(self, place: Path, ranks: int, stop: Stop, waiting: list[int], argv: list[str]):
        self.stop, self.ranks, self.gate, self.output = stop, ranks, place / "gate", place / "output.txt"
        for file in place.glob("gate.*"):
            file.unlink()
        words = [str(launching.TOOLS / "gated.py"), *argv]
        each = ["--nproc_per_node" if stop.launcher == TORCHRUN else "--num_gpus", str(ranks)]
        launcher = ["-m", stop.launcher, *each, "--master_port", str(launching.free_port())] if ranks > 1 else []
        command = [sys.executable, *launcher, *words]
        gate = {"at": stop.at, "ranks": waiting, "file": str(self.gate)}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**launching.environment(), "GATE": json.dumps(gate)},
            )  # fmt: skip
        self.waiting = waiting

    @property
    def said(self) -> str:
        return self.output.read_text()

    def until(self, reached) -> None:
        deadline = time.monotonic() + launching.HANGS
        while not reached():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said[-4000:]
            time.sleep(0.02)

    def at_the_gate(self) -> None:
        files = [Path(f"{self.gate}.{rank}") for rank in self.waiting]
        self.until(lambda: all(file.exists() for file in files))
        self.everyone = [self.process.pid, *launching.descendants(self.process.pid)]

    def target(self) -> int:
        if self.stop.target == "command":
            return self.process.pid
        everyone = {pid: " ".join(psutil.Process(pid).cmdline()) for pid in self.everyone}
        if self.stop.target == "launch":
            return next(pid for pid, words in everyone.items() if "dpo_ds.engine.launch" in words)
        rank = self.stop.target.removeprefix("rank ")
        alone = "0" if self.ranks == 1 else None  # launchers have no RANK
        return next(pid for pid in self.everyone if psutil.Process(pid).environ().get("RANK", alone) == rank)

    def send(self) -> None:
        if self.stop.target == "file":
            (self.gate.parent / "run" / "stop").touch()
            Path(f"{self.gate}.go").touch()
        elif self.stop.target == "group":
            os.killpg(self.process.pid, self.stop.number)
        else:
            os.kill(self.target(), self.stop.number)

    def nothing_left(self) -> None:
        """After some seconds: a rank whose launcher was killed still saves."""
        deadline = time.monotonic() + launching.HANGS
        while left := [pid for pid in self.everyone if psutil.pid_exists(pid) and not zombie(pid)]:
            assert time.monotonic() < deadline, f"{left} are alive: {self.said[-3000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            launching.kill_tree(self.process.pid)
        self.process.wait()


def zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("signals")
    tiny.make("llama", place / "llama")
    for ranks, stage in ((1, 0), (2, 2)):
        (place / f"{ranks}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return place


def argv(place: Path, ranks: int, folder: Path, steps: int) -> list[str]:
    return [
        f"--model={place / 'llama'}", "--dataset=sample", f"--ds_config={place / f'{ranks}.json'}",
        f"--output_dir={folder / 'run'}", f"--cache_dir={folder / 'cache'}", f"--max_steps={steps}",
        f"--save_every={SAVE}", "--eval_every=4", "--global_batch_pairs=4", "--eval_pairs=4", "--max_length=96",
        "--learning_rate=1e-3", "--generations=0", "--plan=off",
    ]  # fmt: skip


def run(folder: Path, ranks: int, words: list[str]) -> str:
    gate = json.dumps({"at": "", "ranks": [], "file": ""})
    return launching.forked(ranks, [str(launching.TOOLS / "gated.py"), *words], GATE=gate).stdout


KINDS = {"1-rank": (1, ONE), "2-ranks": (2, TWO), "every": (2, every())}


@pytest.mark.parametrize("kind", sampled(KINDS, ["every"]))
def test_a_signal_stops_and_saves_and_the_same_command_goes_on(kind, place, tmp_path):
    ranks, stops = KINDS[kind]
    straight, stopped, steps = tmp_path / "straight", tmp_path / "stopped", max(STEPS, len(stops) + 4)
    stopped.mkdir()
    run(straight, ranks, argv(place, ranks, straight, steps))
    words = argv(place, ranks, stopped, steps)
    for stop in stops:
        # The ranks that were not sent a signal are held up by the others: in a collective, or by a launcher.
        waiting = [0] if stop.target in ("file", "rank 0") else [1] if stop.target == "rank 1" else [*range(ranks)]
        started = Started(stopped, ranks, stop, waiting, words)
        try:
            check(started, stop, stopped / "run", steps)
        finally:
            started.kill()
    assert f"from {stopped / 'run'}/checkpoints/step-" in run(stopped, ranks, words)
    assert launching.untimed(stopped / "run") == launching.untimed(straight / "run")
    for name, tensor in load_file(straight / "run" / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(stopped / "run" / "merged" / "model.safetensors")[name]), name


def check(started: Started, stop: Stop, folder: Path, steps: int) -> None:
    """Stops a run as the row says, and looks at what it leaves."""
    started.at_the_gate()
    started.send()
    code = started.process.wait(launching.HANGS)
    started.nothing_left()
    said = started.said
    assert code == stop.code, (stop, said[-4000:])
    assert stop.said in said, (stop, said[-4000:])
    assert "Traceback" not in said or stop.launcher == TORCHRUN, (stop, said[-4000:])
    if stop.saves:
        step = int(stop.at.removeprefix("step "))
        assert (folder / "checkpoints" / f"step-{step:06d}" / "checkpoint.json").is_file(), (stop, said[-4000:])
        assert f"after step {step} of {steps}, saved; to go on: " in said, said[-4000:]
    assert not (folder / "stop").exists()
