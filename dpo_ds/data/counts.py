"""The report on a source's rows: how many are used, left out, changed and cut, for which reasons, and in which rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_ds.data.encoded import EQUAL_NOW
from dpo_ds.data.rows.ranking import COUNTED_OTHERWISE
from dpo_ds.errors import UserError

FIRST_ROWS = 5  # how many row numbers a report names for each kind

Kinds = dict[str, tuple[int, list[int]]]  # kind: how many rows, and the numbers of the first ones


@dataclass
class Report:
    """What became of a source's rows."""

    rows: int
    pairs: int = 0
    left_out: Kinds = field(default_factory=dict)
    changed: Kinds = field(default_factory=dict)
    unused: Kinds = field(default_factory=dict)  # columns and message keys that nothing reads
    # Of "prompts" and "answers": the rows in which one was cut, how many were, and by how many tokens in all.
    cut: Kinds = field(default_factory=dict)
    cut_parts: dict[str, int] = field(default_factory=dict)
    cut_tokens: dict[str, int] = field(default_factory=dict)
    dropped_pairs: int = 0  # whose answers no longer differ, of rows that are used

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "Report":
        return cls(**saved)

    def saved(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def used(self) -> int:
        return self.rows - sum(count for count, _ in self.left_out.values())

    @property
    def equal_once_cut(self) -> int:
        """The pairs whose answers truncation made equal; rows of which nothing is left count as one."""
        return self.dropped_pairs + self.left_out.get(EQUAL_NOW, (0, []))[0]

    def add(self, facts: dict[str, Any]) -> None:
        """Counts a row, encoded as data/cache.py's _FEATURES describes."""
        row = facts["row"]
        if facts["left_out"]:
            _count(self.left_out, facts["left_out"], row)
        for kind in facts["changed"]:
            _count(self.changed, kind, row)
        for name in facts["unused"]:
            _count(self.unused, name, row)
        for what, cuts in (("prompts", [facts["cut_prompt"]]), ("answers", facts["cut_answers"])):
            if any(cuts):
                _count(self.cut, what, row)
                self.cut_parts[what] = self.cut_parts.get(what, 0) + sum(tokens > 0 for tokens in cuts)
                self.cut_tokens[what] = self.cut_tokens.get(what, 0) + sum(cuts)
        self.pairs += len(facts["weights"])
        self.dropped_pairs += facts["dropped_pairs"]

    def lines(self) -> list[str]:
        pairs = f": {self.pairs} pairs" if self.pairs != self.used else ""
        lines = [f"{self.used} of {self.rows} rows are used{pairs}"]
        for verb, kinds in (("left out", self.left_out), ("changed", self.changed)):
            lines += [f"{count} {verb}: {kind} ({named(count, rows)})" for kind, (count, rows) in kinds.items()]
        for what, (count, rows) in self.cut.items():
            lines.append(f"{count} rows with {what} cut: {self.cut_by(what)} ({named(count, rows)})")
        if self.dropped_pairs:
            lines.append(
                f"{self.dropped_pairs} pairs dropped: their answers are the same tokens, or nothing to learn, once cut"
            )
        if self.unused:
            names = ", ".join(f"{name} ({count} rows)" for name, (count, _) in self.unused.items())
            lines.append(f"not used: {names}")
        return lines

    def cut_by(self, what: str) -> str:
        parts, tokens = self.cut_parts[what], self.cut_tokens[what]
        return f"{parts} {what if parts > 1 else what[:-1]}, by {tokens / parts:,.0f} tokens on average"

    def check(self, max_left_out: float) -> None:
        """Raises UserError if no row is left, or if more than `max_left_out` of the rows are left out.

        Also if what one row says puts all in doubt.
        """
        left_out = self.rows - self.used
        if COUNTED_OTHERWISE in self.left_out:
            raise UserError(f"{COUNTED_OTHERWISE} ({named(*self.left_out[COUNTED_OTHERWISE])})")
        if left_out and (self.used == 0 or left_out / self.rows > max_left_out):
            kinds = "; ".join(
                f"{count} x {kind} ({named(count, rows)})" for kind, (count, rows) in self.left_out.items()
            )
            raise UserError(
                f"{left_out} of {self.rows} rows cannot be used: {kinds}; correct the data, or raise "
                f"--max_left_out (now {max_left_out}) if the remaining rows are enough"
            )


def named(count: int, rows: Sequence[int]) -> str:
    """`count` rows, of which the first ones are given: "rows 1, 2, …"."""
    return f"row{'s' if count > 1 else ''} {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def _count(kinds: Kinds, kind: str, row: int) -> None:
    count, first = kinds.get(kind, (0, []))
    kinds[kind] = (count + 1, [*first, row] if len(first) < FIRST_ROWS else first)
