"""Reads what gives a row's prompt. data/rows/forms.py lists the forms.

Each reader is given the row and the columns that are there, under our names. It returns None if these give no prompt.
"""

from dataclasses import replace
from typing import Any

from dpo_ds.data.comparison import LeftOut
from dpo_ds.data.rows.messages import decoded, is_message, is_part, read_content, read_messages
from dpo_ds.data.rows.row import Prompt, Row

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "trajectory", "context")
QUESTIONS = ("instruction", "question", "query", "input", "problem", "user_prompt", "history", "post", "context",
             "conversation", "dialogue", "dialog")  # fmt: skip


def is_blank(value: Any) -> bool:
    """Whether nothing stands in a column: null, or a text of blanks, as an empty cell of a table is."""
    return value is None or (isinstance(value, str) and not value.strip())


def no_prompt(row: Row) -> str | None:
    """Why a row has no prompt though there is a column for it, perhaps in other rows of its set alone. None: there is
    no such column."""
    for name in ("prompt", *CHATS, *QUESTIONS):
        if row.has(name) and row.called(name) not in row.used and is_blank(row.get(name)):
            return f"the field {row.called(name)} is {'missing' if row.get(name) is None else 'empty'}"
    return None


def prompt_column(row: Row, names: tuple[str, ...]) -> Prompt | None:
    value, where = decoded(row.get(names[0])), row.called(names[0])
    if is_blank(value):
        return None
    row.take(names[0])
    if isinstance(value, str):
        return Prompt(where, text=value, continues=True)
    return replace(_prompt_messages(row, where, value), continues=True)


def _prompt_messages(row: Row, where: str, value: Any) -> Prompt:
    if isinstance(value, dict) and isinstance(value.get("full_text"), str):  # WebGPT's question
        return Prompt(where, text=value["full_text"])
    if isinstance(value, dict) and not is_message(value) and value.get("messages") is not None:  # OpenAI's input
        for key, found in value.items():
            if key not in ("messages", "tools") and found is not None:
                row.notes.unused[f"key {key} of {where}"] = None
        messages = read_messages(decoded(value["messages"]), f"{where}.messages", row.notes)
        return Prompt(where, messages=messages, tools=value.get("tools"))
    if isinstance(value, list) and value and is_part(value[0]):
        return Prompt(where, messages=[{"role": "user", "content": read_content(value, where)}])
    messages = read_messages(value, where, row.notes)
    if not messages:
        raise LeftOut(f"{where} is an empty list")
    return Prompt(where, messages=messages)


def messages_column(row: Row, names: tuple[str, ...]) -> Prompt | None:
    value = decoded(row.get(names[0]))
    if isinstance(value, str):  # `context` and `conversation` may be plain text: a question, see below
        return None
    row.take(names[0])
    return _prompt_messages(row, row.called(names[0]), value)


def question(row: Row, names: tuple[str, ...]) -> Prompt | None:
    name = "instruction" if names[0] == "input" and isinstance(row.get("instruction"), str) else names[0]
    texts = {name: text for name in QUESTIONS if isinstance(text := row.get(name), str) and text.strip()}
    if "instruction" in texts:
        texts.pop("input", None)
    if len(set(texts.values())) > 1 and not {*texts} & {*row.columns}:
        could_be = [row.called(name) for name in texts]
        raise LeftOut(f"{' and '.join(could_be)} could both be the prompt; name one: --columns prompt={could_be[0]}")
    value, where = decoded(row.get(name)), row.called(name)
    if is_blank(value):
        return None
    if name == "history" and isinstance(value, list) and (texts or row.first(["prompt", *CHATS])):
        return None  # the turns before the prompt
    row.take(name)
    if not isinstance(value, str):
        return _prompt_messages(row, where, value)
    if name == "instruction" and isinstance(row.get("input"), str):
        more = row.take("input")
        value = f"{value}\n{more}" if more.strip() else value
    return Prompt(where, text=value)
