"""Scores many pairs without a gradient on all ranks: one chunk (score_pairs), or a whole set (score_set)."""

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

# Pairs per rank between two writes to disk: a kill loses no more than these.
CHUNK = 256

Score = Callable[[PackedBatch], torch.Tensor]  # to logps [B, 2]


def score_pairs(score: Score, pairs: PairSet, indices: np.ndarray, micro_batch_tokens: int) -> np.ndarray:
    """The pairs' logps, float32 [len(indices), 2], on every rank."""
    here = world.from_environment()
    place = {int(i): n for n, i in enumerate(indices)}
    logps = torch.zeros(len(indices), 2)
    own = deal(indices, pairs.packed_lengths, here.size, micro_batch_tokens)[here.rank]
    batches = ahead(lambda micro_batch: pack([pairs.pair(i) for i in micro_batch.indices]), own)
    scored = [score(batch) for batch in batches]  # on the device: the host does not wait until all batches are launched
    for micro_batch, rows in zip(own, scored, strict=True):
        if micro_batch.weight:
            logps[[place[i] for i in micro_batch.indices]] = rows.cpu()
    return collectives.sum_over_ranks(logps.to(collectives.device())).cpu().numpy()


def score_set(
    score: Score,
    pairs: PairSet,
    indices: np.ndarray,
    micro_batch_tokens: int,
    title: str,
    keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Like score_pairs, in chunks with a progress bar; `keep(indices, logps)` is called for each chunk.

    Raises RunStopped if a log-probability is not finite, naming the pairs.
    """
    here = world.from_environment()
    step = CHUNK * here.size
    chunks = [indices[i : i + step] for i in range(0, len(indices), step)]
    scored = []
    with tqdm(total=len(indices), desc=title, unit="pair", disable=None if here.speaks else True, leave=False) as bar:
        for chunk in chunks:
            logps = score_pairs(score, pairs, chunk, micro_batch_tokens)
            finite = np.isfinite(logps).all(axis=1)
            if not finite.all():
                bad = ", ".join(pairs.pair_id(i) for i in chunk[~finite][:5])
                raise RunStopped(f"{title}: the log-probabilities of {(~finite).sum()} pairs are not finite: {bad}")
            if keep is not None:
                keep(chunk, logps)
            scored.append(logps)
            bar.update(len(chunk))
    return np.concatenate(scored) if scored else np.zeros((0, 2), dtype=np.float32)
