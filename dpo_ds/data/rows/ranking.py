"""Which answer of a row is better than which: from scores, from ranks, or from a verdict between two.

A higher score is better; a lower rank is better (1 is the best, as is 0 where ranks begin with it). Nothing is guessed:
what is not a number, or says nothing, raises LeftOut.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

from dpo_ds.data.comparison import LeftOut, Preference
from dpo_ds.data.rows.messages import a_kind, shown

Choice = Literal["best_worst", "all", "adjacent", "above_margin"]  # of --pairs

TIED = "two answers are as good as each other: no pair is made of them"
ALL_TIED = "all answers are as good as each other"
NO_MARGIN_KNOWN = "--pairs above_margin: neither scores nor ranks say how much better an answer is"
BELOW_MARGIN = "--pairs above_margin: no answer is better than another by --min_margin"

MOST = 1e30  # sums and differences of numbers are kept as float32

# A set that has such a row is refused: in its other rows, too, the verdict may count otherwise.
COUNTED_OTHERWISE = (
    "a verdict is 0 where the answers' names are 1 and 2, or 2 where they are 0 and 1, so 1 may mean either; write the "
    "names as verdicts, or remove the row if it is a tie"
)

# What people call an answer in a verdict, before a letter or a number.
NOUNS = ("model", "response", "answer", "completion", "output", "conversation", "assistant", "option", "candidate",
         "choice", "system", "text", "summary", "generation", "reply", "chatbot", "bot", "agent", "player", "solution",
         "translation", "story", "sample", "version", "human_ref")  # fmt: skip

TIES = {"tie", "tie (bothbad)", "tie (both bad)", "both_bad", "bothbad", "both bad", "equal", "same", "draw"}


def number(value: Any, where: str) -> float:
    """A finite number, given as a number or, as CSV has it, as text. Raises LeftOut otherwise."""
    try:
        found = float(value.strip() if isinstance(value, str) else value)
    except OverflowError:
        found = math.inf
    except (TypeError, ValueError):
        what = f"{shown(value)}, which is text" if isinstance(value, str) else a_kind(value)
        raise LeftOut(f"{where} is {what}; it must be a number") from None
    if not math.isfinite(found):
        raise LeftOut(f"{where} is {shown(found)}; it must be a finite number")
    if abs(found) > MOST:
        raise LeftOut(f"{where} is {shown(found)}; it must be within {MOST:g}")
    return found


def numbers(values: Any, where: str, count: int) -> list[float]:
    """One number for each of `count` answers."""
    if not isinstance(values, list):
        raise LeftOut(f"{where} is {a_kind(values)}; it must be a list with a number for each answer")
    if len(values) != count:
        raise LeftOut(f"{where} does not have as many entries as there are answers")
    return [number(value, f"an entry of {where}") for value in values]


def by_value(values: Sequence[float], choice: Choice, min_margin: float) -> tuple[list[Preference], bool]:
    """The pairs among answers of which a higher value is better, and whether a tie has left out a pair.

    best_worst: one pair, of the first of the best and the last of the worst. all: every two answers. adjacent: each
    answer with each of the next lower value. above_margin: every two whose values differ by `min_margin` or more.
    """
    levels = sorted(set(values), reverse=True)
    if len(levels) == 1:
        raise LeftOut(ALL_TIED)
    order = sorted(range(len(values)), key=lambda n: -values[n])  # stable: tied answers in the row's order
    level = {value: n for n, value in enumerate(levels)}
    pairs = [(a, b) for at, a in enumerate(order) for b in order[at + 1 :] if values[a] > values[b]]
    if choice == "best_worst":
        pairs = [(order[0], order[-1])]
    elif choice == "adjacent":
        pairs = [(a, b) for a, b in pairs if level[values[b]] == level[values[a]] + 1]
    elif choice == "above_margin":
        pairs = [(a, b) for a, b in pairs if values[a] - values[b] >= min_margin]
        if not pairs:
            raise LeftOut(BELOW_MARGIN)
    made = [Preference(a, b, margin=values[a] - values[b]) for a, b in pairs]
    return made, choice != "best_worst" and len(levels) < len(values)


def by_verdict(value: Any, where: str, names: Sequence[str], columns: Sequence[str] | None = None) -> Preference:
    """Which of two answers a verdict prefers. `names` are the form's (response_a and response_b), `columns` the data's.

    A verdict is a column's name, what tells it from the other's (a, b, 0, 1, 2), or a noun before that (model_a).
    """
    columns = columns or names
    if isinstance(value, str) and value.strip().lower() in TIES:
        raise LeftOut(f"{where} is {shown(value)}: {ALL_TIED}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = "" if isinstance(value, bool) else str(value).strip().lower().removesuffix(".0")
    for n, ends in enumerate(zip(_ends(names), _ends(columns), strict=True)):
        if said in (names[n].lower(), columns[n].lower(), *ends):
            return Preference(n, 1 - n)
        if any(re.fullmatch(rf"(the )?({'|'.join(NOUNS)})[_\s-]{re.escape(end)}", said) for end in ends):
            return Preference(n, 1 - n)
    counted = {*_ends(names), *_ends(columns)}
    if (said == "0" and {"1", "2"} <= counted) or (said == "2" and {"0", "1"} <= counted):
        raise LeftOut(COUNTED_OTHERWISE)
    what = a_kind(value) if value is None or isinstance(value, bool) or said == "nan" else shown(value)
    one, other = (f"{column} or {end}" for column, end in zip(columns, _ends(columns), strict=True))
    accepted = f"write {one}, {other}, or tie"
    if said in ("0", "1", "2") and not {"0", "1", "2"} & counted:
        raise LeftOut(f"{where} is {what}, which may count the answers from 0 or from 1: {accepted}")
    raise LeftOut(f"{where} is {what}, but the answers are {columns[0]} and {columns[1]}: {accepted}")


def _ends(names: Sequence[str]) -> list[str]:
    """What tells two columns' names apart at their ends: response_a and response_b -> a and b."""
    lower = [name.lower() for name in names]
    shared = len(os.path.commonprefix(lower))  # noqa: RUF071  (compares character by character, as intended)
    return [name[shared:] or name for name in lower]


def by_strength(value: Any, where: str) -> Preference:
    """HelpSteer's verdict: below 0 the first answer is better, above 0 the second, by how much."""
    strength = number(value, where)
    if strength == 0:
        raise LeftOut(f"{where} is 0: {ALL_TIED}")
    return Preference(0, 1, margin=-strength) if strength < 0 else Preference(1, 0, margin=strength)
