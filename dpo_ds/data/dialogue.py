"""Dialogues as plain text, in the style of Anthropic's HH: "\\n\\nHuman: ...\\n\\nAssistant: ...".

Chats for a model without a chat template are written in this style too.
"""

import re
from functools import lru_cache

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")
# Other names of the user's turns and the assistant's.
NAMES = (("User", "Assistant"), ("Human", "Assistant"), ("Human", "AI"), ("User", "AI"), ("User", "Bot"), ("H", "A"))
NAMED = re.compile(r"\s*(?:#{2,3} )?(User|Human|H|System):", re.IGNORECASE)  # begins such a dialogue
STRIPPED = re.compile(r"\s*(Human|System):")
EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant|System)\n")  # between the turns of HelpSteer2's prompts


def parse_dialogue(text: str) -> list[dict] | None:
    """The messages of a dialogue as text, without the open answer at its end; None if it is not one."""
    if not TURN.match(text):
        return None
    parts = TURN.split(text)[1:]
    names = {name: role for role, name in ROLES.items()}
    messages = [
        {"role": names[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def as_text(messages: list[dict]) -> str:
    """A chat as text, open for the next answer. What is more than text, a tool's message for one, only marks a prompt:
    data/held_out.py compares it."""
    turns = [
        f"\n\n{ROLES.get(message['role'], message['role'])}: {message['content']}{message.get('tool_calls') or ''}"
        for message in messages
    ]
    return "".join(turns) + "\n\nAssistant:"


def as_dialogue(text: str) -> str | None:
    """A dialogue in HH's style as HH has it, with a blank line before each turn; None if the text is none."""
    if TURN.match(text):
        return text
    if STRIPPED.match(text) and re.search(r"\n\s*Assistant:", text):
        return "\n\n" + re.sub(r"\n\s*(?=(?:Human|Assistant|System):)", "\n\n", text.lstrip())
    return None


def in_hh_style(text: str) -> tuple[str, str, str] | None:
    """A dialogue whose turns have other names, User: and Assistant: for one, in HH's style; and the names.

    None if the text is no such dialogue. It is one only if it begins with a turn, and if the turns of both names
    alternate at the beginnings of lines: other text may have one line that begins with "A:".
    """
    if not NAMED.match(text) or as_dialogue(text) is not None:
        return None
    for user, assistant in NAMES:
        turns = list(_named(user, assistant).finditer(text))
        names = [turn[1].lower() for turn in turns]
        talk = names[1:] if names[:1] == ["system"] else names
        alternate = all(name == (user, assistant)[n % 2].lower() for n, name in enumerate(talk))
        if len(talk) < 2 or not alternate or text[: turns[0].start()].strip():
            continue
        ends = [*(turn.start() for turn in turns[1:]), len(text)]
        said = [text[turn.end() : end] for turn, end in zip(turns, ends, strict=True)]
        if all(words.strip() for words in said[:-1]):
            roles = {user.lower(): "Human", assistant.lower(): "Assistant", "system": "System"}
            said[:-1] = [words.rstrip() for words in said[:-1]]
            whole = "".join(f"\n\n{roles[name]}:{words}" for name, words in zip(names, said, strict=True))
            return whole, user, assistant
    return None


@lru_cache
def _named(user: str, assistant: str) -> re.Pattern[str]:
    """The beginning of a turn. Single letters are names in capitals alone."""
    case = 0 if len(user) == 1 else re.IGNORECASE
    return re.compile(rf"^[ \t]*(?:#{{2,3}} )?({user}|{assistant}|System):", re.MULTILINE | case)


def prompt_messages(text: str) -> list[dict] | None:
    """The messages of a dialogue as text. What the assistant has begun at its end stays as it is written."""
    messages = parse_dialogue(text)
    if messages and messages[-1]["role"] == "assistant":
        begun = text[text.rfind("\n\nAssistant:") + len("\n\nAssistant:") :]
        messages[-1] = {"role": "assistant", "content": begun.lstrip()}
    return messages


def helpsteer_messages(text: str) -> list[dict] | None:
    """The messages of a prompt in HelpSteer2's style, without the open answer at its end; None if it is none."""
    first, *turns = EXTRA_ID.split(text)
    messages = [{"role": "user", "content": first}] + [
        {"role": name.lower(), "content": content} for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages if turns else None


def without_tail(text: str) -> str:
    """An HH dialogue as far as its last answer: what a user says after it is not learned."""
    start = last_answer(text)
    tail = TURN.search(text, start) if start else None
    return text[: tail.start()] if tail else text


def without_separator(text: str, lines: bool = False) -> str:
    """An answer that continues a text, without the blank that separates the two. An indent is the answer's own.

    lines: blank lines may separate them, too.
    """
    if lines:
        text = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    return text[1:] if text[:1] == " " and text[1:2].strip() else text


def last_answer(text: str) -> int:
    """Where the last answer of an HH dialogue begins: right after its last "Assistant:", or 0 without one."""
    at = text.rfind("\n\nAssistant:")
    return 0 if at < 0 else at + len("\n\nAssistant:")
