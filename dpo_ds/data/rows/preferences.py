"""The pairs of a row's answers, with their weights and margins."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo_ds.data.comparison import Answer, LeftOut, Message, Preference
from dpo_ds.data.rows.messages import has_more_than_text, shown
from dpo_ds.data.rows.ranking import BELOW_MARGIN, MOST, NO_MARGIN_KNOWN, TIED, by_value, number
from dpo_ds.data.rows.row import Answers, Reading, Row

# Kinds in the report that leave a row out.
EMPTY = "an answer is empty"
EQUAL = "chosen and rejected are equal"
# Kinds that change a row.
EMPTY_OF_SEVERAL = "an empty answer among several is not used"
EQUAL_OF_SEVERAL = "two answers are equal: no pair is made of them"
SCORED_TWICE = "an answer is there several times with different scores: it is taken once, with their mean"
NO_DIFFERENCE = "the scores of chosen and rejected are equal: the pair is trained, with a margin of 0"
BELOW = "the chosen answer's score is below the rejected one's"


def preferences(row: Row, built: list[Answer], answers: Answers, reading: Reading) -> list[Preference]:
    """The pairs of a row's answers, as --pairs asks for them."""
    pairs = _differing(row, built, answers, reading)
    weight = row.take("weight")
    if weight is not None:
        pairs = [replace(pair, weight=_weight(row, weight)) for pair in pairs]
    if len(pairs) == 1 and row.get("margin") is not None:
        pairs = [replace(pairs[0], margin=number(row.take("margin"), row.called("margin")))]
    if any(pair.margin is not None and pair.margin < 0 for pair in pairs):
        row.notes.changed[BELOW] = None
    if any(pair.margin == 0 for pair in pairs):
        row.notes.changed[NO_DIFFERENCE] = None
    return _above(pairs, reading.min_margin) if reading.pairs == "above_margin" else pairs


def _differing(row: Row, built: list[Answer], answers: Answers, reading: Reading) -> list[Preference]:
    """The pairs of answers that say something: neither is empty, they differ, and one is better."""
    filled = [n for n, answer in enumerate(built) if not _is_empty(answer, reading.ends)]
    if len(filled) < 2:
        raise LeftOut(EMPTY)
    if len(filled) < len(built):
        row.notes.changed[EMPTY_OF_SEVERAL] = None
    if answers.values is not None:
        return _by_value(row, built, answers.values, filled, reading)
    pairs = [pair for pair in answers.pairs or [] if {pair.chosen, pair.rejected} <= {*filled}]
    if not pairs:
        raise LeftOut(EMPTY)
    differing = [pair for pair in pairs if not _equal(built[pair.chosen], built[pair.rejected])]
    if not differing:
        raise LeftOut(EQUAL)
    if len(differing) < len(pairs):
        row.notes.changed[EQUAL_OF_SEVERAL] = None
    return differing


def _by_value(
    row: Row, built: list[Answer], values: list[float], filled: list[int], reading: Reading
) -> list[Preference]:
    """The same from a value of each answer. Equal answers are one: else it could be better and worse than another."""
    alike: list[list[int]] = []  # the numbers of equal answers
    for n in filled:
        same = next((group for group in alike if _equal(built[group[0]], built[n])), None)
        if same is None:
            alike.append([n])
        else:
            same.append(n)
    if len(alike) < 2:
        raise LeftOut(EQUAL)
    if any(len({values[n] for n in group}) > 1 for group in alike):
        row.notes.changed[SCORED_TWICE] = None
    elif len(alike) < len(filled):
        row.notes.changed[EQUAL_OF_SEVERAL] = None
    means = [sum(values[n] for n in group) / len(group) for group in alike]
    found, tied = by_value(means, reading.pairs, reading.min_margin)
    if tied:
        row.notes.changed[TIED] = None
    row.notes.spare_answers = len(alike) - len({n for pair in found for n in (pair.chosen, pair.rejected)})
    return [replace(pair, chosen=alike[pair.chosen][0], rejected=alike[pair.rejected][0]) for pair in found]


def _above(pairs: list[Preference], min_margin: float) -> list[Preference]:
    if all(pair.margin is None for pair in pairs):
        raise LeftOut(NO_MARGIN_KNOWN)
    above = [pair for pair in pairs if pair.margin is not None and pair.margin >= min_margin]
    if not above:
        raise LeftOut(BELOW_MARGIN)
    return above


def _weight(row: Row, value: Any) -> float:
    weight = number(value, row.called("weight"))
    if weight < 1 / MOST:
        found = "0" if weight == 0 else "below 0" if weight < 0 else shown(weight)
        raise LeftOut(f"{row.called('weight')} is {found}; it must be above 0")
    return weight


def _is_empty(answer: Answer, ends: Sequence[str]) -> bool:
    return not any(_says(message["content"] or "", ends) or has_more_than_text(message) for message in answer.messages)


def _says(text: str, ends: Sequence[str]) -> bool:
    """Whether a text is more than blanks and ends of turns."""
    for end in ends:
        text = text.replace(end, "")
    return bool(text.strip())


def _equal(one: Answer, other: Answer) -> bool:
    """Whether two answers say the same, but for blanks around messages."""
    return _stripped(one.messages) == _stripped(other.messages) and one.text == other.text


def _stripped(messages: list[Message]) -> list[Message]:
    return [{**message, "content": (message["content"] or "").strip()} for message in messages]
