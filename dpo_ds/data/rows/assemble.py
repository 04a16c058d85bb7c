"""Puts a row's prompt and answers together into a comparison, with what stands beside them."""

from typing import Any

from dpo_ds.data.comparison import Comparison, LeftOut, without_unused_answers
from dpo_ds.data.rows.chats import as_chat, from_chats
from dpo_ds.data.rows.dialogues import in_hh_style_too
from dpo_ds.data.rows.messages import a_kind, decoded, parsed, read_tools, without_nulls
from dpo_ds.data.rows.preferences import EQUAL, preferences
from dpo_ds.data.rows.prompts import is_blank
from dpo_ds.data.rows.row import Answers, Prompt, Reading, Row
from dpo_ds.data.rows.texts import from_texts, is_rendered

# Kinds in the report that leave a row out.
NOT_TEXT = "the row has images, sound or video; only text can be trained on"
NOT_UNICODE = "a text is not valid Unicode"
EMPTY_PROMPT = "the messages of the prompt are empty"

MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def assemble(row: Row, prompt: Prompt | None, answers: Answers, reading: Reading) -> Comparison:
    """The comparison that a row makes. Raises LeftOut if its halves do not fit, or if it compares nothing."""
    if any(row.get(name) for name in MEDIA):
        raise LeftOut(NOT_TEXT)
    sides = [(where, decoded(value)) for where, value in answers.sides]
    if reading.markers is not None:  # plain text is learned as it is
        prompt, sides = in_hh_style_too(row, prompt, sides)
    texts = [value for _, value in sides if isinstance(value, str)]
    if len(texts) == len(sides):
        if len(texts) == 2 and texts[0] == texts[1]:
            raise LeftOut(EQUAL)
        parts = from_texts(row, prompt, texts, reading)
    else:
        chats = [as_chat(row, where, value) for where, value in sides]
        if prompt is not None and prompt.text is not None and is_rendered(prompt.text, chats, reading):
            parts = from_texts(row, prompt, [chat[0]["content"] for chat in chats], reading)
        else:
            parts = from_chats(row, prompt, chats)
    if not any((message["content"] or "").strip() for message in parts.messages if message["role"] != "system"):
        raise LeftOut(EMPTY_PROMPT)
    pairs = preferences(row, parts.answers, answers, reading)
    tools = read_tools(row.take("tools"), row.called("tools")) if row.get("tools") is not None else None
    if tools is None and prompt is not None and prompt.tools:
        tools = read_tools(prompt.tools, f"{prompt.where}.tools")
    comparison = Comparison(
        messages=parts.messages,
        answers=parts.answers,
        pairs=pairs,
        text=parts.text,
        tools=tools,
        template_kwargs=_template_kwargs(row),
        rendered=parts.rendered,
        implicit=parts.implicit,
        spare_answers=row.notes.spare_answers,
        changed=[*row.notes.changed],
        unused=[*row.notes.unused, *_unused(row)],
    )
    comparison = without_unused_answers(comparison)
    _require_unicode(comparison)
    return comparison


def _unused(row: Row) -> list[str]:
    return [f"column {name}" for name, value in row.fields.items() if name not in row.used and not is_blank(value)]


def _template_kwargs(row: Row) -> dict[str, Any]:
    value = row.take("chat_template_kwargs")
    found = parsed(value) if isinstance(value, str) and value.strip() else value
    if not found:
        return {}
    if not isinstance(found, dict):
        raise LeftOut(f"{row.called('chat_template_kwargs')} is {a_kind(value)}; it must be an object")
    return without_nulls(found)


def _require_unicode(comparison: Comparison) -> None:
    try:
        _encode([comparison.messages, comparison.text, comparison.tools, comparison.template_kwargs])
        _encode([[answer.messages, answer.text] for answer in comparison.answers])
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that were not UTF-8
        raise LeftOut(NOT_UNICODE) from None


def _encode(value: Any) -> None:
    """Encodes all texts in a value."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, dict):
        for entry in value.values():
            _encode(entry)
    elif isinstance(value, list):
        for entry in value:
            _encode(entry)
