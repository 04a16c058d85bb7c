"""The report on a set's rows: how many are used, left out and changed, for which reasons, and in which rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dpo_ds.errors import UserError

FIRST_ROWS = 5  # how many row numbers a report names for each kind


@dataclass
class Report:
    """How many rows there are, and how many were left out or changed, by kind, with the first row numbers of each."""

    total: int
    max_left_out: float = 0.1
    left_out: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    changed: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.total - sum(count for count, _ in self.left_out.values())

    def lines(self) -> list[str]:
        lines = [f"{self.kept} of {self.total} pairs are used"]
        for verb, kinds in (("left out", self.left_out), ("changed", self.changed)):
            lines += [f"{count} {verb}: {kind} ({_named(count, rows)})" for kind, (count, rows) in kinds.items()]
        return lines

    def check(self) -> None:
        """Raises UserError if no row is left, or if more than `max_left_out` of the rows are left out."""
        left_out = self.total - self.kept
        if left_out and (self.kept == 0 or left_out / self.total > self.max_left_out):
            kinds = "; ".join(
                f"{count} x {kind} ({_named(count, rows)})" for kind, (count, rows) in self.left_out.items()
            )
            raise UserError(
                f"{left_out} of {self.total} rows cannot be used: {kinds}; correct the data, or raise "
                f"--max_left_out (now {self.max_left_out}) if the remaining rows are enough"
            )


def _named(count: int, rows: Sequence[int]) -> str:
    return f"row{'s' if count > 1 else ''} {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def counted(found: Iterable[tuple[str, int]]) -> dict[str, tuple[int, list[int]]]:
    """{kind: (how many, the first row numbers)} from (kind, row) items; items with the kind "" are not counted."""
    counts: dict[str, tuple[int, list[int]]] = {}
    for kind, row in found:
        if kind:
            count, first = counts.get(kind, (0, []))
            counts[kind] = (count + 1, [*first, int(row)] if len(first) < FIRST_ROWS else first)
    return counts
