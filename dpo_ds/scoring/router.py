"""The load-balancing loss of a mixture of experts, on packed pairs.

Shapes: T tokens of the pack, B pairs, E experts.
"""

import torch


def router_loss(
    router_logits: tuple[torch.Tensor, ...], token_pairs: torch.Tensor, pairs: int, top_k: int
) -> torch.Tensor:
    """E * sum over experts of (share of tokens sent there * mean probability of it), fp32 [B]: Fedus et al. 2021 (arXiv
    2101.03961, equations 4 to 6), with all layers' tokens together as transformers has it.

    router_logits: [T, E] of each layer; token_pairs: int64 [T], the pair of each token. The loss of a pair
    depends on its own tokens only (the prompt's count once), so neither packing nor dealing changes the sum over pairs.
    """
    experts = router_logits[0].shape[-1]
    ones = torch.ones(len(token_pairs), 1, device=token_pairs.device)
    tokens = len(router_logits) * torch.zeros(pairs, 1, device=token_pairs.device).index_add(0, token_pairs, ones)
    sent = torch.zeros(pairs, experts, device=token_pairs.device)
    probability = torch.zeros_like(sent)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        sent = sent.index_add(0, token_pairs, chosen)
        probability = probability.index_add(0, token_pairs, probabilities)
    return experts * (sent / tokens * probability / tokens).sum(-1)
