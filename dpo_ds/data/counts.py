"""What became of a set's rows: used, left out, changed, each kind counted and the first rows named."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dpo_ds.errors import UserError

FIRST_ROWS = 5  # how many row numbers a report names for each kind


@dataclass
class Report:
    """How many rows came, were left out, and were changed, each kind with the first row numbers of the source."""

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
        """Raises UserError if nothing is left, or more is left out than may be."""
        left_out = self.total - self.kept
        if left_out and (self.kept == 0 or left_out / self.total > self.max_left_out):
            kinds = "; ".join(
                f"{count} x {kind} ({_named(count, rows)})" for kind, (count, rows) in self.left_out.items()
            )
            raise UserError(
                f"{left_out} of {self.total} rows cannot be used: {kinds}; mend the data, or raise --max_left_out "
                f"(now {self.max_left_out}) if the rest will do"
            )


def _named(count: int, rows: Sequence[int]) -> str:
    return f"row{'s' if count > 1 else ''} {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def counted(found: Iterable[tuple[str, int]]) -> dict[str, tuple[int, list[int]]]:
    """{kind: (how many, the first row numbers)} of kinds and the rows they were found in; "" is no kind."""
    counts: dict[str, tuple[int, list[int]]] = {}
    for kind, row in found:
        if kind:
            count, first = counts.get(kind, (0, []))
            counts[kind] = (count + 1, [*first, int(row)] if len(first) < FIRST_ROWS else first)
    return counts
