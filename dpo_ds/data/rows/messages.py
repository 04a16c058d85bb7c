"""Chat messages as data sets write them, brought to what chat templates take: role and content, tool calls, reasoning.

What cannot be read raises LeftOut with the field, the message, the key and what was found there.
"""

import ast
import json
import math
from dataclasses import dataclass, field
from typing import Any

from dpo_ds.data.comparison import LeftOut, Message

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory's: an assistant's message whose text is the call as JSON
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
# What chat templates read beside role and content. Other keys (id, timestamp, ...) are reported as unused.
TEMPLATE_KEYS = (
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tools",
    "documents",
)
TURNS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))  # the keys of a turn as one object


@dataclass
class Notes:
    """What is said about a row in the report: each kind once, in the order in which it was met."""

    changed: dict[str, None] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    spare_answers: int = 0  # of several, that no pair has


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def is_part(value: Any) -> bool:
    """Whether a value is one part of a message's content, such as {"type": "text", "text": "Hi"}."""
    return isinstance(value, dict) and isinstance(value.get("type"), str) and not is_message(value)


def is_turn(value: Any) -> bool:
    """Whether a value is a question and its answer as one object, such as {"human": "Hi", "assistant": "Hello"}."""
    return isinstance(value, dict) and any({*keys} <= {*value} for keys in TURNS)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, of turns, or of the parts of one message."""
    return isinstance(value, list) and bool(value) and (is_turn(value[0]) or is_message(value[0]) or is_part(value[0]))


def decoded(value: Any) -> Any:
    """A text that holds messages as JSON, or as Python writes them, becomes these messages. All else stays as it is:
    an answer may well be JSON. Messages as an object of lists, as `datasets` has its sequences, become a list."""
    if isinstance(value, dict) and any(isinstance(value.get(key), list) for key in ROLE_KEYS):
        return unzipped(value)
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    found = parsed(value)
    messages = found if isinstance(found, list) else [found]
    plainly = all(
        is_message(message)
        and any(str(message.get(key)).strip().lower() in {*ROLES, *CALL_ROLES} for key in ROLE_KEYS)
        and any(key in message for key in (*CONTENT_KEYS, "tool_calls"))
        for message in messages
    )
    return found if messages and plainly else value


def unzipped(value: Any) -> Any:
    """A list of objects, if a value is one object of lists of equal length; else the value as it is."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if not lists or any(not isinstance(found, list) or len(found) != len(lists[0]) for found in lists):
        return value
    return [dict(zip(value, entries, strict=True)) for entries in zip(*lists, strict=True)]


def parsed(text: str) -> Any:
    """What a text says as JSON or as a Python literal; the text itself if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # "[[[[[..." is an answer of a model that repeats itself
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a TypeError: {{1}, {2}}
        return text


def read_messages(value: Any, where: str, notes: Notes) -> list[Message]:
    """Messages from a list of them, from one message, or from the parts of one message of the user's or assistant's."""
    if is_message(value):
        value = [value]
    if not isinstance(value, list):
        raise LeftOut(f"{where} is {a_kind(value)}; it must be text or messages")
    if value and is_turn(value[0]):
        value = _from_turns(value, where)
    return [_read_message(message, f"message {n}" if n < 10 else "a message after the ninth", where, notes)
            for n, message in enumerate(value, 1)]  # fmt: skip


def _from_turns(turns: list, where: str) -> list[dict]:
    messages = []
    for turn in turns:
        keys = next((keys for keys in TURNS if isinstance(turn, dict) and {*keys} <= {*turn}), None)
        if keys is None:
            raise LeftOut(f"a turn of {where} is {a_kind(turn)}; the others hold a question and its answer")
        messages += [
            {"role": role, "content": turn[key]}
            for role, key in zip(("user", "assistant"), keys, strict=True)
            if turn[key] is not None
        ]
    return messages


def _read_message(message: Any, which: str, where: str, notes: Notes) -> Message:
    if not isinstance(message, dict):
        raise LeftOut(f"{which} of {where} is {a_kind(message)}; it must be an object with role and content")
    role_key = next((key for key in ROLE_KEYS if message.get(key) is not None), None)
    if role_key is None:
        raise LeftOut(f"{which} of {where} has no role")
    named = message[role_key]
    role = named.strip().lower() if isinstance(named, str) else ""
    if role not in ROLES and role not in CALL_ROLES:
        raise LeftOut(f"{which} of {where} has the role {shown(named)}; roles are system, user, assistant, tool")
    content_key = next((key for key in CONTENT_KEYS if message.get(key) is not None), None)
    content = read_content(message[content_key], f"{which} of {where}") if content_key else None
    read: Message = {"role": ROLES.get(role, "assistant"), "content": content}
    if role in CALL_ROLES:
        read["tool_calls"] = _tool_calls(_call_as_json(content, role, f"{which} of {where}"), f"{which} of {where}")
        read["content"] = None
    for key, found in message.items():
        if found is None or key in (role_key, content_key, *ROLE_KEYS, *CONTENT_KEYS):
            continue
        if key == "tool_calls":
            if found:
                read[key] = _tool_calls(found, f"{which} of {where}")
        elif key == "function_call":  # OpenAI's older name of a single call
            read["tool_calls"] = _tool_calls([found], f"{which} of {where}")
        elif key == "tools":
            read[key] = read_tools(found, f"tools in {which} of {where}")
        elif key in TEMPLATE_KEYS:
            read[key] = without_nulls(found)
        else:
            notes.unused[f"message key {key}"] = None
    if read["content"] is None and not (read["role"] == "assistant" and has_more_than_text(read)):
        raise LeftOut(f"{which} of {where} ({read['role']}) has no content")
    return read


def has_more_than_text(message: Message) -> bool:
    """Whether a message says something beside its content: a call, or reasoning."""
    return any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))


def read_content(value: Any, where: str) -> str:
    """A message's text. Parts of text are joined; parts of another type cannot be trained on."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if not is_part(part):
            raise LeftOut(f"the content of {where} is {a_kind(value)}; it must be text or parts of text")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise LeftOut(f"{where} holds a part of type {shown(part['type'])}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


# ---------------------------------------------------------------------------------------------------------------- tools


def _call_as_json(text: str | None, role: str, where: str) -> list:
    found = parsed(text or "")
    if isinstance(found, dict):
        return [found]
    if isinstance(found, list):
        return found
    raise LeftOut(f"{where} has the role {role}, but its text is not a call as JSON")


def _tool_calls(value: Any, where: str) -> list[dict]:
    """Calls as templates take them: {"type": "function", "function": {"name": ..., "arguments": {...}}}, perhaps id."""
    calls = parsed(value) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise LeftOut(f"tool_calls of {where} is {a_kind(value)}; it must be a list of calls")
    read = []
    for call in calls:
        call = parsed(call) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        function = parsed(function) if isinstance(function, str) else function
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LeftOut(f"a call in tool_calls of {where} names no function")
        arguments = function.get("arguments", function.get("parameters"))
        # APIs give the arguments as JSON text. Templates write JSON themselves, so text would be quoted twice.
        arguments = parsed(arguments) if isinstance(arguments, str) else without_nulls(arguments)
        read.append({
            **({"id": call["id"]} if isinstance(call.get("id"), str) else {}),
            "type": "function",
            "function": {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments},
        })  # fmt: skip
    return read


def read_tools(value: Any, where: str) -> list | None:
    """The tools that a chat may use, as JSON schemas; None if there are none."""
    tools = parsed(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list):
        tools = [tools]
    read = []
    for tool in tools:
        described = parsed(tool) if isinstance(tool, str) else without_nulls(tool)
        if not isinstance(described, dict) or not isinstance(described.get("function", {}), dict):
            raise LeftOut(f"{where} is {a_kind(value)}; it must be a list of functions as JSON schemas")
        bare = "function" not in described and "name" in described
        read.append({"type": "function", "function": described} if bare else described)
    return read


def without_nulls(value: Any) -> Any:
    """A value without the null entries of objects: `datasets` fills in every key that another row has."""
    if isinstance(value, dict):
        return {key: without_nulls(found) for key, found in value.items() if found is not None}
    if isinstance(value, list):
        return [without_nulls(found) for found in value]
    return value


# ------------------------------------------------------------------------------------------------------- what was found


def a_kind(value: Any) -> str:
    """What a value is, in the words of the report."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        if not value:
            return "an empty list"
        kinds = {str: "texts", dict: "objects", list: "lists", int: "numbers", float: "numbers"}
        return f"a list of {kinds.get(type(value[0]), 'other values')}"
    return f"of the type {type(value).__name__}"


def shown(value: Any, most: int = 24) -> str:
    """A value that was found, if it is short; a text in quotes."""
    if isinstance(value, str):
        text = " ".join(value.split())
        return f'"{text}"' if 0 < len(text) <= most else ("an empty text" if not text else "a long text")
    if isinstance(value, (bool, int, float)):
        return str(value) if len(str(value)) <= most else "a long number"
    return a_kind(value)
