"""A row's prompt and its answers once they fit each other, as messages and as plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dpo_ds.data.comparison import Answer, LeftOut, Message
from dpo_ds.data.dialogue import ROLES, TURN, as_text, without_separator
from dpo_ds.data.rows.messages import a_kind, has_more_than_text, read_messages
from dpo_ds.data.rows.row import Row

# Kinds in the report that leave a row out.
TWO_SYSTEMS = "the column system and the dialogue's system message differ"
TWO_ASSISTANTS = "two assistant messages follow each other where the answers begin, or in one"
OPEN_CALL = "the prompt ends in a tool call without the tool's answer"
# Kinds that change a row.
REPEATED = "the answers repeat the prompt: it is taken once"
ANSWERED = "the dialogue ends in an answer that is none of those compared: it is not used"
BEGUN = "the prompt ends in the assistant's words: the answers continue them"
TAIL = "what follows the assistant's last message is not used"

SYSTEMS = ("system", "system_prompt", "system_message")


@dataclass
class Parts:
    """A prompt and answers that fit each other."""

    messages: list[Message]
    answers: list[Answer]
    text: str | None
    rendered: bool = False
    implicit: bool = False


def text_parts(row: Row, messages: list[Message], text: str, texts: Sequence[str], implicit: bool = False) -> Parts:
    """A prompt as plain text, which the answers continue as they are."""
    begun = messages[-1]["role"] == "assistant"
    if begun:
        row.notes.changed[BEGUN] = None
    dialogue = bool(TURN.match(text))
    said = [answer if begun else without_separator(answer, lines=dialogue or implicit) for answer in texts]
    if dialogue and not begun:  # its turns are read without the blanks between them
        said = [words.rstrip() for words in said]
    answers = [Answer([{"role": "assistant", "content": words}], answer)
               for words, answer in zip(said, texts, strict=True)]  # fmt: skip
    return Parts(messages, answers, text, implicit=implicit)


def chat_parts(row: Row, messages: list[Message], chats: list[list[Message]]) -> Parts:
    """A prompt and its answers, both as messages. In plain text a chat is written in HH's style."""
    begun = messages[-1]["role"] == "assistant"
    if begun:
        if not isinstance(messages[-1]["content"], str) or messages[-1].get("tool_calls"):
            raise LeftOut(OPEN_CALL)
        row.notes.changed[BEGUN] = None
    answers = []
    for chat in chats:
        last = max(n for n, message in enumerate(chat) if message["role"] == "assistant")
        if last + 1 < len(chat):
            row.notes.changed[TAIL] = None
            chat = chat[: last + 1]
        if any(a["role"] == b["role"] == "assistant" and not a.get("tool_calls") for a, b in pairwise(chat)):
            raise LeftOut(TWO_ASSISTANTS)
        answers.append(Answer(chat, _answer_text(chat, begun)))
    if not all(is_plain(message) for message in messages):
        return Parts(messages, answers, None)
    text = as_text(messages)
    if begun:
        text = as_text(messages[:-1]) + " " + messages[-1]["content"]
    return Parts(messages, answers, text)


# How a text ends that goes on.
OPEN_END = re.compile(r"[,;:=–—-]\s*\Z")


def without_answer(row: Row, messages: list[Message], answers: Sequence[Message], continues: bool) -> list[Message]:
    """A prompt's messages without an answer at their end: one of those compared, or one that these do not go on with.

    continues: they go on with whatever it ends with.
    """
    last = messages[-1]
    if len(messages) < 2 or last["role"] != "assistant":
        return messages
    if _said_and_called(last) in map(_said_and_called, answers):
        row.notes.changed[REPEATED] = None
        return messages[:-1]
    if continues or last.get("tool_calls") or _goes_on(last["content"] or "", [a["content"] or "" for a in answers]):
        return messages
    row.notes.changed[ANSWERED] = None
    return messages[:-1]


def _said_and_called(message: Message) -> tuple[str, str]:
    return (message["content"] or "").strip(), repr([call["function"] for call in message.get("tool_calls", [])])


def _goes_on(text: str, answers: Sequence[str]) -> bool:
    """Whether it is evident that answers go on with a text: it ends so, or they begin in the middle of its sentence."""
    if OPEN_END.search(text):
        return True
    apart = text[-1:].isspace() or all(answer[:1].isspace() for answer in answers)
    return apart and text.rstrip()[-1:].isalnum() and all(answer.lstrip()[:1].islower() for answer in answers)


def _answer_text(chat: list[Message], begun: bool) -> str | None:
    """An answer as plain text; None for one that is more than text."""
    if len(chat) > 1 or not is_plain(chat[0]):
        return None
    return chat[0]["content"] if begun else f" {chat[0]['content'].strip()}"


def is_plain(message: Message) -> bool:
    return isinstance(message["content"], str) and message["role"] in ROLES and not has_more_than_text(message)


def before_prompt(row: Row, messages: list[Message]) -> list[Message]:
    """What the columns system and history put before the prompt's messages."""
    before: list[Message] = []
    name = row.first(SYSTEMS)
    if name is not None and row.called(name) not in row.used:
        system = row.take(name)
        if not isinstance(system, str):
            raise LeftOut(f"{row.called(name)} is {a_kind(system)}; it must be text")
        own = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        if own is not None and system.strip() and own.strip() != system.strip():
            raise LeftOut(TWO_SYSTEMS)
        if own is None and system.strip():
            before.append({"role": "system", "content": system})
    history = row.get("history")
    if isinstance(history, list) and row.called("history") not in row.used:
        row.take("history")
        for turn in history:
            if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
                before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            else:
                before += read_messages([turn], row.called("history"), row.notes)
    return before
