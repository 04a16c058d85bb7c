"""Reads what gives a row's answers and says which of them is better. data/rows/forms.py lists the forms.

Each reader is given the row and the columns that are there, under our names.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dpo_ds.data.comparison import LeftOut, Message, Preference
from dpo_ds.data.rows.messages import a_kind, decoded, is_chat, is_message, parsed, read_messages, unzipped
from dpo_ds.data.rows.ranking import ALL_TIED, by_strength, by_verdict, number, numbers
from dpo_ds.data.rows.row import Answers, Row

ONE_ANSWER = "there is one answer; a comparison needs two"
DISAGREE = "two columns disagree on which answer is better"
LIST_AS_TEXT = "the rejected text is a list in brackets: the chosen answer is paired with each of its texts"
RANKS_OR_ORDER = (
    "{0} has two meanings: the rank of each answer, or the answers' numbers from the best to the worst; for ranks give "
    "--columns ranks={0}; for numbers, write each answer's rank instead"
)
BEST_FIRST = "the list of answers is taken as ordered from the best to the worst"
OTHER_QUESTION = "{1} prefers the other answer than {0}, which is used; for the other: --columns preference={1}"
FROM_ZERO = "the ranks begin with 0: that is taken as the best"

PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_answer", "rejected_answer"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("response_j", "response_k"),
)
TWO = tuple(
    (f"{name}{a}", f"{name}{b}")
    for name in ("response_", "response", "answer_", "completion_", "output_", "human_ref_", "conversation_")
    for a, b in (("a", "b"), ("0", "1"), ("1", "2"))
)
SEVERAL = ("responses", "answers", "completions", "candidates", "generations", "candidates_completions",
           "all_generated_responses")  # fmt: skip
RANKED = ("ranked_responses", "ranked_answers", "ranked_completions")  # their order is the ranking


def chosen_and_rejected(row: Row, names: tuple[str, ...]) -> Answers:
    chosen, rejected = row.take(names[0]), row.take(names[1])
    for name, value in zip(names, (chosen, rejected), strict=True):
        if value is None:
            raise LeftOut(f"the field {row.called(name)} is missing")
    where = [row.called(name) for name in names]
    several = _several(row, decoded(chosen), rejected)
    if several is not None:
        sides = [(where[0], chosen)] + [(f"an entry of {where[1]}", value) for value in several]
        if len(sides) < 2:
            raise LeftOut(ONE_ANSWER)
    else:
        sides = [(where[0], chosen), (where[1], rejected)]
    margin = _margin_of(row, names) if several is None else None
    return Answers(sides, [Preference(0, n, margin=margin) for n in range(1, len(sides))])


def _several(row: Row, chosen: Any, rejected: Any) -> list | None:
    """The rejected answers, if they are several: a list of what `chosen` is one of. None if `rejected` is one."""
    if isinstance(rejected, str):
        found = parsed(rejected) if rejected.lstrip().startswith("[") else rejected
        if not isinstance(found, list):
            return None
        is_json_too = isinstance(chosen, str) and chosen.lstrip().startswith("[")
        if all(isinstance(entry, str) for entry in found) and not is_json_too:  # as CSV has a list
            row.notes.changed[LIST_AS_TEXT] = None
            return found
        return found if _is_list_of_chats(found) else None
    if not isinstance(rejected, list):
        return None
    if not rejected:
        return []
    if isinstance(chosen, str) and all(isinstance(entry, str) for entry in rejected):
        return rejected
    if isinstance(chosen, dict) and len(rejected) > 1 and all(is_message(entry) for entry in rejected):
        return rejected
    return rejected if _is_list_of_chats(rejected) else None


def _is_list_of_chats(value: list) -> bool:
    return bool(value) and all(is_chat(entry) for entry in value)


SCORES_OF_PAIR = ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}_avg_rating", "reward_{}", "{}_reward")


@lru_cache
def _columns_of_scores(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    sides = [name.split("_")[0] for name in names]
    return [tuple(pattern.format(side) for side in sides) for pattern in SCORES_OF_PAIR]


def _margin_of(row: Row, names: tuple[str, ...]) -> float | None:
    """How much better the chosen answer's score is, if the row has both scores."""
    for columns in _columns_of_scores(names):
        if any(row.get(column) is None for column in columns):
            continue
        try:
            better, worse = (number(row.take(column), row.called(column)) for column in columns)
        except LeftOut as reason:
            row.notes.changed[f"{reason}: the pair's margin is not known"] = None
            return None
        return better - worse
    return None


def messages_and_rejected(row: Row, names: tuple[str, ...]) -> Answers:
    """ms-swift: the dialogue ends in the chosen answer; the rejected one, or the whole dialogue with it, is beside."""
    where, value = row.called(names[0]), decoded(row.take(names[0]))
    if not is_chat(value):
        raise LeftOut(f"{where} is {a_kind(value)}; it must be messages that end in the chosen answer")
    messages = read_messages(value, where, row.notes)
    if messages[-1]["role"] != "assistant":
        raise LeftOut(f"{where} must end in the chosen answer, but ends in the role {messages[-1]['role']}")
    rejected = row.take(names[1])
    if rejected is None:
        raise LeftOut(f"the field {row.called(names[1])} is missing")
    found = decoded(rejected)
    several = _several(row, value[-1] if not isinstance(found, list) or not is_chat(found) else value, found)
    if several is None and isinstance(found, list) and all(isinstance(entry, str) for entry in found):
        several = found
    sides = [(where, messages)]
    start = messages[: _last_turn(messages)]
    for entry in [found] if several is None else several:
        said = read_messages(entry, row.called(names[1]), row.notes) if not isinstance(entry, str) else None
        if said is None:
            said = [{"role": "assistant", "content": entry}]
        whole = said[0]["role"] != "assistant"
        sides.append((row.called(names[1]), said if whole else [*start, *said]))
    return Answers(sides, [Preference(0, n) for n in range(1, len(sides))])


def _last_turn(messages: list[Message]) -> int:
    """Where what follows the last user's message begins."""
    return max((n + 1 for n, message in enumerate(messages) if message["role"] == "user"), default=0)


ANSWER_KEYS = ("answer", "response", "completion", "generation", "text", "content", "output")
SCORE_COLUMNS = ("scores", "ratings", "rewards", "all_rm_scores", "rating", "reward", "score")
RANK_COLUMNS = ("ranks", "ranking", "rank")
SCORE_KEYS = ("score", "overall_score", "rating", "reward", "pm_score")
RANK_KEYS = ("rank",)


def several_answers(row: Row, names: tuple[str, ...]) -> Answers:
    where, found = row.called(names[0]), row.take(names[0])
    found = unzipped(parsed(found) if isinstance(found, str) else found)
    if not isinstance(found, list):
        raise LeftOut(f"{where} is {a_kind(found)}; it must be a list of answers")
    if len(found) < 2:
        raise LeftOut(ONE_ANSWER if found else f"{where} is an empty list")
    sides, used = [], set()
    for entry in found:
        if isinstance(entry, dict) and not is_message(entry):
            key = next((key for key in ANSWER_KEYS if entry.get(key) is not None), None)
            if key is None:
                raise LeftOut(f"an entry of {where} has none of the keys {', '.join(ANSWER_KEYS)}")
            used.add(key)
            entry = entry[key]
        elif isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if key not in (*SCORE_KEYS, *RANK_KEYS)}
        if entry is None:
            raise LeftOut(f"an entry of {where} is null")
        sides.append((f"an entry of {where}", entry))
    scores = _values(row, found, where, "scores", SCORE_COLUMNS, SCORE_KEYS, used)
    ranks = _values(row, found, where, "ranks", RANK_COLUMNS, RANK_KEYS, used)
    by_place = [-float(n) for n in range(len(found))] if names[0] in RANKED else None
    if by_place is not None:
        row.notes.changed[BEST_FIRST] = None
    if scores is None and ranks is None and by_place is None:
        raise LeftOut(f"{where} has neither scores nor ranks beside it")
    keys = dict.fromkeys(key for entry in found if isinstance(entry, dict) and not is_message(entry) for key in entry)
    for key in keys:  # in their order: the report is the same in every process
        if key not in used and any(entry.get(key) is not None for entry in found if isinstance(entry, dict)):
            row.notes.unused[f"key {key} of {where}"] = None
    by_rank = None if ranks is None else [-rank for rank in ranks]
    if scores is not None and by_rank is not None and _disagree(scores, by_rank):
        raise LeftOut(f"{DISAGREE}: the scores and the ranks of {where}")
    values = next(values for values in (scores, by_rank, by_place) if values is not None)
    if by_place is not None and _disagree(values, by_place):
        raise LeftOut(f"{DISAGREE}: the order of {where} and the scores or ranks beside it")
    return Answers(sides, values=values)


def _values(row: Row, found: list, where: str, name: str, columns: Sequence[str], keys: Sequence[str], used: set):
    """The scores (or ranks) of several answers: from a column beside them, or from a key of each. None without any."""
    asked = row.columns.get(name)
    column = row.first((name,)) if asked else row.first(columns)
    if column is not None:
        values = row.take(column)
        read = numbers(parsed(values) if isinstance(values, str) else values, row.called(column), len(found))
        if name == "ranks":
            _check_ranks(row, read, ordered=column == "ranking" and not asked)
        return read
    for key in [asked] if asked else keys:
        if any(isinstance(entry, dict) and entry.get(key) is not None for entry in found):
            used.add(key)
            return [number(entry.get(key), f"{key} of an entry of {where}") for entry in found]
    if asked:
        raise LeftOut(f"--columns {name}={asked}: neither a column nor a key of the answers is called so")
    return None


def _check_ranks(row: Row, ranks: list[float], ordered: bool) -> None:
    """Notes ranks that begin with 0. `ordered`: they may also be the answers' numbers, from the best to the worst."""
    first = min(ranks)
    if ordered and sorted(ranks) == [first + n for n in range(len(ranks))] and first in (0, 1):
        best_to_worst = [int(rank - first) for rank in ranks]
        if any(best_to_worst[place] != n for n, place in enumerate(best_to_worst)):  # else both say the same
            raise LeftOut(RANKS_OR_ORDER.format(row.called("ranking")))
    if first == 0:
        row.notes.changed[FROM_ZERO] = None


def _disagree(one: list[float], other: list[float]) -> bool:
    several = range(len(one))
    return any((one[a] - one[b]) * (other[a] - other[b]) < 0 for a in several for b in several)


VERDICTS = ("preference", "preferred", "better_response_id", "safer_response_id", "winner", "choice", "selected",
            "chosen", "better")  # fmt: skip
STRENGTHS = ("preference_strength", "overall_preference")
SCORES_OF_TWO = ("score", "rating", "reward")


def two_answers(row: Row, names: tuple[str, ...]) -> Answers:
    """Two answers under names of their own, and a verdict between them, or a score of each."""
    called = [row.called(name) for name in names]
    sides = [(column, _turns_as_messages(row, n, names)) for n, column in enumerate(called)]
    for column, value in sides:
        if value is None:
            raise LeftOut(f"the field {column} is missing")
    further = names[0][:-1] + chr(ord(names[1][-1]) + 1)
    if row.get(further) is not None:
        raise LeftOut(
            f"there is {row.called(further)} beside {' and '.join(called)}; give answers as a list: responses"
        )
    found, scores = _verdict(row, names), _scores_of_two(row, names)
    if found is None and scores is not None:
        return Answers(sides, values=scores)
    if found is None:
        raise LeftOut(
            f"no column says which of {called[0]} and {called[1]} is better; if one does: --columns preference=COLUMN"
        )
    if scores is not None:
        margin = scores[found.chosen] - scores[found.rejected]
        if margin < 0:
            raise LeftOut(f"{DISAGREE}: the verdict and the scores")
        found = Preference(found.chosen, found.rejected, margin=margin)
    if found.chosen == 1:
        sides, found = sides[::-1], Preference(0, 1, margin=found.margin)
    return Answers(sides, [found])


def _scores_of_two(row: Row, names: tuple[str, ...]) -> list[float] | None:
    """The scores of two answers; None without any."""
    found: list[list[float]] = []
    for score in SCORES_OF_TWO:
        columns = [f"{score}_{name[-1]}" for name in names]
        if all(row.get(column) is not None for column in columns):
            found.append([number(row.take(column), row.called(column)) for column in columns])
    if any(_disagree(found[0], scores) for scores in found[1:]):
        raise LeftOut(f"{DISAGREE}: two kinds of scores")
    return found[0] if found else None


def _verdict(row: Row, names: tuple[str, ...]) -> Preference | None:
    """What the columns of verdicts say, if they agree. None without any."""
    if "preference" in row.columns:  # the user has said which counts
        return _read_verdict(row, "preference", names) if row.get("preference") is not None else None
    there = [name for name in ("labels", *STRENGTHS, "winner_model_a", *VERDICTS)
             if row.get(name) is not None and (name != "labels" or names[0] == "human_ref_a")]  # fmt: skip
    if not there:
        return None
    first, *others = there
    found = _read_verdict(row, first, names)
    for other in others:
        used = {*row.used}
        try:
            chosen = _read_verdict(row, other, names).chosen
        except LeftOut as reason:
            row.used = used
            if not str(reason).endswith(ALL_TIED):  # it is no verdict
                continue
            chosen = None
        if chosen != found.chosen:
            columns = row.called(first), row.called(other)
            if other != "safer_response_id":  # that is another question
                raise LeftOut(f"{DISAGREE}: {columns[0]} and {columns[1]}")
            row.notes.changed[OTHER_QUESTION.format(*columns)] = None
    return found


def _read_verdict(row: Row, name: str, names: tuple[str, ...]) -> Preference:
    """What one column says. Raises LeftOut for a tie, and for what is no verdict."""
    where = row.called(name)
    if name == "labels":  # SHP: 1 says that A is the better
        label = number(row.take(name), where)
        if label not in (0, 1):
            raise LeftOut(f"labels is {label:g}; it must be 1 (human_ref_A is better) or 0")
        return Preference(0, 1) if label == 1 else Preference(1, 0)
    if name == "winner_model_a":
        a, b, _ = (number(row.take(f"winner_{of}") or 0, f"winner_{of}") for of in ("model_a", "model_b", "tie"))
        return by_verdict("model_a" if a > b else "model_b" if b > a else "tie", "the winner", names)
    if where in STRENGTHS:
        return by_strength(row.take(name), where)
    return by_verdict(row.take(name), where, names, [row.called(answer) for answer in names])


def _turns_as_messages(row: Row, n: int, names: tuple[str, ...]) -> Any:
    """An answer as it is, but for dialogues that are given as a list of prompts and lists of answers (LMSYS's 55k)."""
    value = row.take(names[n])
    answers, prompts = _texts_of(value), _texts_of(row.get("prompt"))
    if answers is None or prompts is None:
        return value
    if len(answers) != len(prompts) or None in prompts:
        raise LeftOut(f"{row.called(names[n])} does not have as many texts as the prompt has")
    row.used.add(row.called("prompt"))
    roles = ("user", "assistant")
    return [{"role": role, "content": text or ""} for turn in zip(prompts, answers, strict=True)
            for role, text in zip(roles, turn, strict=True)]  # fmt: skip


def _texts_of(value: Any) -> list[str | None] | None:
    """A list of texts, perhaps as JSON text; None if a value is no such list."""
    found = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    listed = isinstance(found, list) and bool(found) and all(text is None or isinstance(text, str) for text in found)
    return found if listed else None
