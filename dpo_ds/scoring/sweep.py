"""Scores many answers without a gradient on all ranks: one chunk (score_answers), or a whole set (score_set)."""

from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from dpo_ds.ahead import ahead
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.steps import deal
from dpo_ds.errors import RunStopped
from dpo_ds.ranks import collectives, world
from dpo_ds.scoring.packed import PackedBatch, pack

# Answers per rank between two writes to disk: a kill loses no more than these.
CHUNK = 512

Score = Callable[[PackedBatch], torch.Tensor]  # to logps [A]


def score_answers(score: Score, pairs: PairSet, answers: np.ndarray, micro_batch_tokens: int) -> np.ndarray:
    """The answers' logps, float32 [len(answers)], on every rank."""
    here = world.from_environment()
    place = {int(answer): n for n, answer in enumerate(answers)}
    logps = torch.zeros(len(answers))
    own = deal(pairs.answer_parts(answers, micro_batch_tokens), here.size, micro_batch_tokens)[here.rank]
    batches = ahead(lambda micro_batch: pack([pairs.group(part) for part in micro_batch.parts]), own)
    scored = [score(batch) for batch in batches]  # on the device: the host does not wait until all batches are launched
    for micro_batch, values in zip(own, scored, strict=True):
        if micro_batch.weight:
            logps[[place[answer] for answer in micro_batch.answers]] = values.cpu()
    return collectives.sum_over_ranks(logps.to(collectives.device())).cpu().numpy()


def score_set(
    score: Score,
    pairs: PairSet,
    answers: np.ndarray,
    micro_batch_tokens: int,
    title: str,
    keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Like score_answers, in chunks with a progress bar; `keep(answers, logps)` is called for each chunk.

    Raises RunStopped if a log-probability is not finite, naming pairs that they are in.
    """
    here = world.from_environment()
    step = CHUNK * here.size
    chunks = [answers[i : i + step] for i in range(0, len(answers), step)]
    scored = []
    with tqdm(total=len(answers), desc=title, unit="answer", disable=None if here.speaks else True, leave=False) as bar:
        for chunk in chunks:
            logps = score_answers(score, pairs, chunk, micro_batch_tokens)
            finite = np.isfinite(logps)
            if not finite.all():
                bad = np.isin(pairs.pairs, chunk[~finite]).any(axis=1).nonzero()[0]
                named = ", ".join(pairs.pair_id(i) for i in bad[:5])
                raise RunStopped(
                    f"{title}: the log-probabilities of {(~finite).sum()} answers are not finite, of the pairs {named}"
                )
            if keep is not None:
                keep(chunk, logps)
            scored.append(logps)
            bar.update(len(chunk))
    return np.concatenate(scored) if scored else np.zeros(0, dtype=np.float32)
