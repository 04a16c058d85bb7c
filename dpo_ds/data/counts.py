"""The report on a source's rows: how many are used, left out, changed and cut, for which reasons, and in which rows."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_ds.data.encoded import EQUAL_NOW
from dpo_ds.data.rows.ranking import ALL_TIED, BELOW_MARGIN, COUNTED_OTHERWISE
from dpo_ds.errors import UserError, one_line

FIRST_ROWS = 5  # how many row numbers a report names for each kind
EXAMPLES = 3  # how many values, of those that rows were left out for, it shows
MOST_KINDS = 20  # that are listed of each sort
# What was found in a row, as data/rows/messages.py's `shown` writes it: it differs from row to row.
FOUND = re.compile(r'"[^"]*"|(?<= is )-?(?:\d[\w.+-]*|inf|nan)(?=[,;])')
NO_PREFERENCE = (ALL_TIED, BELOW_MARGIN)  # how kinds end of rows that are in order, but compare nothing

Kinds = dict[str, tuple[int, list[int]]]  # kind: how many rows, and the numbers of the first ones


@dataclass
class Report:
    """What became of a source's rows."""

    rows: int
    pairs: int = 0
    left_out: Kinds = field(default_factory=dict)
    changed: Kinds = field(default_factory=dict)  # how rows were read, and what is to be known of them
    unused: Kinds = field(default_factory=dict)  # columns and message keys that nothing reads
    # Of "prompts" and "answers": the rows in which one was cut, how many were, and by how many tokens in all.
    cut: Kinds = field(default_factory=dict)
    cut_parts: dict[str, int] = field(default_factory=dict)
    cut_tokens: dict[str, int] = field(default_factory=dict)
    dropped_pairs: int = 0  # whose answers no longer differ, of rows that are used
    spare_answers: int = 0  # of several, that --pairs has in no pair
    found: dict[str, list[str]] = field(default_factory=dict)  # of kinds that leave open what was found: the first ones

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
            self._count_kind(self.left_out, facts["left_out"], row)
        for kind in facts["changed"]:
            self._count_kind(self.changed, kind, row)
        for name in facts["unused"]:
            _count(self.unused, name, row)
        for what, cuts in (("prompts", [facts["cut_prompt"]]), ("answers", facts["cut_answers"])):
            if any(cuts):
                _count(self.cut, what, row)
                self.cut_parts[what] = self.cut_parts.get(what, 0) + sum(tokens > 0 for tokens in cuts)
                self.cut_tokens[what] = self.cut_tokens.get(what, 0) + sum(cuts)
        self.pairs += len(facts["weights"])
        self.dropped_pairs += facts["dropped_pairs"]
        self.spare_answers += facts["spare_answers"]

    def _count_kind(self, kinds: Kinds, said: str, row: int) -> None:
        """Counts a row under its kind, which leaves open what was found in that row: else each row may be a kind."""
        kind = FOUND.sub("…", said)
        found = FOUND.search(said)
        examples = self.found.setdefault(kind, []) if found else []
        if found and found[0] not in examples and len(examples) <= EXAMPLES:
            examples.append(found[0])
        _count(kinds, kind, row)

    def lines(self) -> list[str]:
        pairs = f": {counted(self.pairs, 'pair')}" if self.pairs != self.used else ""
        numbers = " (row numbers count from 0)" if self.left_out or self.changed or self.cut else ""
        be = "is" if self.used == 1 else "are"
        lines = [f"{self.used} of {self.rows} row{'' if self.rows == 1 else 's'} {be} used{pairs}{numbers}"]
        for verb, kinds in (("left out", self.left_out), ("noted", self.changed)):
            lines += [f"{count} {verb}: {kind}{which}" for kind, count, which in self.listed(kinds)]
        for what, (count, rows) in self.cut.items():
            lines.append(f"{counted(count, 'row')} with {what} cut: {self.cut_by(what)} ({named(count, rows)})")
        lines += [f"{counted(count, noun)} {what}" for noun, what, count in self.of_several()]
        if self.unused:
            names = [f"{name} ({counted(count, 'row')})" for name, (count, _) in self.unused.items()]
            more = f", and {len(names) - MOST_KINDS} more" if len(names) > MOST_KINDS else ""
            lines.append(f"not used: {', '.join(names[:MOST_KINDS])}{more}")
        return lines

    def listed(self, kinds: Kinds) -> list[tuple[str, int, str]]:
        """Each kind with how many rows it has, and which: " (rows 1, 2, …)". Of very many kinds the most frequent."""
        most = sorted(kinds, key=lambda kind: -kinds[kind][0])[:MOST_KINDS]
        lines = [(self.said(kind), kinds[kind][0], f" ({named(*kinds[kind])})") for kind in kinds if kind in most]
        if rest := [kind for kind in kinds if kind not in most]:
            lines.append((f"for {counted(len(rest), 'further reason')}", sum(kinds[kind][0] for kind in rest), ""))
        return lines

    def said(self, kind: str) -> str:
        """A kind with what was found, or with the first examples of it."""
        found = self.found.get(kind, [])
        if len(found) == 1:
            return kind.replace("…", found[0], 1)
        return (
            f"{kind} (such as {', '.join(found[:EXAMPLES])}{', …' if len(found) > EXAMPLES else ''})" if found else kind
        )

    def of_several(self) -> list[tuple[str, str, int]]:
        """What became of single pairs and answers of rows that are used, and how many they are."""
        same = "dropped: once cut, the two answers are the same tokens, or one has nothing to learn"
        found = [
            ("pair", same, self.dropped_pairs),
            ("answer", "in no pair: --pairs all uses more", self.spare_answers),
        ]
        return [(noun, what, count) for noun, what, count in found if count]

    def cut_by(self, what: str) -> str:
        parts, tokens = self.cut_parts[what], self.cut_tokens[what]
        return f"{parts:,} {what if parts > 1 else what[:-1]}, by {tokens / parts:,.0f} tokens on average"

    def check(self, max_left_out: float) -> None:
        """Raises UserError if no row is left, or if more than `max_left_out` of the rows cannot be used.

        Also if what one row says puts all in doubt. A row without a preference is in order: it does not count.
        """
        if COUNTED_OTHERWISE in self.left_out:
            raise UserError(f"{COUNTED_OTHERWISE} ({named(*self.left_out[COUNTED_OTHERWISE])}; counted from 0)")
        broken = {kind: found for kind, found in self.left_out.items() if not kind.endswith(NO_PREFERENCE)}
        count = sum(count for count, _ in broken.values())
        if self.used and count / self.rows <= max_left_out:
            return
        kinds = broken if self.used else self.left_out
        remedy = "correct the data"
        if self.used:
            remedy += f", or raise --max_left_out (now {max_left_out}) if the remaining rows are enough"
        count = sum(count for count, _ in kinds.values())
        raise UserError(f"{count} of {self.rows} rows cannot be used: {self._most_frequent(kinds)}; {remedy}")

    def _most_frequent(self, kinds: Kinds) -> str:
        """The reasons that most rows have, in a line that can be read whatever the data hold."""
        ordered = sorted(kinds, key=lambda kind: -kinds[kind][0])
        shown = []
        for kind in ordered[:5]:
            count, rows = kinds[kind]
            shown.append(f"{count} x {one_line(self.said(kind), 250)} ({named(count, rows[:EXAMPLES])})")
        if rest := ordered[5:]:
            shown.append(f"{sum(kinds[kind][0] for kind in rest)} x {counted(len(rest), 'further reason')}")
        return "; ".join(shown) + "; row numbers count from 0"


def counted(count: int, noun: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def named(count: int, rows: Sequence[int]) -> str:
    """`count` rows, of which the first ones are given: "rows 1, 2, …"."""
    return f"row{'s' if count > 1 else ''} {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def _count(kinds: Kinds, kind: str, row: int) -> None:
    count, first = kinds.get(kind, (0, []))
    kinds[kind] = (count + 1, [*first, row] if len(first) < FIRST_ROWS else first)
