"""From a comparison to token ids: its text, the boundary between prompt and answers, what is learned, truncation.

An answer ends with the model's end-of-turn token. The prompt and any answer after it begin with the same prompt tokens.
Rows that had to be changed or left out are counted in the report.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dpo_ds.data import truncate
from dpo_ds.data.chat import REWRITTEN, write_chat
from dpo_ds.data.comparison import Comparison, LeftOut, Markers, without_unused_answers
from dpo_ds.data.encoded import Encoded, Gap, with_pairs_that_differ
from dpo_ds.data.rows.rendered import MARKS
from dpo_ds.data.template import ChatTemplate, Span, said
from dpo_ds.data.transcript import Transcript, write_plain, write_rendered
from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds in the report.
MOVED = "the answer's first tokens merge with the prompt's: the boundary was moved back"
SPECIAL = "an answer's text holds a special token of the tokenizer: the model learns it as such"
SPECIAL_PROMPT = "a prompt's text holds a special token of the tokenizer: the model reads it as such"
FOREIGN = "a text holds marks of a chat template that this tokenizer does not have: {}"


@dataclass(frozen=True)
class Tokenizing:
    max_length: int  # tokens of the prompt and the longest answer
    truncation: str = "keep_question"  # or keep_end, keep_start
    chat_template: str = "auto"  # or none
    min_prompt_tokens: int | None = None  # None: half of max_length
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the chat template, for every row
    date: str | None = None  # ISO; what a template prints as today's date. None: that of the clock


class Encoder:
    """Encodes comparisons for one tokenizer.

    Raises UserError if it has no EOS, or if its chat template refuses a plain dialogue or the given variables.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", tokenizing: Tokenizing):
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token to end answers with: set one")
        least = tokenizing.min_prompt_tokens
        if least is not None and not 1 <= least < tokenizing.max_length:
            raise UserError(
                f"--min_prompt_tokens is {least}, but must be from 1 to below --max_length, {tokenizing.max_length}"
            )
        self.tokenizer, self.options = tokenizer, tokenizing
        self.template: ChatTemplate | None = None
        if tokenizing.chat_template == "auto" and tokenizer.chat_template:
            self.template = ChatTemplate(tokenizer, tokenizing.template_kwargs, tokenizing.date)
        elif tokenizing.template_kwargs:
            raise UserError(f"--chat_template_kwargs are for a chat template, and {tokenizer.name_or_path} uses none")
        self.markers = self.template.markers() if self.template else Markers(frozenset(), "")
        self._writes_bos = self._begins_with_bos()
        end = self.template.frame(Comparison([], [], [])).end.strip() if self.template else ""
        self.ends = tuple(token for token in {str(tokenizer.eos_token): None, end: None} if token)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._specials = frozenset(token for token in [*added, *tokenizer.all_special_tokens] if token.strip())
        known = {*self._specials, *map(str, tokenizer.added_tokens_decoder.values())}
        written = self.template.written() if self.template else ""
        self._foreign = [mark for mark in MARKS if mark not in known and mark not in written]
        self._signs = frozenset(token[0] for token in self._specials)  # mostly "<" alone

    def _begins_with_bos(self) -> bool:
        """Whether a text of this model's begins with BOS, which the tokenizer or the template adds."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return False
        by_template = bool(self.template) and str(self.tokenizer.bos_token) in self.markers.specials
        return by_template or self.tokenizer("text")["input_ids"][:1] == [bos]

    def encode(self, comparisons: list[Comparison]) -> list[Encoded]:
        """Encodes a batch. A comparison that cannot be used has `left_out`, and no tokens."""
        comparisons = [without_unused_answers(comparison) for comparison in comparisons]
        return [
            self._finished(comparison, whole)
            for comparison, whole in zip(comparisons, self._whole(comparisons), strict=True)
        ]

    # ------------------------------------------------------------------------------------------------- text to tokens

    def _whole(self, comparisons: list[Comparison]) -> list[Encoded]:
        """The comparisons before truncation, tokenised in one call."""
        transcripts = [self._transcript(comparison) for comparison in comparisons]
        written = [transcript for transcript in transcripts if isinstance(transcript, Transcript)]
        texts = [text for transcript in written for text in (transcript.prompt, *transcript.wholes)]
        ids = iter(self._ids(texts))
        results = []
        for comparison, transcript in zip(comparisons, transcripts, strict=True):
            if isinstance(transcript, LeftOut):
                results.append(Encoded(left_out=str(transcript)))
            else:
                results.append(self._split(comparison, transcript, ids))
        return results

    def _transcript(self, comparison: Comparison) -> Transcript | LeftOut:
        try:
            if comparison.rendered:
                return write_rendered(comparison, self.template)
            written = write_chat(comparison, self.template) if self.template else write_plain(comparison)
        except LeftOut as reason:
            return reason
        if any(self._holds_special(said(message)) for answer in comparison.answers for message in answer.messages):
            written.note(SPECIAL)
        if any(self._special_within(text) for text in self._asked(comparison)):
            written.note(SPECIAL_PROMPT)
        if marks := self._foreign_marks(comparison):
            written.note(FOREIGN.format(", ".join(marks)))
        return written

    def _asked(self, comparison: Comparison) -> list[str]:
        """The prompt's texts. In plain text BOS may begin it: it is there once."""
        texts = [said(message) for message in comparison.messages]
        return texts if self.template else [text.removeprefix(str(self.tokenizer.bos_token)) for text in texts]

    def _foreign_marks(self, comparison: Comparison) -> list[str]:
        """What the chat template of another family has written into the texts."""
        answered = [message for answer in comparison.answers for message in answer.messages]
        texts = [said(message) for message in (*comparison.messages, *answered)]
        return [mark for mark in self._foreign if any(mark in text for text in texts)]

    def _holds_special(self, text: str) -> bool:
        """Whether there is a special token in a text, but for those that end it: they are taken off."""
        text = text.rstrip()
        while end := next((end for end in self.ends if text.endswith(end)), None):
            text = text.removesuffix(end).rstrip()
        return self._special_within(text)

    def _special_within(self, text: str) -> bool:
        return any(sign in text for sign in self._signs) and any(token in text for token in self._specials)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the tokenizer gives them. A template has already written special tokens."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=not self.template, truncation=False, verbose=False)["input_ids"]

    def _split(self, comparison: Comparison, transcript: Transcript, ids: Iterator[list[int]]) -> Encoded:
        """Splits the tokens into the shared prompt and the answers."""
        scored: list[list[bool] | None] = []
        wholes = []
        prompt = self._ended(next(ids), comparison, is_answer=False)[0]
        for text, spans in zip(transcript.wholes, transcript.spans, strict=True):
            raw = next(ids)
            tokens, mask = self._ended(raw, comparison, True, self._mask(text, raw, spans) if spans else None)
            wholes.append(tokens)
            scored.append(mask)
        boundary = len(prompt)
        changed = [*transcript.changed]
        if any(tokens[:boundary] != prompt for tokens in wholes):
            boundary = _common(prompt, *wholes)
            changed += [] if REWRITTEN in changed else [MOVED]
        answers = [tokens[boundary:] for tokens in wholes]
        masks = [mask and mask[boundary:] for mask in scored]
        prompt = prompt[:boundary]
        if not prompt:  # the first token of an answer must be predicted from some token
            bos = self.tokenizer.bos_token_id
            prompt = [self.tokenizer.eos_token_id if bos is None else bos]
        masks = [None if mask is None or all(mask) else mask for mask in masks]
        return Encoded(
            prompt, answers, masks, comparison.pairs, "", changed, [*transcript.unused], 0, [0] * len(answers)
        )

    def _ended(
        self, tokens: list[int], comparison: Comparison, is_answer: bool, mask: list[bool] | None = None
    ) -> tuple[list[int], list[bool] | None]:
        """BOS once, and EOS after an answer whose text does not end with the template's end of turn."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start, stop = 0, len(tokens)
        if bos is not None and tokens[:2] == [bos, bos]:
            start = 1
        missing_bos = comparison.rendered and self._writes_bos and tokens[:1] != [bos]
        if self.template is None:
            while stop > start and tokens[stop - 1] == eos and (stop - start > 1 or eos != bos):
                stop -= 1
            adds_eos = is_answer
        else:
            adds_eos = is_answer and not self.template.frame(comparison).end and tokens[-1:] != [eos]
        if mask is not None:
            mask = [False] * missing_bos + mask[start:stop] + [True] * adds_eos
        return [bos] * missing_bos + tokens[start:stop] + [eos] * adds_eos, mask

    # ---------------------------------------------------------------------------------------------- places in the text

    def _mask(self, text: str, ids: list[int], spans: list[Span]) -> list[bool]:
        """Which of a text's tokens lie in the spans, or reach into one."""
        mask = [False] * len(ids)
        if not self.tokenizer.is_fast:  # it does not say where its tokens stand: tokenise the text up to each place
            for span in spans:
                start, stop = (_common(tokens, ids) for tokens in self._ids([text[:place] for place in span]))
                mask[start:stop] = [True] * (stop - start)
            return mask
        special = not self.template
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        nth, spans = 0, sorted(spans)
        for n, (start, stop) in enumerate(found["offset_mapping"]):
            while nth < len(spans) and spans[nth][1] <= start:
                nth += 1
            mask[n] = nth < len(spans) and spans[nth][0] < stop
        return mask

    # ------------------------------------------------------------------------------------------------------ truncation

    def _finished(self, comparison: Comparison, whole: Encoded) -> Encoded:
        """Within --max_length, with the pairs that still differ and the answers that these need."""
        if whole.left_out:
            return whole
        longest = max(map(len, whole.answers))
        room = truncate.room(
            self.options.truncation, self.options.max_length, self.options.min_prompt_tokens, len(whole.prompt), longest
        )
        cut = whole if len(whole.prompt) <= room.prompt else self._with_shorter_prompt(comparison, whole, room.prompt)
        cut_prompt = max(0, len(whole.prompt) - len(cut.prompt))
        cut_answers = [max(0, len(answer) - room.answer) for answer in cut.answers]
        answers = [answer[: room.answer] for answer in cut.answers]
        scored = [mask and mask[: room.answer] for mask in cut.scored]
        return with_pairs_that_differ(
            replace(cut, answers=answers, scored=scored, cut_prompt=cut_prompt, cut_answers=cut_answers)
        )

    def _with_shorter_prompt(self, comparison: Comparison, whole: Encoded, length: int) -> Encoded:
        if self.options.truncation == "keep_start":
            return _cut(whole, whole.prompt[:length])
        if self.options.truncation == "keep_end":
            return _cut(whole, truncate.ends(whole.prompt, length, self.tokenizer.bos_token_id))
        fewer = truncate.with_fewer_turns(comparison, as_text=self.template is None)
        low, high = 0, len(fewer)  # the first of `fewer` that fits is in fewer[low:high + 1], or there is none
        tried: dict[int, Encoded] = {}
        while low < high:
            middle = (low + high) // 2
            (tried[middle],) = self._whole([fewer[middle]])
            if not tried[middle].left_out and len(tried[middle].prompt) <= length:
                high = middle
            else:
                low = middle + 1
        if low < len(fewer):
            return replace(tried[low], gaps=_gaps(whole.prompt, tried[low].prompt))
        if fewer and not (last := tried[len(fewer) - 1]).left_out:
            comparison, whole = fewer[-1], replace(last, gaps=_gaps(whole.prompt, last.prompt))
        part = self._longest_message(comparison, whole)
        return _cut(whole, truncate.without_middle(whole.prompt, length, part))

    def _longest_message(self, comparison: Comparison, whole: Encoded) -> tuple[int, int]:
        """Where in the prompt's tokens its longest message begins and ends."""
        transcript = self._transcript(comparison)
        wanted = truncate.longest_message(comparison.messages)
        if isinstance(transcript, LeftOut) or not wanted or (at := transcript.prompt.rfind(wanted)) < 0:
            return 0, 0
        (raw,) = self._ids([transcript.prompt])
        mask = self._mask(transcript.prompt, raw, [(at, at + len(wanted))])
        (kept, mask_kept) = self._ended(raw, comparison, False, mask)
        assert mask_kept is not None
        inside = [n for n, in_message in enumerate(mask_kept[: len(whole.prompt)]) if in_message]
        return (inside[0], inside[-1] + 1) if inside and kept[: len(whole.prompt)] == whole.prompt else (0, 0)


def _common(*sequences: list[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _cut(whole: Encoded, prompt: list[int]) -> Encoded:
    """With a shorter prompt. The gap that this makes comes beside the one that turns left."""
    ((at, tokens),) = made = _gaps(whole.prompt, prompt)
    before = [(place if place <= at else max(at, place - tokens), count) for place, count in whole.gaps]
    return replace(whole, prompt=prompt, gaps=sorted(before + made))


def _gaps(whole: list[int], shorter: list[int]) -> list[Gap]:
    return [(_common(whole, shorter), max(0, len(whole) - len(shorter)))]


def end_token(tokenizer: "PreTrainedTokenizerBase", tokenizing: Tokenizing) -> int:
    """The token that answers end with: the end of a turn that the chat template writes, or EOS."""
    template = Encoder(tokenizer, tokenizing).template
    end = template.frame(Comparison([], [], [])).end if template else ""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return ids[-1] if ids else tokenizer.eos_token_id
