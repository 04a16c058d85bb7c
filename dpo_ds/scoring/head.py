"""The output head, fused with log-softmax and selection: from hidden states and target tokens to log-probabilities.

The [N, V] matrix of logits never exists: logits are computed one vocabulary tile [N, v] at a time, and again in
backward. Products are accumulated in fp32 (rounding logits to bf16 changes a 128-token sum by a quarter of a nat). On
CPU, tiles share memory that fits into the cache, which doubles the speed. Models on CPU are small, and the head is most
of their work: there, as many tiles as fit into KEPT_ON_CPU are kept for backward.

`replace_head` puts this computation into the model's own lm_head. The lm_head is called as a module, so ZeRO-3's hooks
gather its weight for forward and again for backward, tied or not. A LoRA adapter on the head is a second product in
every tile.

Shapes: N response tokens, H hidden size, V vocabulary, v columns of a tile, r the adapter's rank. An adapter has two
weights, as in export.py: down [r, H] (peft's lora_A) and up [V, r] (lora_B).
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_ds.scoring.embedding import TiedGradient
from dpo_ds.scoring.packed import CannotPack

FEWEST_COLUMNS = 256  # the least width of a tile, for any number of rows
WIDE = 8192  # columns with which a product of many rows comes near a GPU's speed (an estimate)
KEPT_ON_CPU = 2**25  # logits, 128 MiB


@dataclass(frozen=True)
class LogitBudget:
    """How many fp32 logits the head may hold: in one tile, in the tiles that forward keeps for backward, and in a tile
    of many rows, so that it still has WIDE columns."""

    tile: int
    kept: int = 0
    wide: int = 0

    @classmethod
    def on(cls, gpu_memory: int | None) -> "LogitBudget":
        """On a GPU with this many bytes, a tile takes a 512th of them, 128 MiB at most; one of many rows a 128th, 512
        MiB at most. On CPU (None), it takes half a MiB per thread, which fits into the cache of its core."""
        if gpu_memory is None:
            return cls(2**17 * torch.get_num_threads(), KEPT_ON_CPU)
        return cls(min(gpu_memory // 2048, 2**25), wide=min(gpu_memory // 512, 2**27))

    @classmethod
    def of(cls, device: torch.device) -> "LogitBudget":
        """The budget on a device. It must not be the meta device: who counts memory there must pass a budget."""
        assert device.type != "meta", "give fused_logps the budget of the device that meta stands for"
        return cls.on(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)


@dataclass(frozen=True)
class HeadInputs:
    """The inputs of fused_logps, apart from an adapter's."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H], of the same dtype
    targets: torch.Tensor  # [N] int64
    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    budget: LogitBudget | None = None  # None: by the device
    tied: TiedGradient | None = None  # for tied weights: backward leaves the weight's gradient here
    collisions: torch.Tensor | None = None  # [N] fp32: forward writes log sum over the vocabulary of p^2 here


def replace_head(model: PreTrainedModel) -> None:
    """Gives the model's lm_head `forward(hidden_NH, targets_N, budget, tied, collisions) -> logps_N` (fp32). Without
    targets, its forward is unchanged."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)
    linear = getattr(head, "base_layer", head)  # peft's wrapper keeps the head there
    plain_linear = linear.forward

    def forward(self, hidden, targets=None, budget=None, tied=None, collisions=None, low=None, up_layer=None):
        if targets is None:
            return plain_linear(hidden)
        if hidden.shape[1] != self.weight.shape[1]:  # a further layer stands between body and head, as in ELECTRA
            raise CannotPack(f"its head takes {self.weight.shape[1]} numbers, but its body gives {hidden.shape[1]}")
        bias = getattr(self, "bias", None)
        inputs = HeadInputs(hidden, self.weight, targets, bias, scale, softcap, budget, tied, collisions)
        # With an adapter, the product is made inside the up layer's own call, so that ZeRO-3 has gathered both weights.
        return fused_logps(inputs) if low is None else up_layer(low, inputs)

    linear.forward = types.MethodType(forward, linear)
    if linear is not head:
        _replace_adapter(head)


def _replace_adapter(head: Any) -> None:
    """The same for peft's wrapper of a head with an adapter, whose layers scoring/adapters.py has replaced."""
    plain_wrapper = head.forward
    (name,) = head.lora_A
    down_layer, up_layer, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    plain_up = up_layer.forward

    def forward(self, hidden, targets=None, budget=None, tied=None, collisions=None):
        if targets is None:
            return plain_wrapper(hidden)
        low = self.scaling[name] * down_layer(dropout(hidden))
        return self.base_layer(hidden, targets, budget, tied, collisions, low, up_layer)

    def forward_up(self, low, inputs=None):
        """inputs: HeadInputs; or, where no targets are given, the base's result."""
        if not isinstance(inputs, HeadInputs):
            return plain_up(low, inputs)
        return fused_logps(inputs) if head.left_out else fused_logps(inputs, low, self.weight)

    head.forward = types.MethodType(forward, head)
    up_layer.forward = types.MethodType(forward_up, up_layer)


def fused_logps(inputs: HeadInputs, low: torch.Tensor | None = None, up: torch.Tensor | None = None) -> torch.Tensor:
    """log softmax(softcap(scale * (hidden @ weight.T + low @ up.T + bias)))[targets], fp32 [N].

    With an adapter, low [N, r] is scaling * dropout(hidden) @ down.T, and up [V, r] its up weight; both have the
    weight's dtype. softcap(z) = c * tanh(z / c), as in Gemma 2 (arXiv 2408.00118, section 2).
    """
    budget = inputs.budget or LogitBudget.of(inputs.hidden.device)
    if not torch.is_grad_enabled():
        budget = replace(budget, kept=0)
    return _FusedLogps.apply(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        low,
        up,
        inputs.targets,
        inputs.scale,
        inputs.softcap,
        budget,
        inputs.tied,
        inputs.collisions,
    )


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low, up, targets, scale, softcap, budget, tied, collisions):
        tiles = _Tiles(hidden, weight, bias, low, up, scale, softcap, budget)
        target_N = tiles.logits_of(targets)  # first, before a tile takes memory
        log_norm_N = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        squares_N = log_norm_N.clone()  # log sum exp 2 x
        for columns in tiles:
            logits = tiles.logits(columns)
            largest = logits.amax(-1)
            # softmax is exp(x - log sum exp x), so its value at the largest x gives the sum. It needs no second tile,
            # backward uses it, and on CPU it takes less time than exp alone.
            shares = torch.softmax(logits, -1, out=logits)
            tile_norm_N = largest - shares.amax(-1).log_()
            if collisions is not None:
                tile_squares_N = 2 * (torch.linalg.vector_norm(shares, dim=-1).log() + tile_norm_N)
                squares_N = torch.logaddexp(squares_N, tile_squares_N)
            tiles.keep(columns, shares, tile_norm_N[:, None])
            log_norm_N = torch.logaddexp(log_norm_N, tile_norm_N)
        ctx.save_for_backward(hidden, weight, bias, low, up, targets, log_norm_N)
        ctx.constants, ctx.kept, ctx.tied = (scale, softcap, budget), tiles.kept, tied
        if collisions is not None:
            collisions.copy_(squares_N - 2 * log_norm_N)
        return target_N - log_norm_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden, weight, bias, low, up, targets, log_norm_N = ctx.saved_tensors
        want_hidden, want_weight, want_bias, want_low, want_up = ctx.needs_input_grad[:5]
        scale, softcap, budget = ctx.constants
        tiles = _Tiles(hidden, weight, bias, low, up, scale, softcap, budget, ctx.kept)
        ctx.kept = {}  # the tiles are changed in place: another backward computes them again
        # A row's factor is applied to the small matrices of the products, not to every tile.
        share_N1 = -scale * grad_N[:, None]
        to_hidden = _SummedGradient(hidden, weight) if want_hidden else None
        to_low = _SummedGradient(low, up) if want_low else None
        to_weight = _TiledGradient(weight, hidden, share_N1) if want_weight else None
        to_up = _TiledGradient(up, low, share_N1) if want_up else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        for columns in tiles:
            # -d log p(target) / d logits = softmax(logits) - onehot(target)
            grad, slope = tiles.shares(columns, log_norm_N[:, None])
            inside, place = _places(targets, columns)
            grad.scatter_add_(1, place, -inside[:, None].float())
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns] = (share_N1.t() @ grad)[0].to(bias.dtype)
            grad = grad.to(hidden.dtype)
            for side in (to_weight, to_up, to_hidden, to_low):
                if side is not None:
                    side.add(grad, columns)
        grad_hidden = to_hidden.take(share_N1) if to_hidden else None
        grad_low = to_low.take(share_N1) if to_low else None
        grad_weight = to_weight.gradient if to_weight else None
        grad_up = to_up.gradient if to_up else None
        if ctx.tied is not None:
            ctx.tied.gradient = grad_weight
        return (grad_hidden, grad_weight, grad_bias, grad_low, grad_up, *[None] * 6)


# The logits are sums of products rows @ columns.T: hidden @ weight.T, and an adapter's low @ up.T.


class _SummedGradient:
    """Of hidden or low, whose every number meets all columns: summed over the tiles, in fp32."""

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor):
        self.dtype, self.columns = rows.dtype, columns
        self.total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)

    def add(self, grad: torch.Tensor, columns: slice) -> None:
        _add_mm_fp32(self.total, grad, self.columns[columns])

    def take(self, share_N1: torch.Tensor) -> torch.Tensor:
        return self.total.mul_(share_N1).to(self.dtype)


class _TiledGradient:
    """Of weight or up, whose every number meets a single column: each tile writes its own part."""

    def __init__(self, columns: torch.Tensor, rows: torch.Tensor, share_N1: torch.Tensor):
        self.gradient = torch.empty_like(columns)
        self.shared = (rows * share_N1).to(rows.dtype)

    def add(self, grad: torch.Tensor, columns: slice) -> None:
        _mm(grad.t(), self.shared, out=self.gradient[columns])


class _Tiles:
    """Tiles of logits [N, v] in fp32. Iterate over it to get each tile's columns. All tiles use the same memory, except
    those that are kept for backward: for these, `kept` has the tile's softmax and its log-sum-exp [N, 1]."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor | None,
        up: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        budget: LogitBudget,
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.adapter = None if low is None or up is None else (low, up)
        # On CPU, products of bf16 matrices are rounded to bf16, so fp32 copies are used.
        self.hidden = hidden.float() if hidden.device.type == "cpu" else hidden
        self.rows, self.vocabulary = len(hidden), len(weight)
        fitting, wide = (size // max(1, self.rows) for size in (budget.tile, budget.wide))
        self.width = min(self.vocabulary, max(FEWEST_COLUMNS, fitting, min(WIDE, wide)))
        # With a soft cap, backward needs the logits themselves, so no tile is kept.
        self.most_kept = 0 if softcap else budget.kept // max(1, self.rows * self.width)
        self.kept = {} if kept is None else kept
        self.memory: torch.Tensor | None = None

    def __iter__(self) -> Iterator[slice]:
        # On the meta device only memory counts, so one tile stands for all that share its memory.
        total = self.width * (1 + self.most_kept) if self.hidden.is_meta else self.vocabulary
        for start in range(0, min(total, self.vocabulary), self.width):
            yield slice(start, min(start + self.width, self.vocabulary))

    def keep(self, columns: slice, shares: torch.Tensor, norm_N1: torch.Tensor) -> None:
        """Keeps a tile for backward, if the budget allows."""
        if len(self.kept) < self.most_kept:
            self.kept[columns.start] = shares, norm_N1
            self.memory = None

    def logits(self, columns: slice) -> torch.Tensor:
        """The logits of these columns, [N, v]."""
        return self._bend(self._products(columns, None if self.bias is None else self.bias[columns]))

    def shares(self, columns: slice, log_norm_N1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """exp(logits - log_norm), [N, v], and the slope of the soft cap, 1 - tanh^2, or None without one."""
        if columns.start in self.kept:
            shares, norm_N1 = self.kept.pop(columns.start)
            return shares.mul_((norm_N1 - log_norm_N1).exp_()), None
        if self.bias is None and self.scale == 1.0 and not self.softcap:  # saves one pass over the tile
            return self._products(columns, -log_norm_N1).exp_(), None
        logits = self.logits(columns)
        slope = 1 - (logits / self.softcap) ** 2 if self.softcap else None
        return logits.sub_(log_norm_N1).exp_(), slope

    def _products(self, columns: slice, start: torch.Tensor | None) -> torch.Tensor:
        if self.memory is None:
            self.memory = torch.empty(self.rows * self.width, dtype=torch.float32, device=self.hidden.device)
        width = columns.stop - columns.start  # the last tile may be narrower
        products = self.memory[: self.rows * width].view(self.rows, width)
        _mm_fp32(self.hidden, self.weight[columns].t(), products, start)
        if self.adapter is not None:
            low, up = self.adapter
            _add_mm_fp32(products, low, up[columns].t())
        return products

    def _bend(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits *= self.scale
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def logits_of(self, targets: torch.Tensor) -> torch.Tensor:
        """The logit of each row's target, fp32 [N]. It takes as many rows at a time as fit into a tile's memory."""
        rows = max(1, self.rows * self.width // (4 * self.weight.shape[1]))
        logits = torch.cat(
            [self._some_logits_of(targets, slice(n, n + rows)) for n in range(0, max(1, self.rows), rows)]
        )
        return self._bend(logits)

    def _some_logits_of(self, targets: torch.Tensor, rows: slice) -> torch.Tensor:
        targets = targets[rows]
        logits = (self.hidden[rows].float() * self.weight[targets].float()).sum(-1)
        if self.adapter is not None:
            low, up = self.adapter
            logits += (low[rows].float() * up[targets].float()).sum(-1)
        if self.bias is not None:
            logits += self.bias[targets]
        return logits


def _places(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is in these columns, bool [N], and its place in them, int64 [N, 1] (0 for the others)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b. On CPU, MKL adds to zeros a tenth faster than it writes (torch 2.13, benchmarks/README.md)."""
    if a.device.type == "cpu":
        torch.addmm(out.zero_(), a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _mm_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, start: torch.Tensor | None) -> None:
    """out = start + a @ b in fp32, without rounding to b's dtype. `start` is broadcast to out's shape; None is 0."""
    if a.device.type == "cpu":
        _add_mm_fp32(out.zero_() if start is None else out.copy_(start), a, b)
        return
    if b.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    if start is not None:
        out += start


def _add_mm_fp32(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in fp32. (torch's FlopCounterMode counts addmm, not addmm_.)"""
    if b.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda or a.is_meta:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)
