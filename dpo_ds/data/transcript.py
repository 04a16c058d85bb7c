"""A comparison as text: the prompt, every answer after it, and where in an answer the assistant speaks.

There are three ways to write it: as plain text; as it is, where the data hold text that has been through a template
already; and by the chat template, in data/chat.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dpo_ds.data.comparison import Answer, Comparison, LeftOut, Message
from dpo_ds.data.dialogue import ROLES, TURN, as_text
from dpo_ds.data.template import REASONING, ChatTemplate, Span, said

# Kinds in the report. The first changes a row, the other leaves it out.
TRAILING = "messages after the assistant's last one were left off: nothing is learned there"
NO_ASSISTANT = "an answer has no message of the assistant's"


@dataclass
class Transcript:
    prompt: str
    wholes: list[str] = field(default_factory=list)  # per answer: the prompt and the answer
    spans: list[list[Span] | None] = field(default_factory=list)  # in each whole; None: all that follows the prompt
    changed: list[str] = field(default_factory=list)  # kinds for the report
    unused: dict[str, None] = field(default_factory=dict)  # for the report: keys of messages that are not written

    def note(self, kind: str) -> None:
        if kind not in self.changed:
            self.changed.append(kind)

    def add(self, text: str, spans: list[Span] | None) -> None:
        """Adds an answer, as far as the assistant's last part. The spans are places in its text."""
        if spans is not None:
            if not spans:
                raise LeftOut(NO_ASSISTANT)
            if text[spans[-1][1] :].strip():
                self.note(TRAILING)
            text = text[: spans[-1][1]]
            spans = [(len(self.prompt) + start, len(self.prompt) + stop) for start, stop in spans]
        self.wholes.append(self.prompt + text)
        self.spans.append(spans)


# ------------------------------------------------------------------------------------------------------ already written


def write_rendered(row: Comparison, template: ChatTemplate | None) -> Transcript:
    """Texts that hold the template's own tokens stay as they are. An answer's end of turn is added if it is missing."""
    transcript = Transcript(row.text or "")
    if row.tools:
        transcript.note("text that is rendered already ignores tools")
    _note_unread(row, transcript, "text that is rendered already")
    for answer in row.answers:
        text, spans = (answer.text or "").rstrip(), None
        if template:
            frame = template.frame(row)
            ends = [end for end in (frame.end.strip(), str(template.tokenizer.eos_token)) if end]
            text = text if text.endswith(tuple(ends)) else text + frame.end
            if frame.end and frame.opening in text:
                spans = list(_between(text, frame.opening, frame.end))
        transcript.add(text, spans)
    return transcript


def _between(text: str, opening: str, end: str) -> Iterator[Span]:
    """The assistant's parts of a text: from its start, or after an opening, to the end of the turn."""
    at = 0
    while at >= 0:
        found = text.find(end, at)
        stop = found + len(end) if found >= 0 else len(text)
        yield at, stop
        following = text.find(opening, stop)
        at = following + len(opening) if following >= 0 else -1


# ----------------------------------------------------------------------------------------------------------- plain text


def write_plain(row: Comparison) -> Transcript:
    """Plain text: the data's own, or the messages in the style of data/dialogue.py."""
    continued = continues(row)
    if row.text is None:
        _check_plain(row.messages, "of the prompt")
        context = row.messages[:-1] if continued else row.messages
        prompt = as_text([{**message, "content": said(message)} for message in context])
        if continued:
            prompt += f" {said(row.messages[-1]).lstrip()}"
        elif not all_open(row.answers):
            prompt = prompt.removesuffix("\n\nAssistant:")
    else:
        prompt = row.text
    transcript = Transcript(prompt)
    if row.tools:
        transcript.note("plain text has no place for tools")
    _note_unread(row, transcript, "plain text")
    for answer in row.answers:
        text = answer.text
        if text is None:
            _check_plain(answer.messages, "of an answer")
            text = _plain_answer(answer.messages, continued)
        transcript.add(text, _spoken(text) if len(answer.messages) > 1 else None)
    return transcript


def _note_unread(row: Comparison, transcript: Transcript, what: str) -> None:
    """Notes what only a chat template reads."""
    for name in row.template_kwargs:
        transcript.note(f"{what} does not read {name} of chat_template_kwargs")
    messages = [*row.messages, *(message for answer in row.answers for message in answer.messages)]
    for key in {key: None for message in messages for key in message}:
        if key not in ("role", "content", "tool_calls", *REASONING):
            transcript.unused[unused_key(key)] = None


def unused_key(key: str) -> str:
    """A message's key as the report names it."""
    return f"message key {key}"


def _check_plain(messages: list[Message], whose: str) -> None:
    for message in messages:
        if message["role"] not in ROLES:
            raise LeftOut(f"plain text has no role {message['role']}")
        for key in ("tool_calls", *REASONING):
            if message.get(key):
                raise LeftOut(f"plain text has no place for {key} {whose}")


def _plain_answer(messages: list[Message], continued: bool) -> str:
    first, *others = messages
    if first["role"] != "assistant":
        text, others = "", messages
    else:
        text = said(first).rstrip() if continued else f" {said(first).strip()}"
    return text + "".join(f"\n\n{ROLES[message['role']]}: {said(message).strip()}" for message in others)


def _spoken(text: str) -> list[Span]:
    """The assistant's parts of a plain text that begins in one of them."""
    turns = list(TURN.finditer(text))
    starts = [0, *(turn.end() for turn in turns)]
    ends = [*(turn.start() for turn in turns), len(text)]
    names = ["Assistant", *(turn[1] for turn in turns)]
    return [(a, b) for a, b, name in zip(starts, ends, names, strict=True) if name == "Assistant" and a < b]


def continues(row: Comparison) -> bool:
    """Whether the answers go on with a message of the assistant's that the prompt ends with."""
    last = row.messages[-1] if row.messages else {}
    return last.get("role") == "assistant" and not last.get("tool_calls") and all_open(row.answers)


def all_open(answers: list[Answer]) -> bool:
    return all(answer.messages[0]["role"] == "assistant" for answer in answers)
