"""Tokenised pairs as training reads them: arrays in a folder that data/cache.py has written.

A group is a prompt with all its answers. A pair is two answers of one group: the chosen and the rejected one. An answer
may be in several pairs; it is stored once.

This file imports only numpy: `datasets` would take 90 MiB of every rank's memory.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dpo_ds.config import Planned
from dpo_ds.errors import UserError

# What the manifest counts, and the arrays that have so many entries.
COUNTED = {
    "tokens": ("tokens",),
    "groups": ("prompts", "prompt_gaps", "prompt_hashes", "prompt_keys"),
    "answers": ("answers", "answer_cuts", "answer_groups", "answer_ids"),
    "pairs": ("pairs", "rows", "sources", "weights", "margins", "pair_ids"),
}


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and of some of its answers, and the pairs among these: what `pack` takes.

    prompt int32 [P]; answers: int32 [R] each; pairs: int [n, 2], places in `answers` (chosen, rejected); scored: for
    each answer, bool [R], which of its tokens are learned, or None for all of them.
    """

    prompt: np.ndarray
    answers: Sequence[np.ndarray]
    pairs: np.ndarray
    scored: Sequence[np.ndarray | None]

    @classmethod
    def of_pair(cls, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> "Group":
        return cls(prompt, [chosen, rejected], np.array([[0, 1]]), [None, None])


@dataclass(frozen=True)
class Part:
    """A group, or as much of it as fits into a micro-batch. Numbers are places in the PairSet.

    keys: the rows that the part's attention reads; the prompt's are read once for each answer.
    """

    group: int
    answers: tuple[int, ...]
    pairs: tuple[int, ...]
    tokens: int
    keys: int


@dataclass(frozen=True)
class PairSet:
    """Tokenised pairs. Most arrays are in memory; the tokens are memory-mapped. `subset` is a view.

    tokens int32 [total]; scored uint8 [total]: 1 where a token of an answer is learned, empty if all are.
    Per group: prompts int64 [G, 2], where the prompt starts in `tokens` and its length; prompt_hashes uint8 [G, 16], of
    the prompt's text; prompt_keys uint8 [G, 3, 16], see data/held_out.py; prompt_gaps int32 [G, 2, 2], the places in it
    where truncation took tokens out, and how many (0: none).
    Per answer: answers int64 [A, 2], start and length; answer_cuts int32 [A], how many tokens truncation took from its
    end; answer_groups int64 [A], ascending; answer_ids uint8 [A, 16].
    Per pair: pairs int64 [n, 2], the chosen and the rejected answer; the pairs of a group follow each other.
    rows int64 [n] and sources int64 [n], where the pair is from; weights float32 [n]; margins float32 [n] (NaN: not
    known); pair_ids uint8 [n, 16].
    """

    tokens: np.ndarray
    scored: np.ndarray
    prompts: np.ndarray
    prompt_gaps: np.ndarray
    prompt_hashes: np.ndarray
    prompt_keys: np.ndarray
    answers: np.ndarray
    answer_cuts: np.ndarray
    answer_groups: np.ndarray
    answer_ids: np.ndarray
    pairs: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    pair_ids: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "PairSet":
        """Opens a folder of tokenised pairs. Raises UserError if files are missing or damaged."""
        manifest = read_manifest(folder)
        try:
            arrays = {name: _open(folder, name) for name in cls.__dataclass_fields__}
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} is an incomplete set of tokenised pairs; remove it: {error}") from error
        if any(len(arrays[name]) != manifest[count] for count, names in COUNTED.items() for name in names):
            raise UserError(f"{folder} does not hold what its manifest says; remove it")
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.pairs)

    def prompt(self, group: int) -> np.ndarray:
        start, length = self.prompts[group]
        return self.tokens[start : start + length]

    def answer(self, answer: int) -> np.ndarray:
        start, length = self.answers[answer]
        return self.tokens[start : start + length]

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of prompt, chosen and rejected."""
        chosen, rejected = self.pairs[i]
        return self.prompt(self.answer_groups[chosen]), self.answer(chosen), self.answer(rejected)

    def pair_id(self, i: int) -> str:
        return self.pair_ids[i].tobytes().hex()

    @cached_property
    def pair_groups(self) -> np.ndarray:
        """int64 [n], ascending: the group of each pair."""
        return self.answer_groups[self.pairs[:, 0]]

    @cached_property
    def packed_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of a pair alone in a packed row, P + C + R."""
        return self.prompts[self.pair_groups, 1] + self.answers[self.pairs, 1].sum(axis=1)

    @cached_property
    def group_lengths(self) -> np.ndarray:
        """int64 [G]: tokens of a whole group in a packed row."""
        answers = np.bincount(self.answer_groups, weights=self.answers[:, 1], minlength=len(self.prompts))
        return self.prompts[:, 1] + answers.astype(np.int64)

    @cached_property
    def group_limits(self) -> np.ndarray:
        """int64 [G]: the least limit for which `parts` leaves a group whole."""
        answers = np.bincount(self.answer_groups, minlength=len(self.prompts))
        keys = self.group_lengths + (answers - 1) * self.prompts[:, 1]
        return np.maximum(self.group_lengths, -(-keys // 2))

    @cached_property
    def learned_lengths(self) -> np.ndarray:
        """int64 [A]: learned tokens of each answer."""
        if not len(self.scored):
            return self.answers[:, 1]
        return np.array([self.scored[start : start + length].sum(dtype=np.int64) for start, length in self.answers])

    @cached_property
    def digest(self) -> str:
        """sha256 over the pairs, in order: it depends on the content of this set alone, not on its folder."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pair_ids).tobytes())
        for array in (self.pairs, self.weights, self.margins):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @cached_property
    def answers_digest(self) -> str:
        """sha256 over the answers with their prompts, in order: what a reference table depends on."""
        return hashlib.sha256(np.ascontiguousarray(self.answer_ids).tobytes()).hexdigest()

    def lengths(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token counts of these pairs' prompts and answers, each once, and the place of each answer's prompt."""
        answers = np.unique(self.pairs[indices])
        groups, of_answer = np.unique(self.answer_groups[answers], return_inverse=True)
        return self.prompts[groups, 1], self.answers[answers, 1], of_answer.reshape(-1)

    def subset(self, indices: ArrayLike) -> "PairSet":
        """These pairs with their answers and groups, which get new numbers. `indices` ascend."""
        chosen = np.asarray(indices, dtype=np.int64)
        pairs = self.pairs[chosen]
        answers, places = np.unique(pairs, return_inverse=True)
        groups, answer_groups = np.unique(self.answer_groups[answers], return_inverse=True)
        per_group = {name: getattr(self, name)[groups] for name in COUNTED["groups"]}
        per_answer = {name: getattr(self, name)[answers] for name in ("answers", "answer_cuts", "answer_ids")}
        per_pair = {n: getattr(self, n)[chosen] for n in ("rows", "sources", "weights", "margins", "pair_ids")}
        return replace(
            self,
            pairs=places.reshape(-1, 2),
            answer_groups=answer_groups.reshape(-1),
            **per_group,
            **per_answer,
            **per_pair,
        )

    def parts(self, pairs: Iterable[int], limit: int) -> list[Part]:
        """The pairs' groups, split where one has more than `limit` tokens. Each pair is in one part.

        Raises UserError if one pair alone is over the limit.
        """
        ordered = sorted(int(i) for i in pairs)
        return [
            part
            for group, members in groupby(ordered, key=lambda i: int(self.pair_groups[i]))
            for part in self._split(group, [(i, tuple(self.pairs[i].tolist())) for i in members], limit)
        ]

    def answer_parts(self, answers: Iterable[int], limit: int) -> list[Part]:
        """Parts without pairs, which hold each of the answers once."""
        ordered = sorted(int(a) for a in answers)
        return [
            replace(part, pairs=())
            for group, members in groupby(ordered, key=lambda a: int(self.answer_groups[a]))
            for part in self._split(group, [(a, (a,)) for a in members], limit)
        ]

    def _split(self, group: int, members: list[tuple[int, tuple[int, ...]]], limit: int) -> Iterator[Part]:
        """Takes members, each with the answers that it needs, as long as they fit."""
        P = int(self.prompts[group, 1])
        length = {a: int(self.answers[a, 1]) for _, needed in members for a in needed}
        taken: list[int] = []
        held: dict[int, None] = {}  # answers, in the order in which they came
        for number, needed in members:
            more = held | dict.fromkeys(needed)
            responses = sum(length[a] for a in more)
            # The second limit holds for every pair that keeps the first one.
            if taken and (P + responses > limit or len(more) * P + responses > 2 * limit):
                yield self._part(group, taken, held)
                taken, more = [], dict.fromkeys(needed)
            taken, held = [*taken, number], more
            if len(taken) == 1 and (tokens := P + sum(length[a] for a in held)) > limit:
                raise UserError(too_small("micro_batch_tokens", limit, tokens))
        yield self._part(group, taken, held)

    def _part(self, group: int, pairs: list[int], answers: Iterable[int]) -> Part:
        held = tuple(answers)
        P, responses = int(self.prompts[group, 1]), int(self.answers[list(held), 1].sum())
        return Part(group, held, tuple(pairs), P + responses, len(held) * P + responses)

    def group(self, part: Part) -> Group:
        """A part's tokens."""
        place = {answer: n for n, answer in enumerate(part.answers)}
        pairs = [[place[int(answer)] for answer in self.pairs[i]] for i in part.pairs]
        return Group(
            self.prompt(part.group),
            [self.answer(answer) for answer in part.answers],
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
            [self.scored_of(answer) for answer in part.answers],
        )

    def scored_of(self, answer: int) -> np.ndarray | None:
        """bool [R]: which of an answer's tokens are learned. None: the set's answers are learned whole."""
        if not len(self.scored):
            return None
        start, length = self.answers[answer]
        return self.scored[start : start + length].astype(bool)


def _open(folder: Path, name: str) -> np.ndarray:
    if name == "tokens":
        return _mapped(folder / "tokens.int32", np.int32)
    if name == "scored":
        file = folder / "scored.uint8"
        return _mapped(file, np.uint8) if file.is_file() else np.zeros(0, dtype=np.uint8)
    return np.load(folder / f"{name}.npy")


def _mapped(file: Path, dtype: type) -> np.ndarray:
    """A file's numbers, memory-mapped; a file of none cannot be."""
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype=dtype)


def read_manifest(folder: Path) -> dict:
    """Reads the manifest: how much there is of everything, and the report. Raises UserError if it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {name: manifest[name] for name in (*COUNTED, "report")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is an incomplete set of tokenised pairs; remove it: {error!r}") from error


def named_rows(pairs: PairSet, places: ArrayLike, most: int = 5) -> str:
    """The rows of the data that these pairs are from, in words: row 3; rows 3, 8 and 4 more; row 3 of the data set 2.
    Rows count from 0, as in the report on the data."""
    chosen = np.asarray(places, dtype=np.int64)
    several = len(np.unique(pairs.sources)) > 1
    rows = sorted({(int(pairs.sources[i]), int(pairs.rows[i])) for i in chosen})
    names = [f"{row} of the data set {source + 1}" if several else str(row) for source, row in rows[:most]]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(names)}{more}"


def require_holds(options: Planned, longest: int) -> None:
    """Raises UserError if a pair that packs to so many tokens does not fit a micro-batch."""
    for name in ("micro_batch_tokens", "scoring_tokens"):
        if (tokens := getattr(options, name)) < longest:
            raise UserError(too_small(name, tokens, longest))


def too_small(option: str, tokens: int, longest: int) -> str:
    return (
        f"--{option} {tokens} cannot hold the longest pair, which packs to {longest} tokens: "
        "raise it to that, or lower --max_length"
    )
