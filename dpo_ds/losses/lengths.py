"""LD-DPO: what a longer answer has beyond the shorter one's length counts less (Liu et al. 2024, arXiv 2409.06411)."""

import torch


def length_desensitised(
    tokens: torch.Tensor,
    token_answers: torch.Tensor,
    answers: int,
    shared: torch.Tensor,
    pairs: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """The logps of each pair's answers, [B, 2]: the sum over the tokens up to the shorter answer's length, plus alpha
    times the sum over the rest.

    tokens [N]: logps of the learned tokens of so many `answers`. token_answers [N] int64: the answer of each.
    shared [M, 2] int64: scoring.packed.shared_tokens. pairs [B, 2] int64.
    """
    sums = tokens.new_zeros(answers).index_add(0, token_answers, tokens)
    token, side = shared.unbind(1)
    early = tokens.new_zeros(2 * len(pairs)).index_add(0, side, tokens[token]).view(-1, 2)
    return (1 - alpha) * early + alpha * sums[pairs]
