"""Inputs of losses: pairs of answers from plain numbers, and random ones."""

import random

import torch

from dpo_ds.config import Options
from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.objective import Judged, Objective


def compared(policy, reference=None, dtype=torch.float64, **facts) -> Compared:
    """Pairs from lists of numbers. By default each pair is a ranking of its own, and the reference says 0."""
    policy = torch.tensor(policy, dtype=dtype)
    B = len(policy)
    lengths = torch.tensor(facts.get("lengths", [[10, 10]] * B))
    weights = torch.tensor(facts.get("weights", [1.0] * B), dtype=dtype)
    return Compared(
        policy=policy,
        reference=torch.zeros_like(policy) if reference is None else torch.tensor(reference, dtype=dtype),
        lengths=lengths,
        answers=torch.tensor(facts.get("answers", [[2 * n, 2 * n + 1] for n in range(B)])),
        rankings=torch.tensor(facts.get("rankings", list(range(B)))),
        margins=torch.tensor(facts.get("margins", [1.0] * B), dtype=dtype),
        weights=weights,
        mean_length=float((weights * lengths[:, 0]).sum() / weights.sum()),
        running=facts.get("running", Running()),
    )


def of_log_ratios(log_ratios, dtype=torch.float64, **facts) -> Compared:
    """Pairs whose reference says -2000, and whose policy differs from it by these log-ratios."""
    reference = [[-2000.0, -2000.0] for _ in log_ratios]
    policy = [[side - 2000.0 for side in pair] for pair in log_ratios]
    return compared(policy, reference, dtype, **facts)


def some_pairs(seed: int, count: int = 6, spread: float = 5.0, **facts) -> Compared:
    """Random pairs: references and policies, lengths, margins and weights all differ."""
    numbers = random.Random(seed)
    lengths = [[numbers.randint(1, 30), numbers.randint(1, 30)] for _ in range(count)]
    reference = [[-numbers.uniform(1, 3) * length for length in pair] for pair in lengths]
    policy = [[min(-0.1, side + numbers.gauss(0, spread)) for side in pair] for pair in reference]
    drawn = {
        "lengths": lengths,
        "margins": [numbers.uniform(0.1, 4) for _ in range(count)],
        "weights": [numbers.uniform(0.2, 3) for _ in range(count)],
        "running": Running(numbers.uniform(1, 50), numbers.gauss(0, 20), numbers.gauss(0, 2)),
    }
    return compared(policy, reference, **{**drawn, **facts})


def options_of(loss: str, **options) -> Options:
    return Options(model="none", loss=loss, pairs="adjacent" if "plackett_luce" in loss else "best_worst", **options)


def judged(loss: str, x: Compared, **options) -> Judged:
    return Objective(options_of(loss, **options)).judge(x)
