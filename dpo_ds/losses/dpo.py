"""Preference losses: pure functions from log-probability margins to one loss per pair.

A margin is log pi(chosen | prompt) - log pi(rejected | prompt), each summed over the response's tokens.
"""

import torch
import torch.nn.functional as F


def dpo_loss(policy_margins: torch.Tensor, reference_margins: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * (policy margin - reference margin)), [B]: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    If the policy equals the reference, the loss is ln 2 for every pair.
    """
    return -F.logsigmoid(beta * (policy_margins - reference_margins))
