"""Where DPO's reference log-probabilities come from: a table, a live engine, LoRA's base weights, or nowhere.

`references(run)` does what must come before the policy is built, and gives a function from the policy's engine to the
two things that the trainer asks: logps [B, 2] of a micro-batch, and of all held-out pairs.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dpo_ds.engines import reference_engine
from dpo_ds.prepare import Run
from dpo_ds.score import reference_tables, score_all
from dpo_ds.scoring.packed import move

ForPolicy = Callable[[object], tuple[Callable, Callable[[], np.ndarray]]]


@contextlib.contextmanager
def references(run: Run) -> Iterator[ForPolicy]:
    kind = run.options.reference
    if kind == "precomputed":
        train, evaluation = reference_tables(run)
        yield lambda policy: (_lookup(train, policy), lambda: evaluation)
    elif kind == "live":
        engine = reference_engine(run.weights, run.ds_config, run.options, run.attention)
        yield lambda policy: (lambda _, batch: engine.score(batch), lambda: _score(run, engine.score))
        engine.close()
    elif kind == "base":
        yield lambda policy: (lambda _, batch: policy.score_base(batch), lambda: _score(run, policy.score_base))
    else:
        yield lambda policy: (
            lambda _, batch: torch.zeros(batch.pairs, 2, device=policy.device),
            lambda: np.zeros((len(run.eval_pairs), 2), dtype=np.float32),
        )


def _lookup(table: np.ndarray, policy) -> Callable:
    return lambda micro_batch, _: move(torch.from_numpy(table[list(micro_batch.indices)]), policy.device)


def _score(run: Run, score) -> np.ndarray:
    everything = np.arange(len(run.eval_pairs))
    return score_all(score, run.eval_pairs, everything, run.options.micro_batch_tokens, "reference: held-out pairs")
