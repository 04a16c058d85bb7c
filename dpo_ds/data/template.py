"""A tokenizer's chat template: rendering, what it writes around an answer, and what it leaves out.

A template is a program that came with the model. It may refuse a dialogue, ignore a key of a message, or drop a part of
a text. So nothing is taken for granted: `missing` looks for what was given in what was rendered.
"""

import inspect
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dpo_ds.data.comparison import Comparison, LeftOut, Markers, Message
from dpo_ds.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # where a part of a text begins and ends, in characters

# Kinds in the report; the template's own message follows the first.
REFUSED = "the chat template refuses the dialogue"
RESERVED = "chat_template_kwargs set a name that is not the template's own"
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys for what a model thinks before it answers


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer, seen with an answer of ours."""

    opening: str  # before every answer of the assistant's: the end of the text after which an answer is generated
    closing: str  # after what a user says, before the opening
    header: str  # between the turn before and an answer in the middle of a dialogue
    lead: str | None  # between the generation prompt and the answer; None: no rendered answer follows that prompt
    begun: str  # the end of the generation prompt, where a rendered answer stands in its place: R1's "<think>\n"
    suffix: str  # after an answer
    end: str  # the part of the suffix that belongs to the answer: as far as the token that ends a turn


class ChatTemplate:
    """Raises UserError if the template refuses a plain dialogue."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", variables: dict[str, Any], date: str | None):
        self.tokenizer, self.variables, self.date = tokenizer, variables, date
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents", "kwargs"}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Some tokenizers list runs of blanks as added tokens; those do not end a turn.
        self.special_tokens = frozenset(token for token in added if token.strip())
        self._frames: dict[str, Frame] = {}
        self._read: dict[str, bool] = {}  # what `reads` found
        self._sources = {tools: self._dated(tools) for tools in (False, True)}
        if wrong := sorted(self._reserved & set(variables)):
            raise UserError(f"--chat_template_kwargs sets {wrong[0]}, which is not a variable of the template's own")
        if unread := [name for name in variables if not self.reads(name)]:
            raise UserError(f"--chat_template_kwargs sets {unread[0]}, but the model's chat template does not read it")
        try:
            self.frame(Comparison([], [], []))
        except LeftOut as refusal:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} takes no plain dialogue "
                f"({one_line(refusal.__cause__ or refusal)}); use --chat_template none"
            ) from refusal

    def _dated(self, tools: bool) -> str:
        """The template's text. The date that it would ask for is written into it."""
        text = self.tokenizer.get_chat_template(None, [] if tools else None)
        if self.date is None:
            return text
        day = datetime.fromisoformat(self.date)
        return DATE.sub(lambda call: json.dumps(day.strftime(call[2])), text)

    def reads(self, name: str) -> bool:
        """Whether the name of a variable stands in the template."""
        if name not in self._read:
            word = re.compile(rf"\b{re.escape(name)}\b")
            self._read[name] = any(word.search(source) for source in self._sources.values())
        return self._read[name]

    # ------------------------------------------------------------------------------------------------------ rendering

    def render(self, messages: list[Message], row: Comparison, open_turn: bool = False) -> str:
        """The messages as text, with the row's tools and variables; open_turn: an answer can be generated after it.

        Raises LeftOut with the template's own message if it fails.
        """
        variables = self._of(row)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=row.tools or None,
                chat_template=self._sources[bool(row.tools)] if self.date else None,
                tokenize=False,
                add_generation_prompt=open_turn,
                **variables,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise LeftOut(f"{REFUSED}: {one_line(error, 100)}") from error
        assert isinstance(text, str)  # it returns tokens only where it is asked for them
        return text

    def _of(self, row: Comparison) -> dict[str, Any]:
        if self._reserved & set(row.template_kwargs):
            raise LeftOut(RESERVED)
        return {**self.variables, **row.template_kwargs}

    def closed(self, messages: list[Message], row: Comparison, opened: str) -> str:
        """The messages as text, as far as it agrees with the text that is open for an answer.

        Phi-3's template, for one, ends a dialogue that is not open with EOS.
        """
        text = self.render(messages, row)
        for candidate in (text, text.removesuffix(str(self.tokenizer.eos_token))):
            if opened.startswith(candidate):
                return candidate
        return os.path.commonprefix([text, opened])  # noqa: RUF071  (character by character, as intended)

    def marked(self, messages: list[Message], row: Comparison) -> tuple[str, list[Span]] | None:
        """The messages as text, and the parts inside {% generation %}; None if the template has no such marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._sources[bool(row.tools)]
        if not GENERATION.search(source):
            return None
        try:
            rendered: Any = render_jinja_template(  # its annotation is wrong: texts, and the marked parts of each
                [messages],
                tools=row.tools or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._of(row)},
            )
        except Exception as error:
            raise LeftOut(f"{REFUSED}: {one_line(error, 100)}") from error
        texts, spans = rendered
        return texts[0], spans[0]

    # ------------------------------------------------------------------------------------------- what stands around it

    def frame(self, row: Comparison) -> Frame:
        """The frame of an answer, with the row's variables and without its tools."""
        key = json.dumps(row.template_kwargs, sort_keys=True, default=str)
        if key not in self._frames:
            self._frames[key] = self._seen(Comparison([], [], [], template_kwargs=row.template_kwargs))
        return self._frames[key]

    def _seen(self, row: Comparison) -> Frame:
        question, answer = "dpo ds question", "dpo ds answer"
        asked = [{"role": "user", "content": question}]
        answered = [*asked, {"role": "assistant", "content": answer}]
        opened = self.render(asked, row, open_turn=True)
        closed, rendered = self.closed(asked, row, opened), self.render(answered, row)
        at = rendered.rfind(answer)
        suffix = rendered[at + len(answer) :]
        ends = [place + len(token) for token in self.special_tokens if (place := suffix.find(token)) >= 0]
        follows = rendered.startswith(opened)
        shared = os.path.commonprefix([opened, rendered])  # noqa: RUF071  (character by character, as intended)
        header = self._header(answered, closed, row)
        opening = header if header and opened.startswith(closed + header) else shared.removeprefix(closed)
        asks = opened[opened.rfind(question) + len(question) :]
        opening = opening or asks  # where it writes nothing to open an answer, what stands behind the question does
        return Frame(
            opening=opening,
            closing=asks.partition(opening)[0] if opening and opening in asks else "",
            header=header,
            lead=rendered[len(opened) : at] if follows else None,
            begun=opened[len(shared) :] if shared.startswith(closed) else "",
            suffix=suffix,
            end=suffix[: min(ends)] if ends else "",
        )

    def _header(self, answered: list[Message], closed: str, row: Comparison) -> str:
        try:
            further = self.render([*answered, {"role": "user", "content": "and further"}], row)
        except LeftOut:
            return ""
        return further[len(closed) : further.rfind(answered[-1]["content"])] if further.startswith(closed) else ""

    def written(self) -> str:
        """Dialogues as the template writes them, one after another."""
        row = Comparison([], [], [])
        dialogue = [{"role": role, "content": "text"} for role in ("system", "user", "assistant", "user", "assistant")]
        written = ""
        for messages in (dialogue, dialogue[1:], dialogue[1:2], dialogue[1:3]):
            for open_turn in (False, True):
                try:
                    written += self.render(messages, row, open_turn)
                except LeftOut:
                    continue  # it takes no system role, or less
        return written

    def markers(self) -> Markers:
        written = self.written()
        specials = frozenset(token for token in self.special_tokens if token in written)
        frame = self.frame(Comparison([], [], []))
        return Markers(specials, frame.opening, frame.closing, frame.end)

    def stripped(self, text: str, row: Comparison) -> str:
        """An answer without the end that a template has already written, and without the blanks before that."""
        for end in (self.frame(row).end.strip(), str(self.tokenizer.eos_token)):
            ended = text.rstrip()
            text = ended.removesuffix(end).rstrip() if end and ended.endswith(end) else text
        return text

    def ended(self, text: str, row: Comparison) -> str:
        """A rendered dialogue without what the template writes after the token that ends the last turn."""
        frame = self.frame(row)
        if frame.suffix and text.endswith(frame.suffix):
            return text.removesuffix(frame.suffix) + frame.end
        # An answer of another kind, a tool call for one, may end otherwise.
        return text.rstrip() if text.rstrip().endswith(tuple(self.special_tokens)) else text


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template prints today's date."""
    templates = tokenizer.chat_template or ""
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return any("strftime_now" in text for text in texts)


DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # transformers' function for the date of today
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


# --------------------------------------------------------------------------------------------- what a template left out


def missing(message: Message, text: str) -> str | None:
    """The key of the first thing that a message says and that the text does not show."""
    for key in ("content", *REASONING):
        if message.get(key) and not shows(text, said(message, key)):
            return key
    if message.get("tool_calls"):
        bare = _bare(text)
        if not all(_bare(word) in bare for call in message["tool_calls"] for word in _words_of(call)):
            return "tool_calls"
    return None


def said(message: Message, key: str = "content") -> str:
    """A message's text; of a list of parts the parts that are text."""
    value = message.get(key)
    if isinstance(value, list):
        return "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def shows(text: str, wanted: str) -> bool:
    """Whether the wanted text stands in the other. Blanks do not count: a template may arrange them its own way."""
    return wanted.strip() in text or "".join(wanted.split()) in "".join(text.split())


def shows_tools(text: str, tools: list[Any]) -> bool:
    names = [tool.get("function", tool).get("name") for tool in tools if isinstance(tool, dict)]
    return all(str(name) in text for name in names if name)


def _words_of(call: dict[str, Any]) -> Iterator[str]:
    """The name of the function that is called, and every value in the arguments."""
    function = call.get("function", call)
    yield str(function.get("name", ""))
    yield from _leaves(parsed(function.get("arguments", "")))


def parsed(arguments: Any) -> Any:
    """A tool call's arguments, which some data hold as JSON text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield str(value)


def _bare(text: str) -> str:
    """Letters and digits alone, because a template writes arguments as JSON, which may escape the others."""
    return re.sub(r"\\+(?:u[0-9a-fA-F]{4}|.)|[^0-9A-Za-z]", "", text, flags=re.DOTALL).lower()
