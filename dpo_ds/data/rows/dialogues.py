"""Whole dialogues as plain text, in HH's style: the prompt is all up to the last answer."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from dpo_ds.data.comparison import LeftOut
from dpo_ds.data.dialogue import (
    ROLES,
    as_dialogue,
    in_hh_style,
    last_answer,
    parse_dialogue,
    prompt_messages,
    without_tail,
)
from dpo_ds.data.rows.chats import DIFFER, NO_PROMPT, compare, from_chats, shared_messages
from dpo_ds.data.rows.parts import REPEATED, TAIL, Parts, before_prompt, text_parts
from dpo_ds.data.rows.row import Prompt, Row

# A kind in the report that changes a row.
OTHER_NAMES = 'lines that begin with "{}:" and "{}:" are read as the turns of a dialogue'


def in_hh_style_too(
    row: Row, prompt: Prompt | None, sides: list[tuple[str, Any]]
) -> tuple[Prompt | None, list[tuple[str, Any]]]:
    """A row's prompt and answers, in HH's style where they are dialogues whose turns have other names."""
    texts = [value for _, value in sides if isinstance(value, str)]
    given = in_hh_style(prompt.text) if prompt is not None and prompt.text is not None else None
    whole = [in_hh_style(text) for text in texts]
    names: tuple[str, ...] = ()
    if whole and all(whole) and len(texts) == len(sides) and _asks(prompt, [found[0] for found in whole if found]):
        names = (whole[0] or ())[1:]
        sides = [(where, found[0]) for (where, _), found in zip(sides, whole, strict=True) if found]
    if prompt is not None and given is not None:
        prompt, names = replace(prompt, text=given[0]), given[1:]
        opened = re.compile(rf"\s*(?:#{{2,3}} )?{names[1]}:", re.IGNORECASE if len(names[1]) > 1 else 0)
        if all(opened.match(text) for text in texts):
            sides = [(where, opened.sub("Assistant:", value, count=1) if isinstance(value, str) else value)
                     for where, value in sides]  # fmt: skip
    if names:
        row.notes.changed[OTHER_NAMES.format(*names)] = None
    return prompt, sides


def _asks(prompt: Prompt | None, dialogues: list[str]) -> bool:
    """Whether dialogues begin with what the prompt says. Otherwise an answer to it is a dialogue: "Write one"."""
    if prompt is None:
        return True
    said = prompt.text if prompt.text is not None else "\n".join(m["content"] or "" for m in prompt.messages or [])
    messages = [parse_dialogue(text) or [] for text in dialogues]
    first = [next((m["content"] for m in found if m["role"] == "user"), "") for found in messages]
    return all(words in said for words in first)


def from_dialogues(row: Row, prompt: Prompt | None, texts: list[str]) -> Parts:
    """Whole dialogues as text, in HH's style."""
    ended = [without_tail(text) for text in texts]
    if ended != texts:
        row.notes.changed[TAIL] = None
        texts = ended
    prompts = [text[: last_answer(text)] for text in texts]
    if any(found != prompts[0] for found in prompts):
        chats = [parse_dialogue(text) or [] for text in texts]
        shared = shared_messages(chats)
        turns = [[message["role"] for message in chat[shared:]] for chat in chats]
        if not all(chats) or any(a == b for roles in turns for a, b in pairwise(roles)):
            raise LeftOut(DIFFER)
        return from_chats(row, prompt, chats)
    start, messages = len(prompts[0]), prompt_messages(prompts[0])
    if not messages:  # no answer, or nothing before it
        raise LeftOut(NO_PROMPT)
    if prompt is not None and prompt.text is not None and as_dialogue(prompt.text) == prompts[0]:
        row.notes.changed[REPEATED] = None
    elif prompt is not None:
        compare(row, prompt, messages)
    before = before_prompt(row, messages)
    text = "".join(f"\n\n{ROLES[message['role']]}: {message['content']}" for message in before) + prompts[0]
    return text_parts(row, [*before, *messages], text, [text[start:] for text in texts])
