"""Dialogues as plain text, in the style of Anthropic's HH: "\\n\\nHuman: ...\\n\\nAssistant: ...".

Chats for a model without a chat template are written in this style too.
"""

import re

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
TURN = re.compile(r"\n\n(Human|Assistant|System):")


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
