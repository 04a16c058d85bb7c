"""Dialogues as plain text, in the style of Anthropic's HH: "\\n\\nHuman: ...\\n\\nAssistant: ...".

Chats for a model without a chat template are written in this style too.
"""

import re

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")
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


def last_answer(text: str) -> int:
    """Where the last answer of an HH dialogue begins: right after its last "Assistant:", or 0 without one."""
    at = text.rfind("\n\nAssistant:")
    return 0 if at < 0 else at + len("\n\nAssistant:")
