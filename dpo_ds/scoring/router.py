"""The load-balancing loss of a mixture of experts, on packed pairs.

Shapes: T tokens of the pack, Q sequences (prompts and answers), B pairs, E experts.
"""

import torch

from dpo_ds.scoring.packed import PackedBatch


def router_loss(router_logits: tuple[torch.Tensor, ...], batch: PackedBatch, top_k: int) -> torch.Tensor:
    """E * sum over experts of (share of tokens sent there * mean probability of it), fp32 [B]: Fedus et al. 2021 (arXiv
    2101.03961, equations 4 to 6), with all layers' tokens together as transformers has it.

    router_logits: [T, E] of each layer. The loss of a pair depends on its own tokens only (the prompt's count once), so
    neither packing nor dealing nor other answers of its group change it.
    """
    experts = router_logits[0].shape[-1]
    owners_T = batch.token_sequences
    ones = torch.ones(len(owners_T), 1, device=owners_T.device)
    tokens_Q = len(router_logits) * torch.zeros(batch.sequences, 1, device=owners_T.device).index_add(0, owners_T, ones)
    sent_QE = torch.zeros(batch.sequences, experts, device=owners_T.device)
    probability_QE = torch.zeros_like(sent_QE)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        sent_QE = sent_QE.index_add(0, owners_T, chosen)
        probability_QE = probability_QE.index_add(0, owners_T, probabilities)
    # A pair's tokens are those of its prompt, its chosen and its rejected answer.
    tokens, sent, probability = (
        of_sequence[batch.pair_sequences].sum(dim=1) for of_sequence in (tokens_Q, sent_QE, probability_QE)
    )
    return experts * (sent / tokens * probability / tokens).sum(-1)
