"""One row of the data, whatever its form was: a prompt, its answers, and which answer is better than which.

data/rows/forms.py makes it from a row's fields; data/encoder.py makes token ids from it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]  # as chat templates take it: role, content, and perhaps tool_calls, reasoning_content, ...


class LeftOut(Exception):
    """A row cannot be used. The message is the kind in the report."""


@dataclass(frozen=True)
class Answer:
    """What follows the prompt."""

    messages: list[Message]  # usually one of the assistant's; a dialogue that goes on has several
    text: str | None = None  # the same as plain text, which continues the prompt's; None: written from the messages


@dataclass(frozen=True)
class Preference:
    """One answer is better than another. Both are places in Comparison.answers."""

    chosen: int
    rejected: int
    weight: float = 1.0  # multiplies the pair's loss
    margin: float | None = None  # how much better, in the data's own units (a difference of scores); None: not known


@dataclass(frozen=True)
class Comparison:
    messages: list[Message]  # the prompt as a chat
    answers: list[Answer]
    pairs: list[Preference]
    text: str | None = None  # the prompt as plain text; None: written from the messages
    tools: list[Any] | None = None  # for the chat template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # further variables of the chat template
    rendered: bool = False  # the texts hold a chat template's own tokens: they are tokenised as they are
    implicit: bool = False  # the prompt was found as what the answers have in common
    spare_answers: int = 0  # of several, that --pairs has in no pair
    changed: list[str] = field(default_factory=list)  # kinds for the report: what was changed to read the row
    unused: list[str] = field(default_factory=list)  # for the report: columns and message keys that were not used


@dataclass(frozen=True)
class Markers:
    """What shows that a text has been through the model's chat template already."""

    specials: frozenset[str]  # the special tokens that the template writes
    opening: str  # what the template writes before an answer of the assistant's; "" if that cannot be told
    closing: str = ""  # between what a user says and that
    end: str = ""  # after an answer


def without_unused_answers(comparison: Comparison) -> Comparison:
    """Without answers that no pair uses. A comparison without pairs keeps all."""
    used, pairs = renumbered(comparison.pairs)
    if not used or len(used) == len(comparison.answers):
        return comparison
    return replace(comparison, answers=[comparison.answers[n] for n in used], pairs=pairs)


def renumbered(pairs: list[Preference]) -> tuple[list[int], list[Preference]]:
    """The answers that pairs use, in order, and the pairs with numbers among those."""
    used = sorted({n for pair in pairs for n in (pair.chosen, pair.rejected)})
    at = {n: place for place, n in enumerate(used)}
    return used, [replace(pair, chosen=at[pair.chosen], rejected=at[pair.rejected]) for pair in pairs]
