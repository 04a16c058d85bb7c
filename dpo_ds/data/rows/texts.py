"""Answers as texts: after a prompt of any kind, as whole dialogues, rendered already, or with words in common."""

import os
import re
from collections.abc import Sequence
from typing import Any

from dpo_ds.data.comparison import Answer, LeftOut, Message
from dpo_ds.data.dialogue import (
    ROLES,
    as_dialogue,
    helpsteer_messages,
    last_answer,
    parse_dialogue,
    prompt_messages,
    without_separator,
)
from dpo_ds.data.rows.chats import NO_PROMPT, from_chats
from dpo_ds.data.rows.dialogues import from_dialogues
from dpo_ds.data.rows.messages import is_chat, is_message
from dpo_ds.data.rows.parts import (
    REPEATED,
    SYSTEMS,
    Parts,
    before_prompt,
    chat_parts,
    is_plain,
    text_parts,
    without_answer,
)
from dpo_ds.data.rows.prompts import CHATS, QUESTIONS, no_prompt
from dpo_ds.data.rows.rendered import rendered_dialogues, rendered_prompt, require_bare, require_own
from dpo_ds.data.rows.row import Prompt, Reading, Row, plain

# Kinds in the report that change a row.
RENDERED = "the texts hold the chat template's own tokens: they are used as they are"
OPENED_FOR = "a prompt that is rendered already does not open the assistant's turn: the template's opening is added"
FRAMED = "the prompt ends like one for another model; the chat template puts its own frame around it"

# Columns that say something about a row. A text in any other column may be its prompt.
ABOUT = re.compile(
    r"(.*_)?(id|ids|index|source|dataset|subset|split|type|category|categories|domain|topic|task|tags?|labels?|lang|"
    r"language|models?|name|url|link|license|date|time|timestamp|scores?|ratings?|rationale|reason|reasoning|feedback|"
    r"critique|comments?|notes?|metadata|meta|info|annotator|hash|status|version|policy|explanation|justification|"
    r"statement|elaboration|weight|margin|difficulty|level|quality|length|count|rank|ranking|winner|seed|group|batch)"
)
NO_WORDS = re.compile(r"|true|false|yes|no|none|null|na|n/a|nan|[-+]?[\d.,]+(e[-+]?\d+)?%?", re.IGNORECASE)
# How prompts end that were written for models without special tokens: Vicuna's, Alpaca's.
OPENED = re.compile(r"(\bASSISTANT:|#{2,3} ?(Response|Assistant|Answer):?)\s*\Z")


def from_texts(row: Row, prompt: Prompt | None, texts: list[str], reading: Reading) -> Parts:
    if reading.markers is not None and (prompt is None or prompt.text is not None):
        given = None if prompt is None else prompt.text
        found = (
            rendered_dialogues(texts, reading.markers)
            if given is None
            else rendered_prompt(given, texts, reading.markers)
        )
        if found is not None:
            row.notes.changed[RENDERED] = None
            if given is not None and found[0] != given and found[1] == texts:
                row.notes.changed[OPENED_FOR] = None
            text, texts = found
            answers = [Answer([{"role": "assistant", "content": answer}], answer) for answer in texts]
            return Parts([{"role": "user", "content": text}], answers, text, rendered=True)
        require_own(texts[0] if given is None else given, reading.markers)
    if reading.markers is not None:
        for text in texts:
            require_bare(text)
    whole = [as_dialogue(text) for text in texts]
    if prompt is not None and any(text.lstrip().startswith("Assistant:") for text in texts):
        whole = [None]
    if all(whole) and prompt is not None and prompt.messages is not None:
        return from_chats(row, prompt, [parse_dialogue(text or "") or [] for text in whole])
    if all(whole):
        return from_dialogues(row, prompt, [text for text in whole if text])
    if prompt is None:
        return _common_words(row, texts)
    if prompt.messages is not None:
        return _said(row, prompt.messages, texts, prompt)
    assert prompt.text is not None
    turns = helpsteer_messages(prompt.text)
    if turns is not None:
        return _said(row, turns, texts, prompt)
    dialogue = as_dialogue(prompt.text)
    if reading.markers is not None and dialogue is None and OPENED.search(prompt.text):
        row.notes.changed[FRAMED] = None
    text = prompt.text if dialogue is None else dialogue
    texts = _once(row, text, prompt.text, texts, dialogue is not None)
    if dialogue is not None:
        text, texts = _open_turn(text, texts)
    messages = prompt_messages(text) or [{"role": "user", "content": text}]
    asked = without_answer(row, messages, _as_messages(texts), prompt.continues)
    if len(asked) < len(messages):
        messages, text, texts = asked, text[: last_answer(text)], [f" {answer.strip()}" for answer in texts]
    before = before_prompt(row, messages)
    if dialogue is not None:
        text = "".join(f"\n\n{ROLES[message['role']]}: {message['content']}" for message in before) + text
        return text_parts(row, [*before, *messages], text, texts)
    if before or not prompt.continues:
        return _said(row, [*before, *messages], texts, None)
    return text_parts(row, messages, text, texts)


def is_rendered(prompt: str, chats: list[list[Message]], reading: Reading) -> bool:
    """Whether a prompt has been through a chat template, and answers given as messages are only text after it."""
    alone = all(len(chat) == 1 and chat[0]["role"] == "assistant" and is_plain(chat[0]) for chat in chats)
    if reading.markers is None or not alone:
        return False
    found = rendered_prompt(prompt, [], reading.markers)
    if found is None:
        require_own(prompt, reading.markers)
    return found is not None


def _said(row: Row, messages: list[Message], texts: Sequence[str], prompt: Prompt | None) -> Parts:
    """A prompt as messages, and answers as text."""
    if prompt is not None:
        messages = [*before_prompt(row, messages), *messages]
        messages = without_answer(row, messages, _as_messages(texts), prompt.continues)
        last = messages[-1]
        if last["role"] == "user":
            texts = _once(row, last["content"], last["content"], list(texts), False)
    if messages[-1]["role"] != "assistant":
        texts = [without_separator(text) for text in texts]
    return chat_parts(row, messages, [[message] for message in _as_messages(texts)])


def _as_messages(texts: Sequence[str]) -> list[Message]:
    return [{"role": "assistant", "content": text} for text in texts]


def _once(row: Row, text: str, written: str, texts: list[str], dialogue: bool) -> list[str]:
    """The answers without a prompt that all of them repeat. A short prompt may well be echoed: Hi, Hi there."""
    telling = dialogue or len(text.split()) >= 3 or len(text.encode(errors="surrogatepass")) >= 16
    for prefix in (text, written, written.strip()):
        if telling and prefix and all(answer.startswith(prefix) and _ends_at(prefix, answer) for answer in texts):
            row.notes.changed[REPEATED] = None
            return [answer[len(prefix) :] for answer in texts]
    return texts


def _ends_at(prefix: str, answer: str) -> bool:
    """Whether a word ends where a prefix does."""
    more = answer[len(prefix) :]
    return not (more[:1].isalnum() and prefix[-1:].isalnum())


def _open_turn(text: str, texts: list[str]) -> tuple[str, list[str]]:
    """Moves "Assistant:" from the beginnings of the answers to the prompt's end, once."""
    opened = [re.match(r"\s*Assistant:", answer) for answer in texts]
    if not all(opened):
        return text, texts
    text = text if text.rstrip().endswith("\n\nAssistant:") else text.rstrip() + "\n\nAssistant:"
    return text, [answer[match.end() :] for answer, match in zip(texts, opened, strict=True) if match]


def _common_words(row: Row, texts: list[str]) -> Parts:
    """The prompt is what the answers have in common, in whole words. Only if no column might be it."""
    if (reason := no_prompt(row)) is not None:
        raise LeftOut(reason)
    mapped = {column: name for name, column in row.columns.items()}
    known = {row.called(name) for name in (*SYSTEMS, "tools", "chat_template_kwargs")}
    for column, value in row.fields.items():
        name = plain(column)
        if column in mapped and name in ("prompt", *CHATS, *QUESTIONS) and value is not None:
            raise LeftOut(
                f"no column is the prompt, since --columns takes {column} for {mapped[column]}; say which is: "
                "--columns prompt=COLUMN"
            )
        spare = not {column} & {*row.used, *mapped, *known} and not ABOUT.fullmatch(name)
        if spare and _says_something(value):
            raise LeftOut(
                f"no column is the prompt, but {column} may be: say so with --columns prompt={column}, or remove it"
            )
    common = os.path.commonprefix(texts)  # noqa: RUF071  (compares character by character, as intended)
    shared = re.sub(r"\s*\S*\Z", "", common)
    if not shared:
        raise LeftOut(NO_PROMPT)
    messages: list[Message] = [{"role": "user", "content": shared}]
    answers = [text[len(shared) :] for text in texts]
    before = before_prompt(row, messages)
    if before:
        parts = _said(row, [*before, *messages], answers, None)
        parts.implicit = True
        return parts
    return text_parts(row, messages, shared, answers, implicit=True)


def _says_something(value: Any) -> bool:
    """Whether a value may be a prompt: text but for a number or a word of a table's, or messages."""
    if isinstance(value, str):
        return not NO_WORDS.fullmatch(value.strip())
    return is_chat(value) or is_message(value)
