"""Puts a row's prompt and answers together: texts or messages, answers alone or whole dialogues."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from dpo_ds.data.comparison import Answer, Comparison, LeftOut, Message, Preference, without_unused_answers
from dpo_ds.data.dialogue import ROLES, TURN, as_text, parse_dialogue
from dpo_ds.data.messages import (
    a_kind,
    decoded,
    has_more_than_text,
    is_chat,
    is_message,
    is_part,
    parsed,
    read_content,
    read_messages,
    read_tools,
    shown,
    without_nulls,
)
from dpo_ds.data.prompts import CHATS, QUESTIONS
from dpo_ds.data.ranking import BELOW_MARGIN, MOST, NO_MARGIN_KNOWN, TIED, by_value, number
from dpo_ds.data.rendered import rendered_dialogues, rendered_prompt, require_bare, require_own
from dpo_ds.data.row import Answers, Prompt, Reading, Row

# Kinds in the report that leave a row out.
EMPTY = "a response is empty"
EQUAL = "chosen and rejected are equal"
DIFFER = "the dialogues differ before the last answer"
BEGINNING = "one dialogue is the beginning of the other"
NO_PROMPT = "chosen and rejected share no prompt"
NOT_UNICODE = "a text is not valid Unicode"
TWO_SYSTEMS = "the column system and the dialogue's system message differ"
TWO_ASSISTANTS = "two assistant messages follow each other where the answers begin, or in one"
NOT_TEXT = "the row has images, sound or video; only text can be trained on"
OPEN_CALL = "the prompt ends in a tool call without the tool's answer"
# Kinds that change a row.
REPEATED = "the answers repeat the prompt: it is taken once"
RENDERED = "the texts hold the chat template's own tokens: they are used as they are"
BEGUN = "the prompt ends in the assistant's words: the answers continue them"
EMPTY_PROMPT = "the prompt is empty: the answers are learned without a question"
FRAMED = "the prompt ends like one for another model; the chat template puts its own frame around it"
OTHER_PROMPT = "the prompt's column differs from the dialogues in the answers: the dialogues are used"
EMPTY_OF_SEVERAL = "an empty answer among several is not used"
EQUAL_OF_SEVERAL = "two answers are equal: no pair is made of them"
TAIL = "what follows the assistant's last message is not used"

# Columns that say something about a row. A text in any other column may be its prompt.
ABOUT = re.compile(
    r"(.*_)?(id|ids|index|source|dataset|subset|split|type|category|categories|domain|topic|task|tags?|labels?|lang|"
    r"language|models?|name|url|link|license|date|time|timestamp|scores?|ratings?|rationale|reason|reasoning|feedback|"
    r"critique|comments?|notes?|metadata|meta|info|annotator|hash|status|version|policy|explanation|justification|"
    r"statement|elaboration|weight|margin)"
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SYSTEMS = ("system", "system_prompt", "system_message")


@dataclass
class Parts:
    """A prompt and answers that fit each other."""

    messages: list[Message]
    answers: list[Answer]
    text: str | None
    rendered: bool = False
    implicit: bool = False


def assemble(row: Row, prompt: Prompt | None, answers: Answers, reading: Reading) -> Comparison:
    """The comparison that a row makes. Raises LeftOut if its halves do not fit, or if it compares nothing."""
    if any(row.get(name) for name in MEDIA):
        raise LeftOut(NOT_TEXT)
    sides = [(where, decoded(value)) for where, value in answers.sides]
    texts = [value for _, value in sides if isinstance(value, str)]
    if len(texts) == len(sides):
        if len(texts) == 2 and texts[0] == texts[1]:
            raise LeftOut(EQUAL)
        parts = _from_texts(row, prompt, texts, reading)
    else:
        chats = [_as_chat(row, where, value) for where, value in sides]
        if prompt is not None and prompt.text is not None and _is_rendered(prompt.text, chats, reading):
            parts = _from_texts(row, prompt, [chat[0]["content"] for chat in chats], reading)
        else:
            parts = _from_chats(row, prompt, chats)
    if not any((message["content"] or "").strip() for message in parts.messages if message["role"] != "system"):
        row.notes.changed[EMPTY_PROMPT] = None
    pairs = _pairs(row, parts.answers, answers, reading)
    weight = row.take("weight")
    if weight is not None:
        pairs = [replace(pair, weight=_weight(row, weight)) for pair in pairs]
    if len(pairs) == 1 and row.get("margin") is not None:
        pairs = [replace(pairs[0], margin=number(row.take("margin"), row.called("margin")))]
    if reading.pairs == "above_margin":
        pairs = _above(pairs, reading.min_margin)
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
        changed=[*row.notes.changed],
        unused=[*row.notes.unused, *_unused(row)],
    )
    comparison = without_unused_answers(comparison)
    _require_unicode(comparison)
    return comparison


def _unused(row: Row) -> list[str]:
    return [f"column {name}" for name, value in row.fields.items() if name not in row.used and value is not None]


def _weight(row: Row, value: Any) -> float:
    weight = number(value, row.called("weight"))
    if weight < 1 / MOST:
        found = "0" if weight == 0 else "below 0" if weight < 0 else shown(weight)
        raise LeftOut(f"{row.called('weight')} is {found}; it must be above 0")
    return weight


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


# ----------------------------------------------------------------------------------------------------------- the pairs


def _pairs(row: Row, built: list[Answer], answers: Answers, reading: Reading) -> list[Preference]:
    """The pairs of answers that say something: neither is empty, they differ, and one is better."""
    filled = [n for n, answer in enumerate(built) if not _is_empty(answer)]
    if len(filled) < 2:
        raise LeftOut(EMPTY)
    if len(filled) < len(built):
        row.notes.changed[EMPTY_OF_SEVERAL] = None
    if answers.values is not None:
        found, tied = by_value([answers.values[n] for n in filled], reading.pairs, reading.min_margin)
        pairs = [replace(pair, chosen=filled[pair.chosen], rejected=filled[pair.rejected]) for pair in found]
        if tied:
            row.notes.changed[TIED] = None
    else:
        pairs = [pair for pair in answers.pairs or [] if {pair.chosen, pair.rejected} <= {*filled}]
        if not pairs:
            raise LeftOut(EMPTY)
    differing = [pair for pair in pairs if not _equal(built[pair.chosen], built[pair.rejected])]
    if not differing:
        raise LeftOut(EQUAL)
    if len(differing) < len(pairs):
        row.notes.changed[EQUAL_OF_SEVERAL] = None
    return differing


def _above(pairs: list[Preference], min_margin: float) -> list[Preference]:
    if all(pair.margin is None for pair in pairs):
        raise LeftOut(NO_MARGIN_KNOWN)
    above = [pair for pair in pairs if pair.margin is not None and pair.margin >= min_margin]
    if not above:
        raise LeftOut(BELOW_MARGIN)
    return above


def _is_empty(answer: Answer) -> bool:
    return not any((message["content"] or "").strip() or has_more_than_text(message) for message in answer.messages)


def _equal(one: Answer, other: Answer) -> bool:
    return one.messages == other.messages and one.text == other.text


# --------------------------------------------------------------------------------------------------------------- texts


def _from_texts(row: Row, prompt: Prompt | None, texts: list[str], reading: Reading) -> Parts:
    if reading.markers is not None and (prompt is None or prompt.text is not None):
        given = None if prompt is None else prompt.text
        found = (
            rendered_dialogues(texts, reading.markers)
            if given is None
            else rendered_prompt(given, texts, reading.markers)
        )
        if found is not None:
            text, texts = found
            row.notes.changed[RENDERED] = None
            answers = [Answer([{"role": "assistant", "content": answer}], answer) for answer in texts]
            return Parts([{"role": "user", "content": text}], answers, text, rendered=True)
        require_own(texts[0] if given is None else given, reading.markers)
    if reading.markers is not None:
        for text in texts:
            require_bare(text)
    whole = [_dialogue(text) for text in texts]
    if prompt is not None and any(text.lstrip().startswith("Assistant:") for text in texts):
        whole = [None]
    if all(whole) and prompt is not None and prompt.messages is not None:
        return _from_chats(row, prompt, [parse_dialogue(text or "") or [] for text in whole])
    if all(whole):
        return _from_dialogues(row, prompt, [text for text in whole if text])
    if prompt is None:
        return _common_words(row, texts)
    if prompt.messages is not None:
        return _said(row, prompt.messages, texts, prompt)
    assert prompt.text is not None
    turns = _helpsteer_messages(prompt.text)
    if turns is not None:
        return _said(row, turns, texts, prompt)
    dialogue = _dialogue(prompt.text)
    if reading.markers is not None and dialogue is None and OPENED.search(prompt.text):
        row.notes.changed[FRAMED] = None
    text = prompt.text if dialogue is None else dialogue
    texts = _once(row, text, prompt.text, texts, dialogue is not None)
    if dialogue is not None:
        text, texts = _open_turn(text, texts)
    messages = _dialogue_messages(text) or [{"role": "user", "content": text}]
    before = _before(row, messages)
    if dialogue is not None:
        text = "".join(f"\n\n{ROLES[message['role']]}: {message['content']}" for message in before) + text
        return _text_parts(row, [*before, *messages], text, texts)
    if before or not prompt.continues:
        return _said(row, [*before, *messages], texts, None)
    return _text_parts(row, messages, text, texts)


def _is_rendered(prompt: str, chats: list[list[Message]], reading: Reading) -> bool:
    """Whether a prompt has been through a chat template, and answers given as messages are only text after it."""
    alone = all(len(chat) == 1 and chat[0]["role"] == "assistant" and _is_plain(chat[0]) for chat in chats)
    if reading.markers is None or not alone:
        return False
    found = rendered_prompt(prompt, [], reading.markers)
    if found is None:
        require_own(prompt, reading.markers)
    return found is not None


# How prompts end that were written for models without special tokens: Vicuna's, Alpaca's.
OPENED = re.compile(r"(\bASSISTANT:|#{2,3} ?(Response|Assistant|Answer):?)\s*\Z")
STRIPPED = re.compile(r"\s*(Human|System):")


def _dialogue(text: str) -> str | None:
    """A dialogue in HH's style as HH has it, with a blank line before each turn; None if the text is none."""
    if TURN.match(text):
        return text
    if STRIPPED.match(text) and re.search(r"\n\s*Assistant:", text):
        return "\n\n" + re.sub(r"\n\s*(?=(?:Human|Assistant|System):)", "\n\n", text.lstrip())
    return None


EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant|System)\n")  # between the turns of HelpSteer2's prompts


def _helpsteer_messages(text: str) -> list[Message] | None:
    """The messages of a prompt in HelpSteer2's style, without the open answer at its end; None if it is none."""
    first, *turns = EXTRA_ID.split(text)
    messages = [{"role": "user", "content": first}] + [
        {"role": name.lower(), "content": content} for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages if turns else None


def _dialogue_messages(text: str) -> list[Message] | None:
    """The messages of a dialogue as text. What the assistant has begun at its end stays as it is written."""
    messages = parse_dialogue(text)
    if messages and messages[-1]["role"] == "assistant":
        begun = text[text.rfind("\n\nAssistant:") + len("\n\nAssistant:") :]
        messages[-1] = {"role": "assistant", "content": begun.lstrip()}
    return messages


def _text_parts(row: Row, messages: list[Message], text: str, texts: Sequence[str], implicit: bool = False) -> Parts:
    """A prompt as plain text, which the answers continue as they are."""
    begun = messages[-1]["role"] == "assistant"
    if begun:
        row.notes.changed[BEGUN] = None
    answers = [Answer([{"role": "assistant", "content": answer if begun else answer.strip()}], answer)
               for answer in texts]  # fmt: skip
    return Parts(messages, answers, text, implicit=implicit)


def _said(row: Row, messages: list[Message], texts: Sequence[str], prompt: Prompt | None) -> Parts:
    """A prompt as messages, and answers as text."""
    if prompt is not None:
        messages = [*_before(row, messages), *messages]
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            said = (messages[-1]["content"] or "").strip()
            if said in [text.strip() for text in texts]:  # the dialogue with its answer, and the answers once more
                row.notes.changed[REPEATED] = None
                messages = messages[:-1]
        last = messages[-1]
        if last["role"] == "user":
            texts = _once(row, last["content"], last["content"], list(texts), False)
    chats: list[list[Message]] = [[{"role": "assistant", "content": text}] for text in texts]
    return _chat_parts(row, messages, chats)


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


def _from_dialogues(row: Row, prompt: Prompt | None, texts: list[str]) -> Parts:
    """Whole dialogues as text, in HH's style."""
    ended = [_without_tail(text) for text in texts]
    if ended != texts:
        row.notes.changed[TAIL] = None
        texts = ended
    prompts = [text[: _last_answer(text)] for text in texts]
    if any(found != prompts[0] for found in prompts):
        chats = [parse_dialogue(text) or [] for text in texts]
        shared = _shared(chats)
        turns = [[message["role"] for message in chat[shared:]] for chat in chats]
        if not all(chats) or any(a == b for roles in turns for a, b in pairwise(roles)):
            raise LeftOut(DIFFER)
        return _from_chats(row, prompt, chats)
    start, messages = len(prompts[0]), _dialogue_messages(prompts[0])
    if not messages:  # no answer, or nothing before it
        raise LeftOut(NO_PROMPT)
    if prompt is not None and prompt.text is not None and _dialogue(prompt.text) == prompts[0]:
        row.notes.changed[REPEATED] = None
    elif prompt is not None:
        _compare(row, prompt, messages)
    before = _before(row, messages)
    text = "".join(f"\n\n{ROLES[message['role']]}: {message['content']}" for message in before) + prompts[0]
    return _text_parts(row, [*before, *messages], text, [text[start:] for text in texts])


def _without_tail(text: str) -> str:
    """An HH dialogue as far as its last answer: what a user says after it is not learned."""
    start = _last_answer(text)
    tail = TURN.search(text, start) if start else None
    return text[: tail.start()] if tail else text


def _last_answer(text: str) -> int:
    """Where the last answer of an HH dialogue begins: right after its last "Assistant:", or 0 without one."""
    at = text.rfind("\n\nAssistant:")
    return 0 if at < 0 else at + len("\n\nAssistant:")


def _common_words(row: Row, texts: list[str]) -> Parts:
    """The prompt is what the answers have in common, in whole words. Only if no column might be it."""
    for name in ("prompt", *CHATS, *QUESTIONS):
        if row.has(name) and row.called(name) not in row.used:
            raise LeftOut(f"the field {row.called(name)} is missing")
    for name, value in row.fields.items():
        said = name not in row.used and _says_something(value)
        if said and not ABOUT.fullmatch(name.strip().lower().replace("-", "_")) and row.names.get(name) not in SYSTEMS:
            raise LeftOut(
                f"no column is the prompt, but {name} may be: say so with --columns prompt={name}, or remove it"
            )
    common = os.path.commonprefix(texts)  # noqa: RUF071  (compares character by character, as intended)
    shared = re.sub(r"\s*\S*\Z", "", common)
    if not shared:
        raise LeftOut(NO_PROMPT)
    messages: list[Message] = [{"role": "user", "content": shared}]
    answers = [text[len(shared) :] for text in texts]
    before = _before(row, messages)
    if before:
        parts = _said(row, [*before, *messages], answers, None)
        parts.implicit = True
        return parts
    return _text_parts(row, messages, shared, answers, implicit=True)


def _says_something(value: Any) -> bool:
    """Whether a value may be a prompt: words, a text in a script without blanks between words, or messages."""
    if isinstance(value, str):
        return len(value.split()) > 1 or (len(value.strip()) > 3 and not value.isascii())
    return is_chat(value) or is_message(value)


# --------------------------------------------------------------------------------------------------------------- chats


def _as_chat(row: Row, where: str, value: Any) -> list[Message]:
    """An answer, or a whole dialogue, as messages."""
    if isinstance(value, str):
        dialogue = _dialogue(value)
        return (parse_dialogue(dialogue) if dialogue else None) or [{"role": "assistant", "content": value}]
    if isinstance(value, list) and value and is_part(value[0]):
        return [{"role": "assistant", "content": read_content(value, where)}]
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not value:
        raise LeftOut(f"{where} is {a_kind(value)}")
    return read_messages(value, where, row.notes)


def _from_chats(row: Row, prompt: Prompt | None, chats: list[list[Message]]) -> Parts:
    """Answers as messages: alone, or as whole dialogues that have their prompt in common."""
    if len(chats) == 2 and chats[0] == chats[1]:
        raise LeftOut(EQUAL)
    if not all(chats):
        raise LeftOut(EMPTY)
    shared = _shared(chats)
    if any(len(chat) == shared for chat in chats):
        if min(map(len, chats)) < max(map(len, chats)):
            raise LeftOut(BEGINNING)
        shared -= 1  # all are equal up to their ends: they differ in what is not compared
    common, rest = chats[0][:shared], [chat[shared:] for chat in chats]
    given = _given(row, prompt, [chat[0] for chat in chats], common, chats)
    messages = [*_before(row, given), *given]
    if any(chat[0]["role"] != "assistant" for chat in rest):
        wrong = next(chat[0]["role"] for chat in rest if chat[0]["role"] != "assistant")
        alone = shared == 0 and all(len(chat) == 1 for chat in chats)
        raise LeftOut(f"an answer has the role {wrong}; it must be the assistant's" if alone else DIFFER)
    if not given:  # a system message alone is no question
        raise LeftOut(NO_PROMPT)
    if common and messages[-1]["role"] == "assistant" and messages[-1] == common[-1]:
        raise LeftOut(TWO_ASSISTANTS)
    parts = _chat_parts(row, messages, rest)
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
        messages = _dialogue_messages(_dialogue(text) or text) or _helpsteer_messages(text)
        messages = messages or [{"role": "user", "content": text}]
        if whole:
            _compare(row, prompt, common)
            return common
        if [_key(m) for m in messages] == [_key(m) for m in common[-len(messages) :]]:  # the assistant begins them
            return common
        return [*messages, *common]
    given = prompt.messages
    if not whole and [_key(m) for m in given] != [_key(m) for m in common[: len(given)]]:
        last = given[-1]
        if last["role"] == "assistant" and any([_key(last)] == [_key(m) for m in chat[-1:]] for chat in chats):
            row.notes.changed[REPEATED] = None
            given = given[:-1]
        return [*given, *common]
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


def _compare(row: Row, prompt: Prompt, messages: list[Message]) -> None:
    """Notes if the prompt's column says something that the dialogues do not say."""
    if prompt.text is not None:
        dialogue = _dialogue(prompt.text)
        said = parse_dialogue(dialogue) if dialogue else None
        texts = [message["content"] for message in said] if said else [prompt.text]
    else:
        texts = [message["content"] or "" for message in prompt.messages or []]
    within = "\n".join(message["content"] or "" for message in messages)
    if any(text.strip() not in within for text in texts):
        row.notes.changed[OTHER_PROMPT] = None


def _chat_parts(row: Row, messages: list[Message], chats: list[list[Message]]) -> Parts:
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
        if len(chat) == 1 and isinstance(chat[0]["content"], str) and not begun:
            chat = [{**chat[0], "content": chat[0]["content"].strip()}]
        answers.append(Answer(chat, _answer_text(chat, begun)))
    if not all(_is_plain(message) for message in messages):
        return Parts(messages, answers, None)
    text = as_text(messages)
    if begun:
        text = as_text(messages[:-1]) + " " + messages[-1]["content"]
    return Parts(messages, answers, text)


def _answer_text(chat: list[Message], begun: bool) -> str | None:
    """An answer as plain text; None for one that is more than text."""
    if len(chat) > 1 or not _is_plain(chat[0]):
        return None
    return chat[0]["content"] if begun else f" {chat[0]['content'].strip()}"


def _is_plain(message: Message) -> bool:
    return isinstance(message["content"], str) and message["role"] in ROLES and not has_more_than_text(message)


def _key(message: Message) -> tuple:
    """What makes two messages the same. A blank, a name or a call's id may be in one copy alone."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    said = (message["content"] or "").strip()
    return message["role"], said, repr(calls), message.get("reasoning_content") or message.get("thinking")


def _shared(chats: Sequence[Sequence[Message]]) -> int:
    """How many messages all the chats have in common at their beginnings."""
    length = 0
    for messages in zip(*chats, strict=False):
        if any(_key(message) != _key(messages[0]) for message in messages):
            break
        length += 1
    return length


def _before(row: Row, messages: list[Message]) -> list[Message]:
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
