"""The run's record: metrics.jsonl, a line for each step and each evaluation, and what reads it as it grows.

Trackers and curves are fed from these lines alone. So they show what the file holds, and a run that goes on can give
them what they have missed.
"""

import contextlib
import gzip
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_ds.errors import files_of, one_line, reason_of
from dpo_ds.files import write_whole
from dpo_ds.ranks import console
from dpo_ds.reports.watcher import Watcher

NEVER = -1  # a step before all
COPY = "metrics.jsonl.gz"  # in a checkpoint
MOST_WAITING = 100_000  # lines, some 80 MB
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
    """A file metrics.jsonl, with the lines that a full disk has not taken yet.

    A checkpoint holds a copy of it. So a run that goes on has a whole record, whatever became of the file.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.waiting: list[str] = []  # that could not be written
        self.failed = False  # the last write
        self.end: int | None = None  # where a failed write began: what is in the file after it is half of a line

    def append(self, metrics: dict) -> dict:
        """Writes a line and returns it. A line that cannot be written waits for the next one, or for `flush`."""
        line = finite(metrics)
        self.waiting.append(json.dumps(line, allow_nan=False) + "\n")
        self.flush()
        return line

    def flush(self) -> None:
        """Writes what waits. A disk that is full does not end a run: one line says so, and one when it was written."""
        if not self.waiting:
            return
        try:
            self._write("".join(self.waiting))
        except OSError as error:
            self._wait(error)
            return
        if self.failed:
            console.say(f"{self.path} is written again; {len(self.waiting)} lines had waited")
        self.waiting, self.failed, self.end = [], False, None

    def _wait(self, error: OSError) -> None:
        """Says once that lines wait, and drops the oldest where they are too many."""
        if not self.failed:
            console.complain(
                f"{self.path} cannot be written: {reason_of(error)}; the run goes on, and keeps its lines in memory "
                "until there is room"
            )
        self.failed = True
        if len(self.waiting) > MOST_WAITING:
            console.complain(f"{self.path} still cannot be written: {MOST_WAITING // 2} lines that waited are lost")
            del self.waiting[: MOST_WAITING // 2]

    def _write(self, text: str) -> None:
        """Appends the text, or nothing. Raises OSError."""
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell() if self.end is None else self.end
            left = memoryview(text.encode())
            try:
                file.truncate(end)  # half of a line that an earlier failure left, and could not remove
                while left:
                    left = left[file.write(left) :]
            except OSError:
                self.end = end
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    def lines(self) -> Iterator[dict]:
        """The file's lines, one at a time: those of a long run need not be in memory together. What comes after a
        damaged line is not read."""
        for text in self._texts():
            if (line := _parsed(text)) is None:
                return
            yield line

    def _texts(self) -> Iterator[bytes]:
        """The file's lines, without one that was cut off by a kill."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                yield from (text for text in file if text.endswith(b"\n"))

    def copy_to(self, checkpoint: Path) -> None:
        """Writes the record into a checkpoint. Raises OSError."""
        self.flush()
        with open(checkpoint / COPY, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.writelines(self._texts())

    def go_on_after(self, step: int, checkpoint: Path | None = None) -> None:
        """Drops the lines of steps after the last checkpoint of a killed run: these steps run again. A run that starts
        from step 0 repeats the evaluation before the first step.

        checkpoint: that of `step`, which has a copy. Where the file differs from it, the copy is taken.
        """
        kept, damage = self._until(step)
        copy = [*_copied(checkpoint)] if checkpoint is not None else None
        if copy is not None and kept[: len(copy)] != copy:
            damage = damage or f"it differs from what was written up to step {step}"
            console.say(f"{self.path} is damaged ({damage}): its lines are taken from {checkpoint}")
            kept = copy
        elif damage is not None and step > 0:
            console.say(f"{self.path} is damaged ({damage}): what comes after that is lost, and the run goes on")
        if self.path.is_file() or kept:
            with files_of("--output_dir", self.path.parent):
                write_whole(self.path, b"".join(kept).decode())
        if gap := _gap(kept, step):
            console.say(f"{self.path} {gap}")

    def _until(self, step: int) -> tuple[list[bytes], str | None]:
        """The lines up to a step, and what is wrong with the file."""
        kept: list[bytes] = []
        for number, text in enumerate(self._texts() if step > 0 else ()):
            if (line := _parsed(text)) is None:
                return kept, f"line {number + 1} cannot be read"
            if line["step"] <= step:
                kept.append(text)
        return kept, None

    def last_steps(self) -> dict[bool, int]:
        """The last step with an evaluation (True) and with training (False); NEVER where there is none."""
        found = {False: NEVER, True: NEVER}
        for line in self.lines():
            found[is_evaluation(line)] = line["step"]
        return found


def _parsed(text: bytes) -> dict | None:
    """A line's metrics; None if it is damaged."""
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _copied(checkpoint: Path) -> Iterator[bytes]:
    """The lines of a checkpoint's copy. One of an older version has none."""
    if (checkpoint / COPY).is_file():
        with gzip.open(checkpoint / COPY) as file:
            yield from file


def _gap(texts: list[bytes], step: int) -> str | None:
    """Which training steps up to `step` have no line, in words; None if none is missing."""
    seen = {line["step"] for line in map(json.loads, texts) if not is_evaluation(line)}
    missing = [number for number in range(1, step + 1) if number not in seen]
    if not missing or not seen:  # a run that was started from another run's checkpoint has no line of its steps
        return None
    return f"has no line of {len(missing)} of {step} steps, from step {missing[0]} to {missing[-1]}"


def first_lines(folder: Path, most: int = 10) -> list[dict]:
    """The first lines of a run's record."""
    return [*itertools.islice(Record(folder).lines(), most)]


def last_metrics(folder: Path) -> dict:
    """The metrics of the last step and of the last evaluation in a run's record."""
    found: dict[bool, dict] = {False: {}, True: {}}
    for line in Record(folder).lines():
        found[is_evaluation(line)] = line
    return found[False] | found[True]


class Recorder(Watcher):
    """Rank 0's: writes the record and hands each line to the readers. A reader that fails is dropped, in one line."""

    def __init__(self, folder: Path, readers: Sequence[Reader] = (), checkpoint: Path | None = None):
        """checkpoint: of this run, from which it goes on."""
        self.record, self.readers, self.checkpoint = Record(folder), [*readers], checkpoint
        self.steps, self.last = 0, {False: NEVER, True: NEVER}

    def starting(self, steps_done: int, steps: int) -> None:
        self.steps = steps
        self.record.go_on_after(steps_done, self.checkpoint)
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
        self.record.flush()
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
