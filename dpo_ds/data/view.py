"""What will be trained, to look at: the counts and lengths of a set of pairs, and groups token by token.

reports/data_listing.py shows it on a terminal, reports/data_page.py as a page.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_ds.data.counts import counted, named
from dpo_ds.data.pairs import PairSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------- the numbers


@dataclass(frozen=True)
class Spread:
    """How numbers are spread. 95% of them are at most `most`."""

    least: float
    median: float
    most: float
    longest: float

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Spread":
        """numbers: at least one."""
        return cls(*(float(np.quantile(numbers, part, method="inverted_cdf")) for part in (0, 0.5, 0.95, 1)))


@dataclass(frozen=True)
class Summary:
    """What a set of pairs holds. Lengths are in tokens."""

    pairs: int
    prompts: int
    answers: int
    lengths: dict[str, np.ndarray]  # of all prompts, answers and packed rows
    per_prompt: dict[str, np.ndarray]  # how many answers and pairs each prompt has
    learned: int  # of the answers' tokens
    packed: int  # tokens of all packed rows
    apart: int  # the same if each answer of each pair had a prompt of its own
    weights: Spread | None  # None: all are 1
    margins: Spread | None  # of those that are known; None: of no pair
    margins_known: int  # pairs

    @classmethod
    def of(cls, pairs: PairSet) -> "Summary":
        known = pairs.margins[~np.isnan(pairs.margins)]
        groups = len(pairs.prompts)
        return cls(
            pairs=len(pairs),
            prompts=groups,
            answers=len(pairs.answers),
            lengths={
                "prompt": pairs.prompts[:, 1],
                "answer": pairs.answers[:, 1],
                "packed row": pairs.group_lengths,
            },
            per_prompt={
                "answers": np.bincount(pairs.answer_groups, minlength=groups),
                "pairs": np.bincount(pairs.pair_groups, minlength=groups),
            },
            learned=_learned(pairs),
            packed=int(pairs.group_lengths.sum()),
            apart=int((pairs.packed_lengths + pairs.prompts[pairs.pair_groups, 1]).sum()),
            weights=Spread.of(pairs.weights) if (pairs.weights != 1).any() else None,
            margins=Spread.of(known) if len(known) else None,
            margins_known=len(known),
        )

    @property
    def saved(self) -> float:
        """The fraction of tokens that sharing prompts, and answers that are in several pairs, saves."""
        return 1 - self.packed / self.apart if self.apart else 0.0

    def lines(self) -> list[str]:
        """What is to be said besides the lengths."""
        tokens = int(self.lengths["answer"].sum())
        counts = [counted(self.prompts, "prompt"), counted(self.answers, "answer")]
        lines = [f"{counted(self.pairs, 'training pair')}: {', '.join(counts)}"]
        if self.learned < tokens:
            lines.append(f"{self.learned:,} of the answers' {tokens:,} tokens are learned: those of the assistant")
        lines.append(
            f"{self.packed:,} tokens go through the model: each prompt and each answer once. With a prompt of its own "
            f"for every answer of a pair they are {self.apart:,}, so {self.saved:.0%} are saved"
        )
        for name, spread, count, use in (
            ("margins", self.margins, self.margins_known, "; --loss odpo and --pairs above_margin read them"),
            ("weights", self.weights, self.pairs, ""),
        ):
            if spread is not None:
                of = "" if count == self.pairs else f" (known for {count:,} of {counted(self.pairs, 'pair')})"
                lines.append(f"{name}{of}: from {spread.least:g} to {spread.longest:g}, median {spread.median:g}{use}")
        return lines

    def table(self) -> list[tuple[str, np.ndarray]]:
        """The rows of the table of spreads: what is counted, and the numbers."""
        lengths = [(f"tokens of {'an' if name == 'answer' else 'a'} {name}", n) for name, n in self.lengths.items()]
        several = [(f"{name} per prompt", numbers) for name, numbers in self.per_prompt.items()]
        # Where every prompt has one pair, there is nothing to see.
        return lengths + (several if self.prompts != self.pairs else [])


def _learned(pairs: PairSet) -> int:
    if not len(pairs.scored):
        return int(pairs.answers[:, 1].sum())
    return sum(int(pairs.scored[start : start + length].sum()) for start, length in pairs.answers)


# ----------------------------------------------------------------------------------------------------------- the tokens


class Token(NamedTuple):
    text: str  # "": a part of a character, which stands with the token that completes it
    special: bool
    scored: bool


class Cut(NamedTuple):
    """Truncation took so many tokens from here."""

    tokens: int


class Run(NamedTuple):
    """The text of tokens of one kind that follow each other."""

    text: str
    special: bool
    scored: bool


@dataclass(frozen=True)
class Shown:
    """A prompt or an answer."""

    tokens: list[Token]
    gaps: list[tuple[int, int]]  # places among the tokens where truncation took some out, ascending, and how many

    def runs(self) -> Iterator[Run | Cut]:
        """The text in pieces of one look, in order, with what was cut in its place."""
        back = 0
        for place, count in [*self.gaps, (len(self.tokens), 0)]:
            for kind, tokens in groupby(self.tokens[back:place], key=lambda token: (token.special, token.scored)):
                if text := visible("".join(token.text for token in tokens)):
                    yield Run(text, *kind)
            if count:
                yield Cut(count)
            back = place


@dataclass(frozen=True)
class ShownPair:
    """Two answers, as places in the group."""

    chosen: int
    rejected: int
    weight: float
    margin: float | None

    @property
    def facts(self) -> str:
        """ " (margin 2, weight 0.5)", without what is not known or is as always."""
        found = [f"margin {self.margin:g}"] if self.margin is not None else []
        found += [f"weight {self.weight:g}"] if self.weight != 1 else []
        return f" ({', '.join(found)})" if found else ""


@dataclass(frozen=True)
class ShownGroup:
    """A prompt with its answers, as a packed row holds them."""

    where: str  # the rows of the data that it is from
    held_out: bool
    prompt: Shown
    answers: list[Shown]
    pairs: list[ShownPair]

    @property
    def tokens(self) -> int:
        return len(self.prompt.tokens) + sum(len(answer.tokens) for answer in self.answers)

    def role(self, answer: int) -> str:
        """chosen, rejected, or both: an answer of a group may be better than one and worse than another."""
        chosen = any(pair.chosen == answer for pair in self.pairs)
        rejected = any(pair.rejected == answer for pair in self.pairs)
        return "both" if chosen and rejected else "chosen" if chosen else "rejected"

    def verdict(self, answer: int) -> str:
        """The title of an answer: what it is in its pairs."""
        if len(self.answers) == 2 and len(self.pairs) == 1:
            return "chosen" + self.pairs[0].facts if self.role(answer) == "chosen" else "rejected"
        pairs = sorted(self.pairs, key=lambda pair: (pair.rejected, pair.chosen))
        over = [f"{pair.rejected + 1}{pair.facts}" for pair in pairs if pair.chosen == answer]
        under = [f"{pair.chosen + 1}" for pair in pairs if pair.rejected == answer]
        parts = [f"chosen over {_listed(over)}"] if over else []
        parts += [f"rejected for {_listed(under)}"] if under else []
        return f"answer {answer + 1}: {'; '.join(parts)}"


def _listed(names: Sequence[str]) -> str:
    """The names; a pair that several rows give is there several times."""
    return ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in Counter(names).items())


def shown_group(
    pairs: PairSet, group: int, names: Sequence[str], tokenizer: "PreTrainedTokenizerBase", held_out: bool = False
) -> ShownGroup:
    """A group of the set, decoded. names: of the sources."""
    answers = np.flatnonzero(pairs.answer_groups == group)
    own = np.flatnonzero(pairs.pair_groups == group)
    place = {int(answer): n for n, answer in enumerate(answers)}
    prompt = pairs.prompt(group).tolist()
    return ShownGroup(
        where=_where(pairs.sources[own], pairs.rows[own], names),
        held_out=held_out,
        prompt=Shown(_tokens(tokenizer, [], prompt, [False] * len(prompt)), _gaps(pairs.prompt_gaps[group])),
        answers=[_shown_answer(pairs, int(answer), prompt, tokenizer) for answer in answers],
        pairs=[
            ShownPair(
                place[int(pairs.pairs[i, 0])],
                place[int(pairs.pairs[i, 1])],
                float(pairs.weights[i]),
                None if np.isnan(pairs.margins[i]) else float(pairs.margins[i]),
            )
            for i in own
        ],
    )


def _where(sources: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> str:
    found = []
    for source in np.unique(sources):
        own = np.unique(rows[sources == source]).tolist()
        found.append(f"{named(len(own), own[:5])} of {names[source]}")
    return "; ".join(found)


def _shown_answer(pairs: PairSet, answer: int, prompt: list[int], tokenizer: "PreTrainedTokenizerBase") -> Shown:
    ids, scored = pairs.answer(answer).tolist(), pairs.scored_of(answer)
    mask = [True] * len(ids) if scored is None else scored.tolist()
    return Shown(_tokens(tokenizer, prompt[-8:], ids, mask), _gaps([(len(ids), pairs.answer_cuts[answer])]))


def _tokens(tokenizer: "PreTrainedTokenizerBase", before: list[int], ids: list[int], scored: list[bool]) -> list[Token]:
    """The tokens that follow those of `before`."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    texts = token_texts(tokenizer, [*before, *ids])[len(before) :]
    return [Token(text, id in special, learned) for text, id, learned in zip(texts, ids, scored, strict=True)]


def _gaps(found: Iterable) -> list[tuple[int, int]]:
    return [(int(place), int(count)) for place, count in found if count]


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[str]:
    """What each token adds to the text. Of a character in several tokens, the last one has it and the others have "".

    A token is decoded together with the one before it, because some tokenizers drop the blank of a text's first word.
    """

    def decoded(start: int, stop: int) -> str:
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list of texts is for a list of lists
        return text

    texts = [""] * len(ids)
    start, done = 0, 0  # texts up to `done` are known; what follows is decoded from `start` on
    for n in range(len(ids)):
        before, whole = decoded(start, done), decoded(start, n + 1)
        if whole.endswith("\ufffd") and n + 1 < len(ids):  # perhaps a character that the next token completes
            continue
        texts[n] = whole[len(before) :]
        start, done = done, n + 1
    return texts


DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # these reorder what is shown


def visible(text: str) -> str:
    """The text without characters that act on a terminal or a page: a symbol or their number stands for them."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t" or (unicodedata.category(character) != "Cc" and character not in DIRECTION):
        return character
    return chr(0x2400 + ord(character)) if character < " " else f"<U+{ord(character):04X}>"


# -------------------------------------------------------------------------------------------------------- which of them


def first_groups(pairs: PairSet, many: int) -> list[int]:
    """The groups of the set's first rows, in the data's order."""
    order = np.lexsort((pairs.rows, pairs.sources))
    return list(dict.fromkeys(pairs.pair_groups[order].tolist()))[:many]


def groups_of_row(pairs: PairSet, row: int) -> list[int]:
    """The groups that a row has pairs in. Every source has a row of that number."""
    return np.unique(pairs.pair_groups[pairs.rows == row]).tolist()
