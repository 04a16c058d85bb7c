"""Scores many answers without a gradient on all ranks: one chunk (score_answers), or a whole set (score_set).

Values stand in a flat array, answer after answer: one value for each answer, or one for each of its learned tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from dpo_ds.ahead import ahead
from dpo_ds.data.pairs import PairSet, named_rows
from dpo_ds.data.steps import deal
from dpo_ds.errors import RunStopped
from dpo_ds.ranks import collectives, hang, world
from dpo_ds.scoring.packed import PackedBatch, pack

# Answers per rank between two writes to disk: a kill loses no more than these.
CHUNK = 512

Score = Callable[[PackedBatch], torch.Tensor]  # to one value for each answer, or for each learned token


@dataclass(frozen=True)
class Places:
    """Where the values of each answer stand in a flat array."""

    sizes: np.ndarray  # int64 [A]: how many values each answer has

    @classmethod
    def of_set(cls, pairs: PairSet, per_token: bool) -> "Places":
        return cls(pairs.learned_lengths if per_token else np.ones(len(pairs.answers), dtype=np.int64))

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.sizes) - self.sizes

    @property
    def total(self) -> int:
        return int(self.sizes.sum())

    def of(self, answers: ArrayLike) -> np.ndarray:
        """The places of these answers' values, in the answers' order: int64."""
        wanted = np.asarray(answers, dtype=np.int64)
        sizes = self.sizes[wanted]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(self.starts[wanted], sizes) + within


def score_answers(
    score: Score, pairs: PairSet, answers: np.ndarray, micro_batch_tokens: int, per_token: bool = False
) -> np.ndarray:
    """The answers' values, float32 [n] in their order, on every rank."""
    here = world.from_environment()
    number = {int(answer): n for n, answer in enumerate(answers)}
    places = Places(Places.of_set(pairs, per_token).sizes[answers])
    values = torch.zeros(places.total)
    own = deal(pairs.answer_parts(answers, micro_batch_tokens), here.size, micro_batch_tokens)[here.rank]
    batches = ahead(lambda micro_batch: pack([pairs.group(part) for part in micro_batch.parts]), own)
    scored = [score(batch) for batch in batches]  # on the device: the host does not wait until all batches are launched
    for micro_batch, found in zip(own, scored, strict=True):
        if micro_batch.weight:
            values[places.of([number[answer] for answer in micro_batch.answers])] = found.cpu()
    return collectives.sum_over_ranks(values.to(collectives.device())).cpu().numpy()


def score_set(
    score: Score,
    pairs: PairSet,
    answers: np.ndarray,
    micro_batch_tokens: int,
    title: str,
    per_token: bool = False,
    keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Like score_answers, in chunks with a progress bar; `keep(answers, values)` is called for each chunk.

    Raises RunStopped if a log-probability is not finite, naming pairs that they are in.
    """
    here = world.from_environment()
    step = CHUNK * here.size
    chunks = [answers[i : i + step] for i in range(0, len(answers), step)]
    sizes = Places.of_set(pairs, per_token).sizes
    scored = []
    with (
        hang.limited("answers scored"),
        tqdm(total=len(answers), desc=title, unit="answer", disable=None if here.speaks else True, leave=False) as bar,
    ):
        for chunk in chunks:
            values = score_answers(score, pairs, chunk, micro_batch_tokens, per_token)
            bad = np.unique(np.repeat(chunk, sizes[chunk])[~np.isfinite(values)])
            if len(bad):
                rows = named_rows(pairs, np.isin(pairs.pairs, bad).any(axis=1).nonzero()[0])
                raise RunStopped(f"{title}: the log-probabilities of {len(bad)} answers are not finite, in {rows}")
            if keep is not None:
                keep(chunk, values)
            scored.append(values)
            bar.update(len(chunk))
            hang.alive()
    return np.concatenate(scored) if scored else np.zeros(0, dtype=np.float32)
