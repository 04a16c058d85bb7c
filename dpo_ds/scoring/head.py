"""The output head, fused with log-softmax and selection: hidden states and target tokens in, one log-probability each.

The [N, V] matrix of logits never exists: forward goes over it in tiles of rows, backward computes it again in tiles of
vocabulary. Products are accumulated in fp32 (rounding logits to bf16 costs a quarter of a nat in a 128-token sum).

`replace_head` puts it inside the model's own lm_head, called as a module, so that ZeRO-3's hooks gather the weight for
forward and again for backward, tied or not.

Shapes: N response tokens, H hidden size, V vocabulary.
"""

import types

import torch

# Elements of one fp32 tile of logits: 2**23 are 32 MiB.
TILE = 2**23


def replace_head(model) -> None:
    """Gives the model's lm_head `forward(hidden_NH, targets_N) -> logps_N` (fp32); without targets it is as before."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    plain_forward = head.forward
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden, targets=None):
        if targets is None:
            return plain_forward(hidden)
        return fused_logps(hidden, self.weight, targets, getattr(self, "bias", None), scale, softcap)

    head.forward = types.MethodType(forward, head)


def fused_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """log softmax(softcap(scale * (hidden @ weight.T + bias)))[targets], fp32 [N].

    hidden [N, H] and weight [V, H] of one dtype, targets [N] int64, bias [V]. softcap(z) = c * tanh(z / c), as in
    Gemma 2 (arXiv 2408.00118, section 2).
    """
    return _FusedLogps.apply(hidden, weight, bias, targets, scale, softcap, tile)


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, tile):
        N, V = len(hidden), len(weight)
        log_norm_N = torch.empty(N, dtype=torch.float32, device=hidden.device)
        target_N = torch.empty_like(log_norm_N)
        step = max(1, tile // V)
        for i in _starts(hidden, N, step):
            rows = slice(i, i + step)
            logits = _logits(hidden[rows], weight, bias, scale, softcap)
            log_norm_N[rows] = torch.logsumexp(logits, dim=-1)
            target_N[rows] = logits.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm_N)
        ctx.constants = scale, softcap, tile
        return target_N - log_norm_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden, weight, bias, targets, log_norm_N = ctx.saved_tensors
        scale, softcap, tile = ctx.constants
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        N, V = len(hidden), len(weight)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        step = max(1, tile // N)
        for i in _starts(hidden, V, step):
            columns = slice(i, min(i + step, V))
            tile_weight = weight[columns]
            logits = _logits(hidden, tile_weight, None if bias is None else bias[columns], scale, softcap)
            # d log p(target) / d logits = onehot(target) - softmax(logits)
            grad = torch.exp(logits - log_norm_N[:, None]).mul_(-grad_N[:, None])
            inside = (targets >= i) & (targets < columns.stop)
            column = torch.where(inside, targets - i, 0)[:, None]
            grad.scatter_add_(1, column, torch.where(inside, grad_N, 0)[:, None])
            if softcap:
                grad.mul_(1 - (logits / softcap) ** 2)  # tanh' = 1 - tanh^2
            grad.mul_(scale)
            if want_bias:
                grad_bias[columns] = grad.sum(0).to(bias.dtype)
            grad = grad.to(hidden.dtype)
            if want_weight:
                torch.mm(grad.t(), hidden, out=grad_weight[columns])
            if want_hidden:
                grad_hidden += _mm_fp32(grad, tile_weight)
        return (grad_hidden.to(hidden.dtype) if want_hidden else None, grad_weight, grad_bias, *[None] * 4)


def _starts(hidden: torch.Tensor, total: int, step: int) -> range:
    """Where tiles begin; where memory is counted (activations.py), one tile takes as much as all of them."""
    return range(0, step if hidden.is_meta else total, step)


def _logits(hidden, weight, bias, scale, softcap) -> torch.Tensor:
    logits = _mm_fp32(hidden, weight.t())
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as fp32, not rounded to the inputs' dtype on the way."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda or a.is_meta:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
