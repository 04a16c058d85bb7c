"""Attention over packed pairs: one function for every architecture, registered once for each kernel.

A model is loaded with `attn_implementation=implementation(kernel)`, so its config names its kernel. Flash kernels serve
GPUs in bf16. Scaled-dot-product attention, one segment at a time, serves everything else, such as CPUs. All kernels
compute the same: queries and keys in segments, causal, aligned at the bottom right (row r of a segment sees columns up
to r + keys - queries). Dropout is always off: a DPO policy and its reference must be the same function.

Shapes: T query rows, K key rows (prompts twice), H heads, G key-value heads, D head dimension.
"""

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from dpo_ds.errors import UserError, one_line
from dpo_ds.scoring.packed import CannotPack, Layout, is_segments, layout_of


def packed_attention(
    kernel: Callable,
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `attention_mask` is PackedBatch.segments. transformers' window counts the token itself; None means no window.
    """
    if not is_segments(attention_mask):
        raise CannotPack(
            f"{type(module).__name__} did not pass the segments on to its attention: this architecture cannot be "
            "scored with packed pairs"
        )
    if kwargs.get("s_aux") is not None:
        raise CannotPack(f"{type(module).__name__} uses attention sinks, which packed attention does not support")
    layout = layout_of(attention_mask, query.device)
    query_THD = query[0].transpose(0, 1)
    key_KGD, value_KGD = (x[0].transpose(0, 1).index_select(0, layout.key_rows) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    out_THD = kernel(query_THD, key_KGD, value_KGD, layout, scale, sliding_window, softcap)
    return out_THD[None], None


def _flash_attention_3(query, key, value, layout: Layout, scale, window, softcap):
    name = "flash_attn_interface", "flash_attn_varlen_func"
    flash_attn_varlen_func = _installed(*name) or _from_hub(*name)
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        *layout.offsets,
        layout.longest_query,
        layout.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[0] if isinstance(out, tuple) else out  # earlier builds also return the log-sum-exp


def _flash_attention_2(query, key, value, layout: Layout, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        *layout.offsets,
        layout.longest_query,
        layout.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _torch_varlen(query, key, value, layout: Layout, scale, window, softcap):
    from torch.nn.attention.varlen import varlen_attn

    assert not softcap, "usable() offers no varlen kernel to such models"
    # With fewer key heads than query heads, torch needs enable_gqa from 2.12 on; 2.11 has no such argument.
    shared = query.shape[1] != key.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"enable_gqa": True} if shared else {}
    return varlen_attn(
        query,
        key,
        value,
        *layout.offsets,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **more,
    )


def _per_segment(query, key, value, layout: Layout, scale, window, softcap):
    # split() instead of slices: in backward, each slice would allocate zeros of the whole tensor.
    queries, keys = ([end - start for start, end in pairwise(o)] for o in (layout.query_offsets, layout.key_offsets))
    outputs = []
    for parts in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        mask = None
        if softcap or window is not None or q.shape[2] != k.shape[2]:
            mask = visible(q.shape[2], k.shape[2], window, query.device)
        if softcap:
            out = _softcapped(q, k, v, mask, scale, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def visible(queries: int, keys: int, window: int | None, device) -> torch.Tensor:
    """[queries, keys] bool: causal, aligned at the bottom right; a row sees at most `window` keys, its own included."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def _softcapped(q, k, v, mask, scale, softcap):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    weights = scores.float().masked_fill(~mask, -math.inf).softmax(-1)
    return weights.to(v.dtype) @ v


def _sizes_only(query, key, value, *_):
    """Allocates and keeps what a flash kernel does, to count memory on the meta device (plan/activations.py)."""
    return _SizesOnly.apply(query, key, value)


class _SizesOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        torch.empty_like(query, dtype=torch.float32)  # flash-attention accumulates the queries' gradient in fp32
        return tuple(torch.empty_like(x) for x in (query, key, value))


# ------------------------------------------------------------------------------------------------------- which kernel


@dataclass(frozen=True)
class Kernel:
    """An attention kernel: where to find it, and what it supports. All but sdpa need bf16 on CUDA."""

    call: Callable
    module: str | None = None  # must be installed
    function: str = ""  # the module must have it
    words: frozenset[str] = frozenset()  # the function must have these arguments
    softcap: bool = True
    head_dim: int = 256  # the largest that is supported
    capabilities: range = range(8, 100)  # major numbers of CUDA's compute capability
    remedy: str = ""


SDPA = "sdpa"
# The fastest first.
KERNELS = {
    "flash_attention_3": Kernel(
        _flash_attention_3,
        "flash_attn_interface",
        "flash_attn_varlen_func",
        frozenset({"softmax_scale", "causal", "window_size", "softcap"}),
        capabilities=range(9, 10),
        remedy="pip install kernels, or build it from flash-attention's hopper folder",
    ),
    "flash_attention_2": Kernel(
        _flash_attention_2,
        "flash_attn",
        "flash_attn_varlen_func",
        frozenset({"softmax_scale", "causal", "window_size", "softcap"}),
        remedy="pip install flash-attn",
    ),
    "varlen": Kernel(
        _torch_varlen,
        "torch.nn.attention.varlen",
        "varlen_attn",
        frozenset({"scale", "window_size"}),  # torch 2.10 has neither
        softcap=False,
        remedy="torch 2.11 or newer has it",
    ),
    SDPA: Kernel(_per_segment),
}
SIZES_ONLY = "sizes_only"
# Kernels that nobody needs to build: by module, the hub's repository and version, from which the package `kernels`
# loads them. It looks in the folders of LOCAL_KERNELS first, and under HF_HUB_OFFLINE only in the hub's cache. This is
# code from the hub, so the user must have named the kernel.
ON_HUB = {"flash_attn_interface": ("kernels-community/flash-attn3", 1)}


def implementation(kernel: str) -> str:
    """What transformers calls a kernel of KERNELS: the `attn_implementation` to load a model with."""
    # The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers looks for these.
    return f"dpo_packed_{[*KERNELS, SIZES_ONLY].index(kernel)}"


for _name, _call in [*((name, kernel.call) for name, kernel in KERNELS.items()), (SIZES_ONLY, _sizes_only)]:
    AttentionInterface.register(implementation(_name), functools.partial(packed_attention, _call))


def require_packed(model: PreTrainedModel) -> None:
    """Raises AssertionError if a model was loaded with an attention that does not support segments."""
    found = model.config._attn_implementation
    known = [implementation(name) for name in (*KERNELS, SIZES_ONLY)]
    assert found in known, f"load the model with attn_implementation=attention.implementation(…), not {found}"


def capability() -> tuple[int, int] | None:
    """CUDA's compute capability of this process's GPU; None on CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def usable(wanted: str, config: PreTrainedConfig, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[str]:
    """The kernels that support a model of `config`, the fastest first; or the wanted one alone.

    Raises UserError, with the remedy, if the wanted one does not support it.
    """
    obstacles = {name: _obstacle(name, config, dtype, capability, name == wanted) for name in KERNELS}
    found = [name for name, obstacle in obstacles.items() if not obstacle]
    if wanted == "auto":
        return found
    if obstacles[wanted]:
        raise UserError(f"--attention {wanted} {obstacles[wanted]}; what works here: auto, {', '.join(found)}")
    return [wanted]


def _obstacle(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, capability: tuple[int, int] | None, asked: bool
) -> str | None:
    """Why a kernel cannot be used, or None. asked: the user named it."""
    kernel = KERNELS[name]
    if kernel.module is None:
        return None
    if capability is None:
        return "needs a GPU"
    if capability[0] not in kernel.capabilities:
        return f"is not for GPUs of compute capability {capability[0]}.{capability[1]}"
    words = _arguments(kernel.module, kernel.function)
    if words is None and asked and kernel.module in ON_HUB and importlib.util.find_spec("kernels") is not None:
        try:
            words = frozenset(inspect.signature(_from_hub(kernel.module, kernel.function)).parameters)
        except Exception as error:  # no network, or no build for this torch, CUDA and GPU
            return f"cannot be had from the hub: {one_line(error, 200)}"
    if words is None:
        return f"is not installed ({kernel.remedy})"
    if missing := kernel.words - words:
        return f"takes no {min(missing)} in the version that is installed ({kernel.remedy})"
    if dtype == torch.float32:
        return "has no fp32 (--precision bf16)"
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and not kernel.softcap:
        return f"has no soft-capping, which {type(config).__name__.removesuffix('Config')} needs"
    if getattr(text, "kv_lora_rank", None):
        return "needs keys and values of the same width"
    head_dim = head_dim_of(text)
    if head_dim > kernel.head_dim:
        return f"supports head dimensions up to {kernel.head_dim}, not {head_dim}"
    if head_dim % 8:
        return f"needs a head dimension that is a multiple of 8, not {head_dim}"
    return None


def head_dim_of(text_config: PreTrainedConfig) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


@functools.cache
def _arguments(module: str, function: str) -> frozenset[str] | None:
    """The names of the installed kernel's arguments; None if it is not installed."""
    found = _installed(module, function)
    return None if found is None else frozenset(inspect.signature(found).parameters)


@functools.cache
def _installed(module: str, function: str) -> Callable | None:
    """The kernel's function; None if it is not installed."""
    try:
        if importlib.util.find_spec(module) is not None:
            return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError):  # a part is missing, or it was built for another torch
        pass
    return None


@functools.cache
def _from_hub(module: str, function: str) -> Callable:
    """The function of a kernel on the hub. Raises whatever the package `kernels` raises."""
    from kernels import get_kernel

    name, version = ON_HUB[module]
    return getattr(get_kernel(name, version=version), function)
