"""A comparison as text by the chat template, with everything that it says found in what was rendered.

What a template drops of an answer is written from the answer's own text, or the row is left out. What it drops of the
prompt is counted; the row is left out where a turn of the dialogue is gone.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dpo_ds.data.comparison import Comparison, LeftOut, Message
from dpo_ds.data.template import REASONING, ChatTemplate, Span, missing, parsed, said, shows, shows_tools
from dpo_ds.data.transcript import NO_ASSISTANT, TRAILING, Transcript, all_open, continues, unused_key

# Kinds in the report, of rows that are changed and of rows that are left out.
FOLDED = "the template takes no system role: its message went into the first user's"
REWRITTEN = "the template writes the answer in place of the end of its generation prompt: the boundary was moved back"
SHORTENED = "the chat template drops part of an earlier answer"
DROPPED = "the chat template drops part of the answer"
BLANKS = "the chat template drops blanks of an answer, such as the indent of its first line"
UNSTABLE = "the chat template rewrites the turns before an answer when the dialogue goes on"

WRITTEN = ("role", "content", "tool_calls", *REASONING)  # keys of a message that are looked for in what was rendered


def write_chat(row: Comparison, template: ChatTemplate) -> Transcript:
    """By the chat template. Raises LeftOut if it refuses the row or drops a part of it that is learned."""
    reason = None
    for folded in (False, True):
        if folded and [message["role"] for message in row.messages[:2]] != ["system", "user"]:
            break
        reason = None
        for form in _forms(row):
            tried = _changed(row, form)
            tried = replace(tried, messages=_folded(tried.messages)) if folded else tried
            try:
                transcript = _Writer(tried, template).write()
            except LeftOut as refusal:
                reason = reason or refusal
                continue
            if folded:
                transcript.changed.insert(0, FOLDED)
            return transcript
    assert reason is not None
    raise reason


def _folded(messages: list[Message]) -> list[Message]:
    """The system message goes into the first user's: some templates refuse that role, some drop it."""
    system, first, *others = messages
    return [{**first, "content": f"{said(system)}\n\n{said(first)}"}, *others]


def _forms(row: Comparison) -> Iterator[Callable[[Message], Message]]:
    """The ways to give a message to a template. They differ only for tool calls, where templates do."""
    yield _plain_form
    messages = [*row.messages, *(message for answer in row.answers for message in answer.messages)]
    if any(message.get("tool_calls") for message in messages):
        yield lambda message: _plain_form(message, null="absent")
        yield lambda message: _plain_form(message, arguments="text")
        yield lambda message: _plain_form(message, null="absent", arguments="text")


def _plain_form(message: Message, null: str = "empty", arguments: str = "object") -> Message:
    """Without keys that hold nothing. A content of null is empty text; a tool call's arguments are an object."""
    kept = {key: value for key, value in message.items() if key == "role" or value not in (None, [], {})}
    if not kept.get("content"):
        kept.pop("content", None)
        if null == "empty":
            kept["content"] = ""
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_called(call, arguments) for call in kept["tool_calls"]]
    return kept


def _called(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    inner = call.get("function", call)
    value = parsed(inner.get("arguments", {}))
    if arguments == "text" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    inner = {**inner, "arguments": value}
    return {**call, "function": inner} if "function" in call else inner


def _changed(row: Comparison, form: Callable[[Message], Message]) -> Comparison:
    answers = [replace(answer, messages=[form(message) for message in answer.messages]) for answer in row.answers]
    return replace(row, messages=[form(message) for message in row.messages], answers=answers)


class _Writer:
    """Writes one row by the template and looks for everything in what was written."""

    def __init__(self, row: Comparison, template: ChatTemplate):
        self.row, self.template, self.frame = row, template, template.frame(row)
        self.context = row.messages[:-1] if continues(row) else row.messages
        self.begun = said(row.messages[-1]).lstrip() if continues(row) else ""
        self.open = all_open(row.answers)
        self.opened = template.render(self.context, row, open_turn=True)
        self._closed: str | None = None
        self.prompt = self.opened if self.open else self.closed
        self.transcript = Transcript(self.prompt)

    @property
    def closed(self) -> str:
        """The prompt without the generation prompt. It is rendered only where it is needed."""
        if self._closed is None:
            self._closed = self.template.closed(self.context, self.row, self.opened)
        return self._closed

    def write(self) -> Transcript:
        self._check_prompt()
        for answer in self.row.answers:
            messages = self._learnable(answer.messages)
            if len(messages) == 1 and self.open:
                self.transcript.wholes.append(self._single(messages[0]))
                self.transcript.spans.append(None)
            else:
                whole, spans = self._several(messages)
                self.transcript.wholes.append(whole)
                self.transcript.spans.append(spans)
        return self.transcript

    # ---------------------------------------------------------------------------------------------------- the prompt

    def _check_prompt(self) -> None:
        """What a model reads before it answers must be there; what the template's makers meant to be dropped may be."""
        for message in self.context:
            key, role = missing(message, self.prompt), message["role"]
            if key is None:
                pass
            elif key == "content" and role == "assistant" and shows(self.prompt, _last_line(message)):
                self.transcript.note(SHORTENED)  # its reasoning: no template keeps that of earlier turns
            elif key in REASONING:
                self.transcript.note(f"the chat template drops {key} of an earlier answer")
            elif key == "content":
                raise LeftOut(f"the chat template drops a message of the prompt (role {role})")
            else:
                raise LeftOut(f"the chat template ignores {key} of the prompt")
        self._note_unused(self.context, self.opened, self.context, open_turn=True)
        calls = any(message.get("tool_calls") for message in self.context)
        if calls and self._same_without(messages=[_without_calls(message) for message in self.context]):
            raise LeftOut("the chat template ignores tool_calls of the prompt")
        if self.row.tools and (not shows_tools(self.prompt, self.row.tools) or self._same_without(tools=None)):
            self.transcript.note("the chat template ignores tools")
        for name in self.row.template_kwargs:
            if not self.template.reads(name):
                self.transcript.note(f"the chat template does not read {name} of chat_template_kwargs")

    def _same_without(self, **change: Any) -> bool:
        """Whether the prompt is the same with another context or other tools."""
        row = replace(self.row, **{"messages": self.context, **change})
        try:
            return self.template.render(row.messages, row, open_turn=True) == self.opened
        except LeftOut:
            return False

    def _note_unused(self, messages: list[Message], rendered: str, own: list[Message], open_turn: bool = False) -> None:
        """Notes the keys of the `own` messages without which the template writes all the same.

        A tool has a name, too: that the word stands in a template does not say that it reads a message's.
        """
        keys = {key: None for message in own for key in message if key not in WRITTEN}
        for key in keys:
            without = [{name: value for name, value in message.items() if name != key} for message in messages]
            with contextlib.suppress(LeftOut):  # it needs the key
                if self.template.render(without, self.row, open_turn) == rendered:
                    self.transcript.unused[unused_key(key)] = None

    def _learnable(self, messages: list[Message]) -> list[Message]:
        """An answer's messages as far as the assistant's last one, without ends of turns in the assistant's texts."""
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise LeftOut(NO_ASSISTANT)
        if last + 1 < len(messages):
            self.transcript.note(TRAILING)
        first, *others = messages[: last + 1]
        if self.begun:
            first = {**first, "content": self.begun + said(first)}
        return [self._unended(message) for message in (first, *others)]

    def _unended(self, message: Message) -> Message:
        if message["role"] != "assistant" or not isinstance(message.get("content"), str):
            return message
        return {**message, "content": self.template.stripped(message["content"], self.row)}

    # ----------------------------------------------------------------------------------------- an answer of one message

    def _single(self, message: Message) -> str:
        """The prompt and the answer after it."""
        content = said(message)
        rendered = self.template.render([*self.context, message], self.row)
        self._note_unused([*self.context, message], rendered, [message])
        whole = self.template.ended(rendered, self.row)
        if whole == f"{self.prompt}{self.frame.lead}{content}{self.frame.end}":
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            gone = missing(others, whole[len(self.closed) :]) if others else None
        elif whole.startswith(self.prompt) or whole.startswith(self.closed):
            gone = missing(message, whole[len(self.closed) :])
        else:
            # Mistral's template writes the system message before the last user message only if no answer follows.
            gone = "content"
        written = whole[len(self.closed) :]
        if content not in written and content.strip() in written:
            self.transcript.note(BLANKS)
        if gone not in (None, "content"):
            raise LeftOut(f"the chat template ignores {gone} of an answer")
        if gone:
            whole = self._built(message)
        if self.begun:
            self._move_boundary(whole, message)
        elif not whole.startswith(self.prompt):
            self.transcript.note(REWRITTEN)
        return whole

    def _built(self, message: Message) -> str:
        """The prompt, the answer's own text and the end of turn, where the template does not write them so."""
        if any(message.get(key) for key in (*REASONING, "tool_calls")):
            raise LeftOut(DROPPED)
        lead = self.frame.lead or ""
        # A lead that is more than blanks is the template's own beginning of an answer, which this answer does not have.
        return self.prompt + ("" if lead.strip() else lead) + self._unbegun(said(message)) + self.frame.end

    def _unbegun(self, content: str) -> str:
        """The answer without a beginning that the generation prompt has written: R1's "<think>\\n"."""
        begun = self.frame.begun
        if not begun.strip() or not content.startswith(begun.strip()):
            return content
        content = content.removeprefix(begun.strip())
        blanks = begun[len(begun.rstrip()) :]
        return content.removeprefix(blanks) if content.startswith(blanks) else content.lstrip()

    def _move_boundary(self, whole: str, message: Message) -> None:
        """The prompt of answers that continue a begun one ends where they continue it."""
        follows = whole.startswith(self.prompt)
        before = len(self.prompt) if follows else len(self.closed) + len(self.frame.header)
        at = whole.find(self._unbegun(said(message)), before)
        if at < 0:
            raise LeftOut(DROPPED)
        self.transcript.prompt = whole[: at + len(self._unbegun(self.begun))]

    # ------------------------------------------------------------------------------------ an answer of several messages

    def _several(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The prompt and the dialogue after it, and where the assistant speaks in it."""
        conversation = [*self.context, *messages]
        rendered = self.template.render(conversation, self.row)
        self._note_unused(conversation, rendered, messages)
        whole = self.template.ended(rendered, self.row)
        if not whole.startswith(self.closed):
            raise LeftOut(UNSTABLE)
        if not whole.startswith(self.prompt) and not self.begun:
            self.transcript.note(REWRITTEN)
        for message in messages:
            if message["role"] != "assistant" and missing(message, whole[len(self.closed) :]):
                raise LeftOut(f"the chat template drops a message of an answer (role {message['role']})")
        spans = self._marked(conversation, whole, rendered) or self._turns(conversation, whole)
        if self.begun:
            self._move_boundary(whole[: spans[0][1]], messages[0])
        return whole, spans

    def _marked(self, conversation: list[Message], whole: str, rendered: str) -> list[Span]:
        """The parts after the prompt that the template marks as the assistant's; none if they miss some of its text."""
        text, marks = self.template.marked(conversation, self.row) or ("", [])
        spans = [self._with_end(whole, a, b) for a, b in marks if b > len(self.closed)]
        marked = "".join(whole[a:b] for a, b in spans)
        later = [message for message in conversation[len(self.context) :] if message["role"] == "assistant"]
        return [] if text != rendered or any(missing(message, marked) for message in later) else spans

    def _turns(self, conversation: list[Message], whole: str) -> list[Span]:
        """The assistant's turns after the prompt, each as far as its end of turn, found by rendering up to each."""
        spans = []
        for n in range(len(self.context), len(conversation)):
            message = conversation[n]
            if message["role"] != "assistant":
                continue
            start = self._start(conversation[:n], whole)
            stop = self._stop(conversation[: n + 1], whole, start)
            if gone := missing(message, whole[start:stop]):
                raise LeftOut(DROPPED if gone == "content" else f"the chat template ignores {gone} of an answer")
            following = said(conversation[n + 1]).strip() if n + 1 < len(conversation) else ""
            if following and following in whole[start:stop] and following not in said(message):
                raise LeftOut(UNSTABLE)  # it does not end with the token that ends others, and the next turn is in it
            spans.append((start, stop))
        return spans

    def _start(self, before: list[Message], whole: str) -> int:
        """Where an answer begins that follows these messages."""
        opened = self.template.render(before, self.row, open_turn=True)
        if whole.startswith(opened):
            return len(opened)
        headed = self.template.closed(before, self.row, opened) + self.frame.header
        if whole.startswith(headed):
            return len(headed)
        raise LeftOut(UNSTABLE)

    def _stop(self, messages: list[Message], whole: str, start: int) -> int:
        """Where the answer that these messages end with, and that begins at `start`, ends in the whole."""
        shorter = self.template.ended(self.template.render(messages, self.row), self.row)
        if whole.startswith(shorter):
            return len(shorter)
        # Qwen3's template, for one, writes an answer otherwise if the dialogue goes on.
        end = self.frame.end or said(messages[-1])
        found = whole.find(end, start)
        return found + len(end) if found >= 0 else len(whole)

    def _with_end(self, whole: str, start: int, stop: int) -> Span:
        """A marked part with its end of turn, which some marks leave out, and no blanks after it, as some have."""
        text, end = whole[start:stop].rstrip(), self.frame.end
        if end and not text.endswith(end) and whole.startswith(end, start + len(text)):
            return start, start + len(text) + len(end)
        return start, start + len(text) if text.endswith(end) else min(stop, len(whole))


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _last_line(message: Message) -> str:
    return said(message).strip().rpartition("\n")[2]
