"""The output head, fused with log-softmax and selection: hidden states and target tokens in, one log-probability each.

The [N, V] matrix of logits never exists: forward and backward go over it in tiles of vocabulary, each [N, v], backward
computes them again. Products are accumulated in fp32 (rounding logits to bf16 costs a quarter of a nat in a 128-token
sum). On CPU a tile stays in the cache, and is the same memory from first to last: twice the speed of one that does not.

`replace_head` puts it inside the model's own lm_head, called as a module, so that ZeRO-3's hooks gather the weight for
forward and again for backward, tied or not; an adapter on the head (LoRA) is a second product in every tile.

Shapes: N response tokens, H hidden size, V vocabulary, v columns of a tile, r the adapter's rank.
"""

import types

import torch

# Elements of one fp32 tile of logits, by device: 4 MiB, which CPUs' caches hold, and 128 MiB. Memory is counted on the
# meta device (activations.py), as of the device it stands for.
TILES = {"cpu": 2**20, "cuda": 2**25, "meta": 2**25}
FEWEST_COLUMNS = 256  # of a tile, however many rows there are


def replace_head(model) -> None:
    """Gives the model's lm_head `forward(hidden_NH, targets_N) -> logps_N` (fp32); without targets it is as before."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)
    linear = getattr(head, "base_layer", head)  # peft's wrapper holds the head itself there
    plain_linear = linear.forward

    def forward(self, hidden, targets=None, low=None, lora_B=None):
        if targets is None:
            return plain_linear(hidden)
        known = (hidden, self.weight, targets, getattr(self, "bias", None), scale, softcap, None)
        # Inside of lora_B's own call, so that both weights are gathered.
        return fused_logps(*known) if low is None else lora_B(low, known)

    linear.forward = types.MethodType(forward, linear)
    if linear is not head:
        _replace_adapter(head)


def _replace_adapter(head) -> None:
    """The same for peft's wrapper of a head with an adapter."""
    plain_wrapper = head.forward
    (name,) = head.lora_A
    lora_A, lora_B, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    plain_B = lora_B.forward

    def forward(self, hidden, targets=None):
        if targets is None:
            return plain_wrapper(hidden)
        return self.base_layer(hidden, targets, self.scaling[name] * lora_A(dropout(hidden)), lora_B)

    def forward_B(self, low, known=None):
        return plain_B(low) if known is None else fused_logps(*known, low=low, up=self.weight)

    head.forward = types.MethodType(forward, head)
    lora_B.forward = types.MethodType(forward_B, lora_B)


def fused_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: int | None = None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(softcap(scale * (hidden @ weight.T + low @ up.T + bias)))[targets], fp32 [N].

    hidden [N, H] and weight [V, H] of one dtype, targets [N] int64, bias [V]; low [N, r] and up [V, r], an adapter's,
    of that dtype. softcap(z) = c * tanh(z / c), as in Gemma 2 (arXiv 2408.00118, section 2). tile: elements of a tile
    of logits, by the device's kind if None.
    """
    tile = tile or TILES[hidden.device.type]
    return _FusedLogps.apply(hidden, weight, bias, low, up, targets, scale, softcap, tile)


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low, up, targets, scale, softcap, tile):
        tiles = _Tiles(hidden, weight, bias, low, up, scale, softcap, tile)
        log_norm_N = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        target_N = torch.zeros_like(log_norm_N)
        scratch = tiles.new()
        for columns in tiles:
            logits = tiles.logits(columns)
            inside, place = _places(targets, columns)
            target_N = torch.where(inside, logits.gather(1, place)[:, 0], target_N)
            # log softmax is x - log sum exp x, so at the largest x it tells the sum; and it is one pass, not four.
            log_shares = torch.log_softmax(logits, -1, out=tiles.like(scratch, columns))
            log_norm_N = torch.logaddexp(log_norm_N, logits.amax(-1) - log_shares.amax(-1))
        ctx.save_for_backward(hidden, weight, bias, low, up, targets, log_norm_N)
        ctx.constants = scale, softcap, tile
        return target_N - log_norm_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden, weight, bias, low, up, targets, log_norm_N = ctx.saved_tensors
        want_hidden, want_weight, want_bias, want_low, want_up = ctx.needs_input_grad[:5]
        tiles = _Tiles(hidden, weight, bias, low, up, *ctx.constants)
        scale, softcap, _ = ctx.constants
        grad_hidden, grad_low = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if want else None
            for x, want in ((hidden, want_hidden), (low, want_low))
        )
        grad_weight, grad_bias, grad_up = (
            torch.empty_like(x) if want else None
            for x, want in ((weight, want_weight), (bias, want_bias), (up, want_up))
        )
        for columns in tiles:
            logits = tiles.logits(columns)
            slope = 1 - (logits / softcap) ** 2 if softcap else None  # tanh' = 1 - tanh^2
            # d log p(target) / d logits = onehot(target) - softmax(logits)
            grad = logits.sub_(log_norm_N[:, None]).exp_()
            inside, place = _places(targets, columns)
            grad.scatter_add_(1, place, -inside[:, None].float())
            grad.mul_(-scale * grad_N[:, None])
            if softcap:
                grad.mul_(slope)
            if want_bias:
                grad_bias[columns] = grad.sum(0).to(bias.dtype)
            grad = grad.to(hidden.dtype)
            if want_weight:
                torch.mm(grad.t(), hidden, out=grad_weight[columns])
            if want_up:
                torch.mm(grad.t(), low, out=grad_up[columns])
            if want_hidden:
                _add_mm_fp32(grad_hidden, grad, weight[columns])
            if want_low:
                _add_mm_fp32(grad_low, grad, up[columns])
        if want_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        if want_low:
            grad_low = grad_low.to(low.dtype)
        return (grad_hidden, grad_weight, grad_bias, grad_low, grad_up, *[None] * 4)


class _Tiles:
    """Tiles of logits [N, v], fp32, one after another in the same memory: iterate over their columns."""

    def __init__(self, hidden, weight, bias, low, up, scale, softcap, tile):
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.low, self.up = low, up
        # On CPU products of bf16 would be rounded to bf16: they are made of fp32 copies.
        self.hidden = hidden.float() if hidden.device.type == "cpu" else hidden
        self.rows, self.vocabulary = len(hidden), len(weight)
        self.width = min(self.vocabulary, max(FEWEST_COLUMNS, tile // max(1, self.rows)))
        self.buffer = self.new()

    def new(self) -> torch.Tensor:
        return torch.empty(self.rows * self.width, dtype=torch.float32, device=self.hidden.device)

    def __iter__(self):
        # Where memory is counted, one tile takes as much as all of them.
        total = self.width if self.hidden.is_meta else self.vocabulary
        for start in range(0, total, self.width):
            yield slice(start, min(start + self.width, self.vocabulary))

    def like(self, memory: torch.Tensor, columns: slice) -> torch.Tensor:
        """[N, v] in memory from `new`; the last tile may be narrower."""
        width = columns.stop - columns.start
        return memory[: self.rows * width].view(self.rows, width)

    def logits(self, columns: slice) -> torch.Tensor:
        logits = _mm_fp32(self.hidden, self.weight[columns].t(), out=self.like(self.buffer, columns))
        if self.low is not None:
            _add_mm_fp32(logits, self.low, self.up[columns].t())
        if self.bias is not None:
            logits += self.bias[columns]
        if self.scale != 1.0:
            logits *= self.scale
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits


def _places(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets are among the columns, bool [N], and in which of them, int64 [N, 1] (any for the others)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _mm_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b as fp32, not rounded to b's dtype on the way."""
    if b.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda or a.is_meta:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b.float(), out=out)


def _add_mm_fp32(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in fp32."""
    if b.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda or a.is_meta:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())
