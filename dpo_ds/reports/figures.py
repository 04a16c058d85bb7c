"""The figures of an evaluation: how a model judges preference pairs, with what chance alone may explain. Pure functions
of arrays, in numpy.

Shapes: n pairs. In an array [n, 2], column 0 is of the chosen answers, column 1 of the rejected ones. Log-probabilities
are sums over an answer's learned tokens, in nats; lengths are numbers of these tokens. Pairs count by their weights, as
in training's metrics.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # a normal variable is within so many standard deviations of its mean in 95% of cases
BINS = 4  # of length, each with about as many pairs


@dataclass(frozen=True)
class Share:
    """A share of the pairs. 95% of such intervals, low to high, contain the share of the pairs' whole population."""

    value: float
    low: float
    high: float
    ties: float  # the share of pairs whose two values are equal; they are not counted as right


@dataclass(frozen=True)
class Mean:
    """A mean over the pairs. error: its standard error; None for a single pair."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Likelihood:
    """A model's own log-probabilities."""

    accuracy: Share  # the chosen answer is likelier than the rejected one
    chosen: Mean  # nats a token
    rejected: Mean


@dataclass(frozen=True)
class Against:
    """The policy compared with a reference. A reward is beta * log(policy / reference)."""

    accuracy: Share  # the chosen answer has the higher reward
    margin: Mean  # the chosen answer's reward minus the rejected one's
    kl: float  # nats a token; see `k3`
    chosen: Mean  # log(policy / reference) of chosen answers, nats
    rejected: Mean
    chosen_per_token: Mean  # the same divided by the answer's length
    rejected_per_token: Mean
    reward_and_length: float | None  # rank correlation over all answers
    margin_and_length: float | None  # rank correlation of the margin and how much longer the chosen answer is


@dataclass(frozen=True)
class Figures:
    """The figures of a set of pairs. `reference` and `against` are None without a reference."""

    pairs: int
    prompts: int
    longer: Share  # the chosen answer is the longer one: what a judge who reads only lengths would get right
    policy: Likelihood
    reference: Likelihood | None
    against: Against | None

    @property
    def accuracy(self) -> Share:
        """Of the reward, or without a reference of the policy's own likelihood."""
        return self.policy.accuracy if self.against is None else self.against.accuracy


@dataclass(frozen=True)
class Judged:
    """What the figures are made of."""

    policy: np.ndarray  # [n, 2] logps
    reference: np.ndarray | None  # [n, 2]
    lengths: np.ndarray  # [n, 2]
    weights: np.ndarray  # [n]
    prompts: np.ndarray  # [n]: pairs of one prompt share a number
    beta: float

    def of(self, indices: ArrayLike) -> "Judged":
        """These pairs alone."""
        chosen = np.asarray(indices)
        reference = None if self.reference is None else self.reference[chosen]
        return Judged(
            self.policy[chosen], reference, self.lengths[chosen], self.weights[chosen], self.prompts[chosen], self.beta
        )

    @property
    def log_ratios(self) -> np.ndarray:
        """log(policy / reference), float64 [n, 2]."""
        assert self.reference is not None
        return self.policy.astype(np.float64) - self.reference.astype(np.float64)


def figures_of(judged: Judged) -> Figures:
    """The figures of at least one pair."""
    return Figures(
        pairs=len(judged.policy),
        prompts=len(np.unique(judged.prompts)),
        longer=share_of(judged.lengths, judged.weights),
        policy=_likelihood(judged.policy, judged),
        reference=None if judged.reference is None else _likelihood(judged.reference, judged),
        against=None if judged.reference is None else _against(judged),
    )


def _likelihood(logps: np.ndarray, judged: Judged) -> Likelihood:
    per_token = logps.astype(np.float64) / judged.lengths
    chosen, rejected = (mean_of(side, judged.weights) for side in per_token.T)
    return Likelihood(share_of(logps, judged.weights), chosen, rejected)


def _against(judged: Judged) -> Against:
    weights, log_ratios = judged.weights, judged.log_ratios
    per_token = log_ratios / judged.lengths
    rewards = judged.beta * log_ratios
    margins = rewards[:, 0] - rewards[:, 1]
    lengths = judged.lengths.astype(np.float64)
    return Against(
        accuracy=share_of(rewards, weights),
        margin=mean_of(margins, weights),
        kl=mean_of(k3(per_token).mean(axis=1), weights).value,
        chosen=mean_of(log_ratios[:, 0], weights),
        rejected=mean_of(log_ratios[:, 1], weights),
        chosen_per_token=mean_of(per_token[:, 0], weights),
        rejected_per_token=mean_of(per_token[:, 1], weights),
        reward_and_length=rank_correlation(rewards.ravel(), lengths.ravel(), np.repeat(weights, 2)),
        margin_and_length=rank_correlation(margins, lengths[:, 0] - lengths[:, 1], weights),
    )


def k3(log_ratios: np.ndarray) -> np.ndarray:
    """r - 1 - log r with r = reference / policy, of mean log-ratios per token: the estimate of the metric `kl`, whose
    docstring (kl_per_token in losses/metrics.py) says what it does and does not show."""
    return np.expm1(-log_ratios) + log_ratios


def share_of(values: np.ndarray, weights: np.ndarray) -> Share:
    """The share of pairs with values[:, 0] > values[:, 1], with Wilson's interval. values: [n, 2]."""
    total = float(weights.sum())
    right = float(weights[values[:, 0] > values[:, 1]].sum()) / total
    ties = float(weights[values[:, 0] == values[:, 1]].sum()) / total
    return Share(right, *wilson(right, effective(weights)), ties)


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95% score interval of a share of n independent pairs (Wilson 1927, JASA 22, p. 209). It stays within 0 and 1,
    and holds for few pairs and for shares near 0 and 1, where share ± 1.96 standard errors does not."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def effective(weights: np.ndarray) -> float:
    """How many equally weighted pairs say as much as these: (sum w)² / sum w² (Kish 1965, Survey Sampling)."""
    exact = weights.astype(np.float64)
    return float(exact.sum() ** 2 / (exact**2).sum())


def mean_of(values: np.ndarray, weights: np.ndarray) -> Mean:
    """The weighted mean of values [n] and its standard error, the deviation over the root of the effective number."""
    exact, n = weights.astype(np.float64), effective(weights)
    mean = float((exact * values).sum() / exact.sum())
    if n < 1.5:  # a single pair, or one that outweighs all others
        return Mean(mean, None)
    variance = float((exact * (values - mean) ** 2).sum() / exact.sum()) * n / (n - 1)
    return Mean(mean, math.sqrt(variance / n))


def rank_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, -1 to 1. A few very long answers count no more than others.

    None if there are fewer than three values, or if all of x or of y are equal.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    exact = weights / weights.sum()
    a, b = (ranks - (exact * ranks).sum() for ranks in (ranks_of(x), ranks_of(y)))
    scale = math.sqrt((exact * a**2).sum() * (exact * b**2).sum())
    return float((exact * a * b).sum() / scale) if scale else None


def ranks_of(values: np.ndarray) -> np.ndarray:
    """The ranks of the values, from 1; equal values share the mean of theirs. float64."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)]


# ------------------------------------------------------------------------------------------------------------ slices


@dataclass(frozen=True)
class Slice:
    """Pairs that have something in common, with their figures."""

    name: str
    figures: Figures


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's figures: of all pairs, by source (if there are several), and by the answers' length."""

    all: Figures
    by_source: list[Slice]
    by_length: list[Slice]


def evaluate(judged: Judged, sources: np.ndarray, names: Sequence[str]) -> Evaluation:
    """sources: int [n], the place in `names` of each pair's source."""
    there = np.unique(sources)
    by_source = [Slice(names[at], figures_of(judged.of(np.flatnonzero(sources == at)))) for at in there]
    return Evaluation(
        figures_of(judged),
        by_source if len(by_source) > 1 else [],
        [Slice(name, figures_of(judged.of(places))) for name, places in length_bins(judged.lengths.sum(axis=1))],
    )


def length_bins(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Pairs by the tokens of both answers, int [n]: at most BINS bins, cut at quantiles. Returns the name and the
    places of each; no bins if all would be in one. Pairs of the same length share a bin."""
    cuts = np.quantile(tokens, np.arange(1, BINS) / BINS)
    _, numbers = np.unique(np.searchsorted(np.unique(cuts), tokens, side="left"), return_inverse=True)
    bins = [np.flatnonzero(numbers == number) for number in range(numbers.max(initial=0) + 1)]
    return [(_range(tokens[places]), places) for places in bins] if len(bins) > 1 else []


def _range(tokens: np.ndarray) -> str:
    low, high = int(tokens.min()), int(tokens.max())
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The figures as JSON has them. Keys are the fields' names."""
    return {
        "all": asdict(evaluation.all),
        "by_source": {part.name: asdict(part.figures) for part in evaluation.by_source},
        "by_length": {part.name: asdict(part.figures) for part in evaluation.by_length},
    }
