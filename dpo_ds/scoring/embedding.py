"""The input embedding of a model whose head has the same weight: one gradient [V, H] for both uses.

autograd would make the embedding's as zeros of that size with a few rows among them, and add it to the head's. But the
head's is there first, waiting for the embedding's: whose backward adds its rows to it instead.

Shapes: V vocabulary, H hidden size.
"""

import types

import torch


class Handover:
    """Of one forward and its backward: the head's gradient, until the embedding's backward has taken it."""

    def __init__(self):
        self.gradient: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        gradient, self.gradient = self.gradient, None
        return gradient


def replace_embedding(model) -> torch.nn.Embedding | None:
    """Gives the model's embedding, if the head has its weight, a forward that leaves a new Handover in its attribute
    `handover` for the head. None, and nothing changed, if it has not, or does more than look rows up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = getattr(embedding.forward, "__func__", None) is torch.nn.Embedding.forward
    if not plain or embedding.weight is not getattr(head, "weight", None):
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    plain_embedding = embedding.forward

    def forward(self, ids):
        self.handover = None
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return plain_embedding(ids)
        self.handover = Handover()
        return _Lookup.apply(ids, self.weight, self.padding_idx, self.handover)

    embedding.handover = None
    embedding.forward = types.MethodType(forward, embedding)
    return embedding


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx, handover):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.handover = weight.shape, padding_idx, handover
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:  # torch learns nothing from that token
            grad = grad * (ids != ctx.padding_idx)[..., None]
        waiting = ctx.handover.take()
        total = grad.new_zeros(ctx.shape) if waiting is None else waiting
        # Unlike index_add_, it adds up a token's rows in the same order each time on CUDA.
        total.index_put_((ids,), grad.to(total.dtype), accumulate=True)
        return None, total if waiting is None else None, None, None
