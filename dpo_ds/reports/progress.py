"""A training run's progress: a bar on a terminal, else a line now and then."""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dpo_ds.config import Options
from dpo_ds.ranks import console, world
from dpo_ds.reports.curves import Curves
from dpo_ds.reports.record import Reader, Recorder
from dpo_ds.reports.trackers import readers_of
from dpo_ds.reports.watcher import Watcher

LOG_SECONDS = 20  # between two lines of progress, if there is no terminal for a bar


class Progress(Watcher):
    """Rank 0's progress; other ranks have none. expected: seconds of a step by the plan's estimate, if there is one."""

    def __init__(self, expected: float | None = None):
        self.expected = expected
        self.took: list[float] = []  # seconds of each step
        self.began = 0.0
        self.steps = 0  # known once training starts, as is the bar
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(disable=True)
        self.last_line = time.monotonic()

    def starting(self, steps_done: int, steps: int) -> None:
        self.steps = steps
        self.bar = tqdm(total=steps, initial=steps_done, unit="step", desc="dpo", disable=not self.on_terminal)
        self.last_line = time.monotonic()

    def step_begins(self, step: int) -> None:
        self.began = time.monotonic()

    def step_ended(self, metrics: dict) -> None:
        loss, accuracy = f"{metrics['loss']:.4f}", f"{metrics['rewards/accuracies']:.3f}"
        self.bar.set_postfix({"loss": loss, "acc": accuracy}, refresh=False)
        self.bar.update()
        self.took.append(time.monotonic() - self.began)
        if not self.on_terminal and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            console.say(
                f"step {metrics['step']} of {self.steps}: loss {loss}, accuracy {accuracy}, "
                f"{metrics['pairs/s']} pairs/s{self.compared()}"
            )

    def compared(self) -> str:
        """How long a step takes, beside what was expected. The first step is left out: much is made only there."""
        if self.expected is None or len(self.took) < 2:
            return ""
        return f", {statistics.median(self.took[1:]):.3g} s a step ({self.expected:.3g} s by the plan)"

    def evaluated(self, metrics: dict) -> None:
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


def watchers_of(
    folder: Path,
    options: Options,
    readers: Sequence[Reader] = (),
    checkpoint: Path | None = None,
    expected: float | None = None,
) -> list[Watcher]:
    """The watchers of every run, on rank 0 alone: its record with what reads it (`readers` as well), and progress.

    checkpoint: that from which the run goes on. expected: seconds of a step by the plan's estimate.
    """
    if not world.from_environment().speaks:
        return []
    own = [Curves(folder, options.max_grad_norm), *readers_of(folder, options)]
    return [Recorder(folder, [*own, *readers], checkpoint), Progress(expected)]
