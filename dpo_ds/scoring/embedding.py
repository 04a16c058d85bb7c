"""The input embedding of a model with tied weights: it shares one gradient [V, H] with the output head.

Autograd would allocate a second [V, H] gradient, zero except in the rows that were looked up, and add it to the head's.
The head's backward runs first, so the embedding adds its rows to that gradient instead.

Shapes: V vocabulary, H hidden size.
"""

import types

import torch
from transformers import PreTrainedModel


class TiedGradient:
    """Carries the head's gradient [V, H] to the embedding's backward. One object serves one forward and backward."""

    def __init__(self):
        self.gradient: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        gradient, self.gradient = self.gradient, None
        return gradient


def replace_embedding(model: PreTrainedModel) -> torch.nn.Embedding | None:
    """Gives a tied embedding `forward(ids, tied)`, whose backward adds its rows to the gradient in `tied`. Returns None
    and changes nothing if the weights are not tied, or if the embedding is not a plain lookup."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = getattr(embedding.forward, "__func__", None) is torch.nn.Embedding.forward
    if not plain or embedding.weight is not getattr(head, "weight", None):
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    plain_embedding = embedding.forward

    def forward(self, ids, tied=None):
        return plain_embedding(ids) if tied is None else _Lookup.apply(ids, self.weight, self.padding_idx, tied)

    embedding.forward = types.MethodType(forward, embedding)
    return embedding


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx, tied):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.tied = weight.shape, padding_idx, tied
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:  # torch gives that token no gradient
            grad = grad * (ids != ctx.padding_idx)[..., None]
        heads = ctx.tied.take()
        total = grad.new_zeros(ctx.shape) if heads is None else heads
        _add_rows(total, ids.flatten(), grad.flatten(0, -2).to(total.dtype))
        return None, total if heads is None else None, None, None


def _add_rows(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """total[ids] += rows, in a fixed order for each token: on CUDA index_put_ guarantees it, on CPU index_add_."""
    if total.is_cuda:
        total.index_put_((ids,), rows, accumulate=True)
    else:
        total.index_add_(0, ids, rows)
