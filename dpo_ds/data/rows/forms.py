"""Reads a row of any form that people bring. FORMS is the list of them; docs/data.md shows it.

A row is read in two halves: what gives its answers and says which is better, and what gives its prompt. Every form of
the one goes with every form of the other. What cannot be read raises LeftOut, whose text is the kind in the report.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, Literal

from dpo_ds.config import COLUMNS
from dpo_ds.data.comparison import Comparison, LeftOut
from dpo_ds.data.rows.answers import (
    PAIRS,
    RANKED,
    SEVERAL,
    TWO,
    chosen_and_rejected,
    messages_and_rejected,
    several_answers,
    two_answers,
)
from dpo_ds.data.rows.assemble import assemble
from dpo_ds.data.rows.messages import a_kind
from dpo_ds.data.rows.prompts import CHATS, QUESTIONS, messages_column, prompt_column, question
from dpo_ds.data.rows.row import Reading, Row
from dpo_ds.errors import UserError, one_line

NO_FORM = "the columns of the row fit no form"
ALIKE = 0.5  # from 0 to 1, as difflib compares texts: names that are likely the same, but for their spelling


@dataclass(frozen=True)
class Form:
    """One way in which data sets give a row's answers or its prompt."""

    half: Literal["answers", "prompt"]
    columns: str  # as docs/data.md shows them
    needs: tuple[tuple[str, ...], ...]  # the sets of columns of which one must be there
    shapes: str
    source: str
    example: dict[str, Any]
    read: Callable[[Row, tuple[str, ...]], Any]  # given the set of columns that is there


SAY = {"role": "user", "content": "Say hello."}
HELLO, NO = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Say hello.\n\nAssistant:"

FORMS = [
    Form(
        "answers",
        "`chosen`, `rejected`",
        (*PAIRS[:1], *PAIRS[7:8]),
        "text, a message, messages, or messages as JSON text; the answer alone or the whole dialogue with it",
        "most sets: HH, UltraFeedback binarized, Orca DPO pairs, TRL, LLaMA-Factory",
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
        chosen_and_rejected,
    ),
    Form(
        "answers",
        "`chosen`, `rejected` as a list",
        (*PAIRS[:1],),
        "`rejected` holds several answers, each of the shape of `chosen`: `chosen` is paired with each; in a CSV file, "
        "a list of texts as JSON or as Python writes it",
        "sets of one's own",
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": ["No.", "Why?"]},
        chosen_and_rejected,
    ),
    Form(
        "answers",
        "`chosen_response`, `rejected_response`; `preferred_output`, `non_preferred_output`; `preferred`, "
        "`dispreferred`; `better`, `worse`; `response_j`, `response_k`",
        (*PAIRS[1:7], *PAIRS[8:]),
        "the same under other names",
        "Argilla, NeMo; OpenAI, Together, Fireworks; Stack Exchange paired",
        {
            "input": {"messages": [SAY]},
            "preferred_output": [HELLO],
            "non_preferred_output": [NO],
        },
        chosen_and_rejected,
    ),
    Form(
        "answers",
        "`messages`, `rejected_response` or `rejected_messages`",
        (("messages", "rejected_response"), ("messages", "rejected_messages")),
        "`messages` ends in the chosen answer",
        "ms-swift",
        {"messages": [SAY, HELLO], "rejected_response": "No."},
        messages_and_rejected,
    ),
    Form(
        "answers",
        "`response`, `rejected_response`",
        (("response", "rejected_response"),),
        "text",
        "ms-swift's query and response",
        {"query": "Say hello.", "response": "Hello!", "rejected_response": "No."},
        chosen_and_rejected,
    ),
    Form(
        "answers",
        "two answers (`response_a`, `response_b`; `response_0`, `response_1`; `response1`, `response2`; `answer_…`, "
        "`completion_…`, `output_…`, `conversation_…`) and a verdict: `preference`, `winner`, `better_response_id`, "
        "`safer_response_id`, `choice`, `chosen`",
        TWO,
        "the verdict is a column's name or its ending (`a`, `0`, `2`, `model_b`), and counts as the names do; "
        "`preference_strength` and `overall_preference` are below 0 if the first is better; a tie is left out, "
        "and so is a row in which two verdicts, or a verdict and scores, disagree",
        "PKU-SafeRLHF, HelpSteer2 and 3, Chatbot Arena, AlpacaFarm",
        {"prompt": "Say hello.", "response_0": "No.", "response_1": "Hello!", "better_response_id": 1},
        two_answers,
    ),
    Form(
        "answers",
        "`human_ref_A`, `human_ref_B`, `labels`",
        (("human_ref_a", "human_ref_b"),),
        "`labels` 1: A is better; 0: B. `score_A` and `score_B` give the margin",
        "SHP",
        {"history": "Say hello.", "human_ref_A": "No.", "human_ref_B": "Hello!", "labels": 0},
        two_answers,
    ),
    Form(
        "answers",
        "two answers and `score_…`, `rating_…` or `reward_…` of each",
        TWO,
        "a higher score is better",
        "WebGPT comparisons",
        {"question": "Say hello.", "answer_0": "Hello!", "answer_1": "No.", "score_0": 1.0, "score_1": -1.0},
        two_answers,
    ),
    Form(
        "answers",
        "`responses`, `answers`, `completions`, `candidates` or `generations`, with `scores`, `ratings` or `rewards`, "
        "or with `ranks`",
        tuple((name,) for name in SEVERAL),
        "lists of equal length; a higher score is better, a lower rank is better (1 is the best, or 0 if they begin "
        "with it); `--pairs` says which pairs are made",
        "samples with a reward model's scores, Argilla",
        {"prompt": "Say hello.", "responses": ["No.", "Hello!"], "scores": [0.1, 0.9]},
        several_answers,
    ),
    Form(
        "answers",
        "the same columns, each answer an object",
        tuple((name,) for name in SEVERAL),
        "the answer is its `answer`, `response`, `completion`, `generation` or `text`; the score its `score`, "
        "`overall_score`, `rating`, `reward` or `pm_score` (`--columns scores=KEY` for another); or its `rank`",
        "UltraFeedback, Nectar, Stack Exchange preferences, NeMo",
        {"prompt": HH + " ", "answers": [{"answer": "Hello!", "rank": 1}, {"answer": "No.", "rank": 2}]},
        several_answers,
    ),
    Form(
        "answers",
        "`ranked_responses`, `ranked_answers` or `ranked_completions`",
        tuple((name,) for name in RANKED),
        "a list from the best answer to the worst, which the report says",
        "sets of one's own",
        {"prompt": "Say hello.", "ranked_responses": ["Hello!", "No."]},
        several_answers,
    ),
    Form(
        "prompt",
        "`prompt`",
        (("prompt",),),
        "text that the answers continue (a dialogue in HH's style is read as messages), messages, or messages as JSON "
        "text; if it ends in the assistant's words, the answers continue them",
        "most sets",
        {"prompt": [SAY], "chosen": [HELLO], "rejected": [NO]},
        prompt_column,
    ),
    Form(
        "prompt",
        "`messages`, `conversations`, `conversation`, `dialogue`, `trajectory` or `context`",
        tuple((name,) for name in CHATS),
        "messages with `role` and `content`, or `from` and `value`, or turns such as `human` and `assistant`; an "
        "answer at its end is not used, unless it breaks off there",
        "LLaMA-Factory's ShareGPT form, HelpSteer3, UltraInteract, ms-swift",
        {
            "conversations": [{"from": "human", "value": "Say hello."}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "No."},
        },
        messages_column,
    ),
    Form(
        "prompt",
        "`instruction` (and `input`), `question`, `query`, `input`, `problem`, `history` or `post`",
        tuple((name,) for name in QUESTIONS),
        "text: what a user says",
        "Orca DPO pairs, LLaMA-Factory's Alpaca form, UltraFeedback, SHP",
        {"instruction": "Say", "input": "hello.", "chosen": "Hello!", "rejected": "No."},
        question,
    ),
]

# Where no column gives the prompt: what the answers are, how the prompt is found, an example.
WITHOUT_PROMPT: list[tuple[str, str, dict[str, Any]]] = [
    (
        "whole dialogues as messages",
        "the messages that all have in common; what follows may be several turns, of which the assistant's are learned",
        {"chosen": [SAY, HELLO], "rejected": [SAY, NO]},
    ),
    (
        "whole dialogues as text in HH's style",
        "the text up to the last `Assistant:`",
        {"chosen": f"{HH} Hello!", "rejected": f"{HH} No."},
    ),
    (
        "other text",
        "the words that all begin with; only where no other column may be the prompt",
        {"chosen": "Say hello. Hello!", "rejected": "Say hello. No."},
    ),
]

# What may stand beside them: columns, what they do, an example (a whole row).
BESIDE: list[tuple[str, str, dict[str, Any]]] = [
    (
        "`system`, `system_prompt` or `system_message`",
        "the system message, where the dialogue has none",
        {"system": "Be brief.", "question": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    ),
    (
        "`history`",
        "the turns before the prompt, as pairs of texts or as messages",
        {"history": [["Hi", "Hi."]], "instruction": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    ),
    (
        "`tools`",
        "the functions that the chat template shows the model, as JSON schemas or as JSON text of them",
        {"tools": [{"name": "greet"}], "prompt": [SAY], "chosen": [HELLO], "rejected": [NO]},
    ),
    (
        "`chat_template_kwargs`",
        "further variables of the chat template",
        {"chat_template_kwargs": {"enable_thinking": False}, "prompt": [SAY], "chosen": [HELLO], "rejected": [NO]},
    ),
    (
        "`weight`",
        "multiplies the loss of the row's pairs; a number above 0",
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No.", "weight": 0.5},
    ),
    (
        "`margin`, or `score_chosen` and `score_rejected` (`chosen_rating`, `rating_chosen`, …)",
        "how much better the chosen answer is; `--pairs above_margin` leaves out what is below `--min_margin`",
        {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No.", "margin": 2.0},
    ),
]


def _read_half(row: Row, half: str) -> Any:
    """What the first form of a half reads whose columns hold something; None if no form fits.

    Forms with a column that --columns names come first.
    """
    holding = {name for name in row.names if row.get(name) is not None and row.names[name] not in row.used}
    for form, names in _fitting(row, half, holding):
        found = form.read(row, names)
        if found is not None:
            return found
    return None


def _fitting(row: Row, half: str, columns: Iterable[str]) -> list[tuple[Form, tuple[str, ...]]]:
    """The forms of a half for which the columns are enough, each with its set of columns."""
    return [(FORMS[n], names) for n, names in _fits(half, frozenset(columns), frozenset(row.columns))]


@lru_cache(maxsize=10_000)  # nearly all rows of a set have the same columns
def _fits(half: str, columns: frozenset[str], mapped: frozenset[str]) -> list[tuple[int, tuple[str, ...]]]:
    fits = []
    for n, form in enumerate(FORMS):
        sets = [names for names in form.needs if columns.issuperset(names)]
        if form.half == half and sets:
            fits.append((n, max(sets, key=lambda names: len(mapped.intersection(names)))))
    return sorted(fits, key=lambda fit: -len(mapped.intersection(fit[1])))


# ------------------------------------------------------------------------------------------------------------- reading


def read_row(fields: Any, reading: Reading) -> Comparison:
    """What a row compares. Raises LeftOut, with the kind for the report, if the row cannot be used."""
    if not isinstance(fields, dict):
        raise LeftOut(f"the row is {a_kind(fields)}; it must be an object")
    row = Row(fields, reading.columns)
    answers = _read_half(row, "answers")
    if answers is None:
        raise LeftOut(_no_answers(row))
    prompt = _read_half(row, "prompt")
    return assemble(row, prompt, answers, reading)


def _no_answers(row: Row) -> str:
    """Why no form gives the row's answers: a column is null, or one of a pair stands alone, or nothing fits."""
    standing = {name for name in row.names if row.has(name)}
    for _, names in _fitting(row, "answers", standing):
        missing = [row.called(name) for name in names if row.get(name) is None]
        if missing:
            return f"the field {missing[0]} is missing"
    for names in PAIRS[:1]:
        if {*names} & standing:
            return f"the field {next(row.called(name) for name in names if row.get(name) is None)} is missing"
    return f"{NO_FORM}: it has {_listed(sorted(row.fields))}"


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join([*(one_line(name, 40) for name in names[:most]), *(["…"] if len(names) > most else [])]) or "none"


def require_form(columns: Sequence[str], reading: Reading) -> None:
    """Raises UserError, in one line with the nearest form, if a set with these columns fits no form.

    Also if --columns names a column that is not there. A key of the answers may be named for scores and ranks.
    """
    for name, column in reading.columns.items():
        if column not in columns and name not in ("scores", "ranks"):
            raise UserError(f"--columns {name}={column}: there is no column {column}; it has {_listed(columns)}")
    row = Row(dict.fromkeys(columns), reading.columns)
    if _fitting(row, "answers", {*row.names}):
        return
    names, missing = _nearest([*row.names])
    named = ",".join(f"{name}=COLUMN" for name in missing)
    raise UserError(
        f"it has the columns {_listed(columns)}, which fit no form of a preference set; the nearest form has "
        f"{' and '.join(names)}: say which column is {' and which is '.join(missing)} with --columns {named}"
    )


def _nearest(columns: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The columns of the form of answers that lacks the least, and those missing ones: --columns takes all of these.

    Of forms that lack as much, the one whose missing names are most like columns that are there; else the first.
    """

    def distance(names: tuple[str, ...]) -> tuple[float, float]:
        missing = [name for name in names if name not in columns]
        likeness = [
            max((SequenceMatcher(None, name, column).ratio() for column in columns), default=0) for name in missing
        ]
        like = sum(likeness) / len(likeness)
        return len(missing) / len(names), -like if like > ALIKE else 0.0

    nameable = [names for form in FORMS if form.half == "answers" for names in form.needs
                if {*names} <= {*columns, *COLUMNS}]  # fmt: skip
    nearest = min(nameable, key=distance)
    return nearest, [name for name in nearest if name not in columns]
