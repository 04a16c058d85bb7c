"""The metrics of preference pairs: loss, rewards, margins, accuracy. What TRL has is named as it is there."""

import torch

from dpo_ds.losses.compared import Compared
from dpo_ds.losses.objective import Judged

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "logps_per_token/chosen",
    "logps_per_token/rejected",
    "log_ratios/chosen",
    "log_ratios/rejected",
)


def names_of(losses: list[str], reference: bool) -> list[str]:
    """The metrics of a run with these losses: with `kl` if there is a reference, and with each loss alone if there are
    several."""
    return [*METRICS, *(["kl"] if reference else []), *(f"loss/{name}" for name in losses if len(losses) > 1)]


def preference_metrics(x: Compared, judged: Judged, rewards: torch.Tensor, reference: bool) -> torch.Tensor:
    """Returns [B, k]: a row per pair, in the order of names_of. rewards: [B, 2].

    Equal rewards count as half right. A log-ratio is log(policy / reference).
    """
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins.sign() + 1) / 2
    rows = [
        judged.losses,
        *rewards.unbind(1),
        right,
        margins,
        *x.policy.unbind(1),
        *x.lengths.to(rewards).unbind(1),
        *x.means.unbind(1),
        *x.log_ratios.unbind(1),
        *([kl_per_token(x).mean(1)] if reference else []),
        *(judged.parts.unbind(1) if judged.parts.shape[1] > 1 else ()),
    ]
    return torch.stack(rows, dim=1)


def kl_per_token(x: Compared) -> torch.Tensor:
    """How far the policy is from the reference on each answer, in nats a token: [B, 2], never negative, 0 at the start.

    Schulman's k3 = r - 1 - log r, r = reference / policy (http://joschu.net/blog/kl-approx.html), of an answer's mean
    log-ratio per token. k3 is convex, so this is at most the mean of k3 over the answer's tokens.

    NOTE, no KL divergence: k3 estimates KL(policy || reference) on answers that the policy itself has sampled. The
    data's answers are not: a policy that has moved elsewhere only is not seen, and one that has left an answer far
    behind counts for much more than its divergence, e^d for d nats a token.
    """
    log_ratios = x.log_ratios / x.lengths
    return torch.expm1(-log_ratios) + log_ratios
