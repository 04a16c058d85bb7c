"""What a loss reads: the log-probabilities of pairs of answers, and what is known about them.

Shapes: B pairs. In a tensor [B, 2], column 0 is of the chosen answers, column 1 of the rejected ones.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Running:
    """What losses remember from the steps so far. A checkpoint keeps it."""

    pairs: float = 0.0  # the sum of all pairs' weights
    log_ratios: float = 0.0  # the weighted sum of the pairs' mean log-ratios, (chosen + rejected) / 2
    gap: float = 0.0  # the moving average of the steps' mean margins of log-ratios


@dataclass(frozen=True)
class Facts:
    """What the data says about pairs of answers."""

    lengths: torch.Tensor  # [B, 2] int64: learned tokens
    answers: torch.Tensor  # [B, 2] int64: numbers of the answers; an answer may be in several pairs
    rankings: torch.Tensor  # [B] int64: the pairs of one ranking share a number; they stand together, the best first
    margins: torch.Tensor  # [B] how much better the chosen answer is, as the data says; NaN: not known
    weights: torch.Tensor  # [B] how much each pair counts


@dataclass(frozen=True, kw_only=True)
class Compared(Facts):
    """Pairs of answers, of a micro-batch or of a whole step, with their log-probabilities."""

    policy: torch.Tensor  # [B, 2] logps, in nats
    reference: torch.Tensor  # [B, 2] logps; zeros in a run without a reference
    mean_length: float  # of the whole step's chosen answers, weighted
    running: Running = field(default_factory=Running)  # as the step begins

    @property
    def log_ratios(self) -> torch.Tensor:
        """log policy / reference, [B, 2]."""
        return self.policy - self.reference

    @property
    def means(self) -> torch.Tensor:
        """The policy's mean log-probability per token, [B, 2]."""
        return self.policy / self.lengths

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted mean over the pairs of values [B] or [B, 2]."""
        weights = self.weights if values.dim() == 1 else self.weights[:, None]
        return (weights * values).sum(0) / self.weights.sum()
