"""The metrics of preference pairs: loss, rewards, margins, accuracy."""

import torch


def preference_metrics(
    policy: torch.Tensor, reference: torch.Tensor, losses: torch.Tensor, beta: float
) -> torch.Tensor:
    """Returns [B, 7]: a row per pair, in the order of METRICS. policy and reference: logps [B, 2]; losses [B].

    A reward is beta * (policy logps - reference logps); equal rewards count as half right.
    """
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.unbind(1)
    margins = chosen - rejected
    right = (margins.sign() + 1) / 2
    return torch.stack([losses, chosen, rejected, right, margins, policy[:, 0], policy[:, 1]], dim=1)


METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
