"""A hang: no step, or no answers scored, for so long that a rank must be stuck. Each rank writes its Python stacks, and
the run ends.

A rank stuck in a collective runs no Python, so the thread of ranks/signals.py keeps the time. A rank whose process is
stopped, or whose node is gone, writes nothing: then its file is missing, which the line says.
"""

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path

from dpo_ds.ranks import signals, world

FOLDER = "stacks"  # in the run's folder: rank-0.txt, ...
OTHERS = 5.0  # seconds that the others have to write theirs


class _Hang:
    """What the thread knows of the parts of a run within `limited`. folder: the run's."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.minutes = folder / FOLDER, minutes
        self.here = world.from_environment()
        self.what = ""  # of what there must be signs
        self.sign = 0  # how many signs of life there were; 0 outside `limited`
        # Only the thread sets these: the last sign that it saw, the seconds since then, and when it looked last.
        self.seen, self.waited, self.looked = 0, 0.0, 0.0
        self.written = False
        self.file = self.folder / f"rank-{self.here.rank}.txt"
        self.file.unlink(missing_ok=True)  # an earlier start's

    def check(self) -> None:
        # If the whole process was stopped meanwhile, as when a job is suspended, that time does not count.
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 10 * signals.TICK), now
        if not self.sign or self.sign != self.seen:
            self.seen, self.waited = self.sign, 0.0
            return
        self.waited += passed
        late = self.waited - 60 * self.minutes
        if late > 0 and not self.written:
            self.written = True
            with contextlib.suppress(OSError):  # a full disk must not keep the run from ending
                self._write()
        if late > OTHERS:
            there = [rank for rank in range(self.here.size) if (self.folder / f"rank-{rank}.txt").exists()]
            if self.here.rank in (0, *there[:1]):
                signals.end_now(1, self._line(there))
            signals.end_in(OTHERS, 1)

    def _write(self) -> None:
        self.folder.mkdir(exist_ok=True)
        with open(self.file, "w", encoding="utf-8") as file:
            file.write(f"rank {self.here.rank} of {self.here.size}, no {self.what} for {self.minutes:g} minutes\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _line(self, there: list[int]) -> str:
        missing = ", ".join(str(rank) for rank in range(self.here.size) if rank not in there)
        stopped = f"; rank {missing} wrote none: its process is stopped or its node is gone" if missing else ""
        files = ", ".join(f"rank-{rank}.txt" for rank in there)
        return (
            f"no {self.what} for {self.minutes:g} minutes: the ranks' Python stacks are in {self.folder} ({files})"
            f"{stopped}; start again to go on from the last checkpoint (--hang_minutes sets the minutes)"
        )


_hang: _Hang | None = None  # of the run that is watched


@contextlib.contextmanager
def watched(folder: Path, minutes: float) -> Iterator[None]:
    """Watches a run within the block. folder: the run's; minutes: --hang_minutes."""
    global _hang
    _hang = _Hang(folder, minutes)
    signals.watch(_hang.check)
    try:
        yield
    finally:
        signals.unwatch(_hang.check)
        _hang = None


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Wraps work of which each `what`, such as a step, may take so many minutes. Each one's end is a sign of life."""
    if _hang is not None:
        _hang.what = what
    alive()
    try:
        yield
    finally:
        if _hang is not None:
            _hang.sign = 0


def alive() -> None:
    """A sign of life. Does nothing where no run is watched."""
    if _hang is not None:
        _hang.sign = _hang.seen + 1
