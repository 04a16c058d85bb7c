"""A training run's progress: a line in metrics.jsonl for each step and evaluation, and a progress bar."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from dpo_ds.files import write_whole
from dpo_ds.ranks import console, world
from dpo_ds.reports.watcher import Watcher

LOG_SECONDS = 20  # between two lines of progress, if there is no terminal for a bar


class Progress(Watcher):
    """Rank 0's metrics file and progress bar; other ranks have none."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.steps = 0  # known once training starts, as is the bar
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(disable=True)
        self.last_line = time.monotonic()

    def starting(self, steps_done: int, steps: int) -> None:
        _forget_after(self.path, steps_done)
        self.steps = steps
        self.bar = tqdm(total=steps, initial=steps_done, unit="step", desc="dpo", disable=not self.on_terminal)
        self.last_line = time.monotonic()

    def step_ended(self, metrics: dict) -> None:
        self._write(metrics)
        loss, accuracy = f"{metrics['loss']:.4f}", f"{metrics['rewards/accuracies']:.3f}"
        self.bar.set_postfix({"loss": loss, "acc": accuracy}, refresh=False)
        self.bar.update()
        if not self.on_terminal and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            console.say(
                f"step {metrics['step']} of {self.steps}: loss {loss}, accuracy {accuracy}, "
                f"{metrics['pairs/s']} pairs/s"
            )

    def evaluated(self, metrics: dict) -> None:
        self._write(metrics)
        line = (
            f"held out, step {metrics['step']}: loss {metrics['eval/loss']:.4f}, "
            f"accuracy {metrics['eval/rewards/accuracies']:.3f}, margin {metrics['eval/rewards/margins']:+.3f}"
        )
        if self.on_terminal:
            self.bar.write(f"dpo_ds: {line}")  # above the bar
        else:
            console.say(line)

    def ended(self) -> None:
        self.bar.close()

    def _write(self, metrics: dict) -> None:
        """Appends a line. NaN and infinity become null, because JSON has neither."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")


def watchers_of(folder: Path) -> list[Watcher]:
    """The watchers of every run: progress, on rank 0 alone."""
    return [Progress(folder)] if world.from_environment().speaks else []


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps after the last checkpoint of a killed run: these steps run again."""
    if not path.is_file():
        return
    whole = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["step"] <= step]
    # A run that starts from step 0 repeats the evaluation before the first step.
    kept = [line for line in whole if step > 0 or json.loads(line)["step"] > 0]
    write_whole(path, "".join(line + "\n" for line in kept))
