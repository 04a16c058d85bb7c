"""What a run minimises: the sum of its losses, and how it is split over micro-batches and ranks.

The loss of a step is the weighted mean over its pairs of the sum of the run's losses. Its slopes are d loss / d logps,
[B, 2] for the pairs' answers. They are all that backward needs: a micro-batch's gradient is that of
(slopes * logps).sum(). So losses never see packing, ranks or micro-batches. Where a pair's loss reads its own values
alone, slopes follow from the micro-batch. Where it reads the whole step, they follow from the logps of all the step's
pairs, on every rank alike.
"""

from dataclasses import dataclass, replace

import torch

from dpo_ds.config import Options
from dpo_ds.losses import formulas
from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.table import losses_of


@dataclass(frozen=True)
class Judged:
    """The losses of compared pairs, and the slopes of their weighted sum."""

    losses: torch.Tensor  # [B] the sum of the run's losses, each with its weight
    parts: torch.Tensor  # [B, k] of each of the k losses, without its weight
    slopes: torch.Tensor  # [B, 2] d (weights * losses).sum() / d x.policy

    def of(self, places: torch.Tensor, weight: float) -> "Judged":
        """Those of some of the pairs; the slopes times `weight`."""
        return Judged(self.losses[places], self.parts[places], weight * self.slopes[places])


class Objective:
    """The losses that a run's options name."""

    def __init__(self, options: Options):
        self.terms = losses_of(options)
        self.names = [term.name for term in self.terms]
        scopes = {term.loss.scope for term in self.terms}
        self.scope = "step" if "step" in scopes else "group" if "group" in scopes else "pair"

    def judge(self, x: Compared, certainty: torch.Tensor | None = None) -> Judged:
        """The losses of the pairs of `x`. certainty [B]: WPO's factor of each pair."""
        policy = x.policy.detach().requires_grad_()
        parts, losses = self._losses(replace(x, policy=policy), certainty)
        total = (x.weights * losses).sum()
        (slopes,) = torch.autograd.grad(total, policy)
        # A loss that is not finite makes the gradients so, for these are looked at before the update.
        return Judged(losses.detach(), parts.detach(), slopes + 0 * total.detach())

    def _losses(self, x: Compared, certainty: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [getattr(formulas, term.name)(x, term.settings).to(x.policy.dtype) for term in self.terms]
        losses = sum((term.weight * part for term, part in zip(self.terms, parts, strict=True)), x.policy.new_zeros(()))
        return torch.stack(parts, dim=1), losses if certainty is None else losses * certainty

    def rewards(self, x: Compared) -> torch.Tensor:
        """beta * log(policy / reference) by the run's first loss, [B, 2]. Where that is a loss of means over tokens
        without a reference: beta * the mean log-probability."""
        term = self.terms[0]
        beta = term.settings.beta if term.loss.beta else 1.0
        return beta * (x.means if term.loss.per_token and not term.loss.reference else x.log_ratios)

    def after(self, x: Compared) -> Running:
        """What is remembered after the step `x`."""
        momentum = next((term.settings.beta_momentum for term in self.terms if term.name == "beta_dpo"), 0.0)
        return formulas.after(x, momentum)
