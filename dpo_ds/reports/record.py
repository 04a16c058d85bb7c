"""The run's record: metrics.jsonl, a line for each step and each evaluation, and what reads it as it grows.

Trackers and curves are fed from these lines alone. So they show what the file holds, and a run that goes on can give
them what they have missed.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_ds.errors import one_line
from dpo_ds.files import write_whole
from dpo_ds.ranks import console
from dpo_ds.reports.watcher import Watcher

NEVER = -1  # a step before all
HELD_OUT = "eval/"  # begins the name of a metric of held-out pairs


def is_evaluation(line: dict) -> bool:
    return any(name.startswith(HELD_OUT) for name in line)


def finite(metrics: dict) -> dict:
    """The metrics with None in place of NaN and infinity, because JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


class Reader:
    """What reads the record as it grows. Base class whose hooks do nothing."""

    name = ""
    failed = "the run goes on without it"  # what an error means for the user

    def begin(self, kept: "Record", steps: int) -> None:
        """Before the first step. `kept` has the lines of the run so far; `steps` is the run's total."""

    def read(self, line: dict) -> None:
        """A new line."""

    def settle(self) -> None:
        """After a step's last line."""

    def end(self, finished: bool) -> None:
        """After the last step, or an error."""


class Record:
    """A file metrics.jsonl."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def append(self, metrics: dict) -> dict:
        """Writes a line and returns it."""
        line = finite(metrics)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        return line

    def lines(self) -> Iterator[dict]:
        """The file's lines, one at a time: those of a long run need not be in memory together."""
        if self.path.is_file():
            with open(self.path, encoding="utf-8") as file:
                yield from (json.loads(text) for text in file if text.endswith("\n"))  # else cut off by a kill

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps after the last checkpoint of a killed run: these steps run again. A run that starts
        from step 0 repeats the evaluation before the first step."""
        if self.path.is_file():
            texts = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            kept = [text for text in texts if 0 < step >= json.loads(text)["step"]]
            write_whole(self.path, "".join(text + "\n" for text in kept))

    def last_steps(self) -> dict[bool, int]:
        """The last step with an evaluation (True) and with training (False); NEVER where there is none."""
        found = {False: NEVER, True: NEVER}
        for line in self.lines():
            found[is_evaluation(line)] = line["step"]
        return found


def last_metrics(folder: Path) -> dict:
    """The metrics of the last step and of the last evaluation in a run's record."""
    found: dict[bool, dict] = {False: {}, True: {}}
    for line in Record(folder).lines():
        found[is_evaluation(line)] = line
    return found[False] | found[True]


class Recorder(Watcher):
    """Rank 0's: writes the record and hands each line to the readers. A reader that fails is dropped, in one line."""

    def __init__(self, folder: Path, readers: Sequence[Reader] = ()):
        self.record, self.readers = Record(folder), [*readers]
        self.steps, self.last = 0, {False: NEVER, True: NEVER}

    def starting(self, steps_done: int, steps: int) -> None:
        self.steps = steps
        self.record.forget_after(steps_done)
        self.last = self.record.last_steps()
        self._each("begin", self.record, steps)

    def step_ended(self, metrics: dict) -> None:
        self._new(metrics)

    def evaluated(self, metrics: dict) -> None:
        # A run that was killed after its last step evaluates the same weights again.
        if metrics["step"] > self.last[True]:
            self._new(metrics)

    def step_settled(self, step: int) -> None:
        self._each("settle")

    def ended(self) -> None:
        self._each("end", self.last[False] == self.steps)

    def _new(self, metrics: dict) -> None:
        line = self.record.append(metrics)
        self.last[is_evaluation(line)] = line["step"]
        self._each("read", line)

    def _each(self, what: str, *facts) -> None:
        for reader in [*self.readers]:
            try:
                getattr(reader, what)(*facts)
            except Exception as error:  # whatever a library raises: a picture or a server must not end a run
                self.readers.remove(reader)
                console.say(f"{reader.name}: {type(error).__name__}: {one_line(error)}; {reader.failed}")
