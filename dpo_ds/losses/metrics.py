"""The metrics of preference pairs: loss, rewards, margins, accuracy."""

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


def names_of(losses: list[str]) -> list[str]:
    """The metrics of a run with these losses: each loss alone, too, where there are several."""
    return [*METRICS, *(f"loss/{name}" for name in losses if len(losses) > 1)]


def preference_metrics(x: Compared, judged: Judged, rewards: torch.Tensor) -> torch.Tensor:
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
        *(judged.parts.unbind(1) if judged.parts.shape[1] > 1 else ()),
    ]
    return torch.stack(rows, dim=1)
