"""Answers as messages: alone, or as whole dialogues that have their prompt in common."""

from collections.abc import Sequence
from typing import Any

from dpo_ds.data.comparison import LeftOut, Message
from dpo_ds.data.dialogue import as_dialogue, helpsteer_messages, parse_dialogue, prompt_messages
from dpo_ds.data.rows.messages import a_kind, is_part, read_content, read_messages
from dpo_ds.data.rows.parts import TWO_ASSISTANTS, Parts, before_prompt, chat_parts, without_answer
from dpo_ds.data.rows.preferences import EMPTY, EQUAL
from dpo_ds.data.rows.prompts import no_prompt
from dpo_ds.data.rows.row import Prompt, Row

# Kinds in the report that leave a row out.
DIFFER = "the dialogues differ before the last answer"
BEGINNING = "one dialogue is the beginning of the other"
NO_PROMPT = "chosen and rejected share no prompt"
# Kinds that change a row.
OTHER_PROMPT = "the prompt's column differs from the dialogues in the answers: the dialogues are used"


def as_chat(row: Row, where: str, value: Any) -> list[Message]:
    """An answer, or a whole dialogue, as messages."""
    if isinstance(value, str):
        dialogue = as_dialogue(value)
        return (parse_dialogue(dialogue) if dialogue else None) or [{"role": "assistant", "content": value}]
    if isinstance(value, list) and value and is_part(value[0]):
        return [{"role": "assistant", "content": read_content(value, where)}]
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not value:
        raise LeftOut(f"{where} is {a_kind(value)}")
    return read_messages(value, where, row.notes)


def from_chats(row: Row, prompt: Prompt | None, chats: list[list[Message]]) -> Parts:
    """Answers as messages: alone, or as whole dialogues that have their prompt in common."""
    if len(chats) == 2 and chats[0] == chats[1]:
        raise LeftOut(EQUAL)
    if not all(chats):
        raise LeftOut(EMPTY)
    shared = shared_messages(chats)
    if any(len(chat) == shared for chat in chats):
        if min(map(len, chats)) < max(map(len, chats)):
            raise LeftOut(BEGINNING)
        shared -= 1  # all are equal up to their ends: they differ in what is not compared
    common, rest = chats[0][:shared], [chat[shared:] for chat in chats]
    given = _given(row, prompt, [chat[0] for chat in chats], common, chats)
    messages = [*before_prompt(row, given), *given]
    if any(chat[0]["role"] != "assistant" for chat in rest):
        wrong = next(chat[0]["role"] for chat in rest if chat[0]["role"] != "assistant")
        alone = shared == 0 and all(len(chat) == 1 for chat in chats)
        raise LeftOut(f"an answer has the role {wrong}; it must be the assistant's" if alone else DIFFER)
    if not given:  # a system message alone is no question
        raise LeftOut(no_prompt(row) or NO_PROMPT)
    if common and messages[-1]["role"] == "assistant" and messages[-1] == common[-1]:
        raise LeftOut(TWO_ASSISTANTS)
    parts = chat_parts(row, messages, rest)
    parts.implicit = prompt is None and any(len(answer.messages) > 1 for answer in parts.answers)
    return parts


def _given(
    row: Row, prompt: Prompt | None, firsts: list[Message], common: list[Message], chats: list[list[Message]]
) -> list[Message]:
    """The prompt: the column's messages, those that the answers have in common, or the one after the other."""
    if prompt is None:
        return common
    whole = any(first["role"] != "assistant" for first in firsts)
    if prompt.messages is None:
        text = prompt.text or ""
        messages = prompt_messages(as_dialogue(text) or text) or helpsteer_messages(text)
        messages = messages or [{"role": "user", "content": text}]
        if whole:
            compare(row, prompt, common)
            return common
        if [_key(m) for m in messages] == [_key(m) for m in common[-len(messages) :]]:  # the assistant begins them
            return common
        return [*without_answer(row, messages, [chat[-1] for chat in chats], prompt.continues), *common]
    given = prompt.messages
    if not whole and [_key(m) for m in given] != [_key(m) for m in common[: len(given)]]:
        return [*without_answer(row, given, [chat[-1] for chat in chats], prompt.continues), *common]
    keys, shared = [_key(message) for message in given], [_key(message) for message in common]
    if shared[: len(keys)] == keys or shared[-len(keys) :] == keys:  # the answers repeat the prompt
        return common
    if not shared:  # the dialogues differ from their first message on
        return given
    if keys[-len(shared) :] == shared:
        return given
    if keys[: len(shared)] == shared:  # it goes on with an answer of its own, as a set for fine-tuning does
        if not any(keys == [_key(message) for message in chat] for chat in chats):
            row.notes.changed[OTHER_PROMPT] = None
        return common
    if given[-1]["role"] == common[0]["role"] == "user":  # two versions of a question, not two questions
        row.notes.changed[OTHER_PROMPT] = None
        return common
    return [*given, *common]


def compare(row: Row, prompt: Prompt, messages: list[Message]) -> None:
    """Notes if the prompt's column says something that the dialogues do not say."""
    if prompt.text is not None:
        dialogue = as_dialogue(prompt.text)
        said = parse_dialogue(dialogue) if dialogue else None
        texts = [message["content"] for message in said] if said else [prompt.text]
    else:
        texts = [message["content"] or "" for message in prompt.messages or []]
    within = "\n".join(message["content"] or "" for message in messages)
    if any(text.strip() not in within for text in texts):
        row.notes.changed[OTHER_PROMPT] = None


def _key(message: Message) -> tuple:
    """What makes two messages the same. A blank, a name or a call's id may be in one copy alone."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    said = (message["content"] or "").strip()
    return message["role"], said, repr(calls), message.get("reasoning_content") or message.get("thinking")


def shared_messages(chats: Sequence[Sequence[Message]]) -> int:
    """How many messages all the chats have in common at their beginnings."""
    length = 0
    for messages in zip(*chats, strict=False):
        if any(_key(message) != _key(messages[0]) for message in messages):
            break
        length += 1
    return length
