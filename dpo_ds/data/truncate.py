"""Truncation: how many tokens a prompt and its answers may take, and what a prompt loses first.

keep_question keeps the question that the answers are answers to. An answer may take what --min_prompt_tokens leave of
--max_length; it loses its end. The prompt may take the rest. It loses its oldest turns first, and never the system
message. If the last turn alone is too long, the middle of its longest message goes: a long message mostly has its task
at one of its ends ("Summarise: ...", "... What does he mean?") and material in between.
"""

from dataclasses import dataclass, replace

from dpo_ds.data.comparison import Comparison, Message
from dpo_ds.data.dialogue import TURN
from dpo_ds.data.template import said


@dataclass(frozen=True)
class Room:
    """The most tokens that a prompt may take, and each of its answers."""

    prompt: int
    answer: int


def room(truncation: str, max_length: int, min_prompt_tokens: int | None, prompt: int, answer: int) -> Room:
    """For a prompt and its longest answer of so many tokens. A prompt keeps a token to predict the answer from."""
    if prompt + answer <= max_length:
        return Room(prompt, answer)
    if truncation == "keep_start":
        return Room(max_length, max_length - min(prompt, max_length))
    if truncation == "keep_end":
        least = 1
    else:
        least = max(1, min(prompt, min_prompt_tokens or max_length // 2))
    answer = min(answer, max_length - least)
    return Room(max_length - answer, answer)


def ends(prompt: list[int], length: int, bos: int | None) -> list[int]:
    """A prompt's last tokens. BOS stays, because a model that expects it first does not work without it."""
    head = prompt[:1] if prompt[0] == bos and length > 1 else []
    return head + prompt[len(prompt) - (length - len(head)) :]


def without_middle(prompt: list[int], length: int, part: tuple[int, int]) -> list[int]:
    """A prompt without the middle of a part; of the whole prompt if that part is too short to give so much."""
    gone = len(prompt) - length
    start, stop = part
    if stop - start < gone + 2:
        start, stop = 0, len(prompt)
    first = start + (stop - start - gone) // 2
    return prompt[:first] + prompt[first + gone :]


def with_fewer_turns(row: Comparison, as_text: bool) -> list[Comparison]:
    """The row without its oldest turns: one fewer each time, down to the user's last. A turn begins with the user's.

    as_text: the row's text is what is tokenised, where it has one.
    """
    if row.rendered:
        return []
    if as_text and row.text is not None:
        return [replace(row, text=text) for text in _texts_with_fewer_turns(row.text)]
    messages = row.messages
    system = 1 if messages and messages[0]["role"] == "system" else 0
    starts = [n for n, message in enumerate(messages) if message["role"] == "user" and n > system]
    return [replace(row, messages=messages[:system] + messages[start:]) for start in starts]


def _texts_with_fewer_turns(text: str) -> list[str]:
    """The same for a dialogue as plain text."""
    turns = list(TURN.finditer(text)) if TURN.match(text) else []
    head = text[: turns[1].start()] if len(turns) > 1 and turns[0][1] == "System" else ""
    return [head + text[turn.start() :] for turn in turns if turn[1] == "Human" and turn.start() > len(head)]


def longest_message(messages: list[Message]) -> str:
    """The text of the longest message but the system's."""
    texts = [said(message).strip() for message in messages if message["role"] != "system"]
    return max(texts, key=len, default="")
