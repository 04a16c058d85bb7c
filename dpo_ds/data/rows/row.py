"""A row as it is read: how, its columns under the names that forms use, and what its two halves give."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dpo_ds.data.comparison import Markers, Message, Preference
from dpo_ds.data.rows.messages import Notes
from dpo_ds.data.rows.ranking import Choice


@dataclass(frozen=True)
class Reading:
    """How rows are read: the options, and what is known of the model's chat template."""

    columns: dict[str, str] = field(default_factory=dict)  # our name: the data's column, from --columns
    pairs: Choice = "best_worst"  # which pairs are made of several answers
    min_margin: float = 0.0  # for above_margin
    markers: Markers | None = None  # None: the model has no chat template
    ends: tuple[str, ...] = ()  # the tokens that end an answer, as text


class Row:
    """A row's columns under the names that forms use, and what was used of them."""

    def __init__(self, fields: dict[str, Any], columns: dict[str, str]):
        self.fields, self.columns = fields, columns
        mapped = {*columns.values()}
        given = [name for name in reversed(fields) if name not in mapped]
        # A column that holds something, then one that is called exactly so, comes before one in another case.
        given.sort(key=lambda name: (fields[name] is not None, plain(name) == name))
        self.names = {plain(name): name for name in given} | columns
        self.used: set[str] = set()
        self.notes = Notes()

    def has(self, name: str) -> bool:
        """Whether the column stands in the row, perhaps with null in it."""
        return self.names.get(name) in self.fields

    def get(self, name: str) -> Any:
        """A column's value; None if it is null or not there."""
        return self.fields.get(self.names.get(name, ""))

    def take(self, name: str) -> Any:
        """The same, and the column counts as used."""
        self.used.add(self.names.get(name, ""))
        return self.get(name)

    def called(self, name: str) -> str:
        """The column's name in the data."""
        return self.names.get(name, name)

    def first(self, names: Sequence[str]) -> str | None:
        """The first of the names that holds something. Those that --columns gives come before the others."""
        mapped = [name for name in names if name in self.columns]
        return next((name for name in [*mapped, *names] if self.get(name) is not None), None)


@lru_cache(maxsize=10_000)
def plain(name: str) -> str:
    """A column's name as forms have it: `Chosen Response` and `chosen-response` are chosen_response."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


@dataclass
class Prompt:
    """What a row gives as its prompt: a text or messages."""

    where: str  # the column
    text: str | None = None
    messages: list[Message] | None = None
    # Answers go on from its end as it is. Otherwise a text is what a user says, and an answer at the end of a dialogue
    # is mostly one of its own.
    continues: bool = False
    tools: Any = None


@dataclass
class Answers:
    """What a row gives as its answers, and which is better: as pairs, or by a value of each (higher is better)."""

    sides: list[tuple[str, Any]]  # the column and what stands there
    pairs: list[Preference] | None = None
    values: list[float] | None = None
