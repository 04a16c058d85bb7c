"""Attention over packed pairs: one function, registered with transformers, that serves every architecture.

Its kernel is chosen once per process (`use`), by the device and the model's heads: flash-attention 3 or 2 where they
are installed, torch's own varlen flash kernel on other GPUs, and scaled-dot-product attention segment by segment where
none of them will do, as on CPU. All take the same thing:
queries and keys in segments, causal, aligned at the bottom right (row r of a segment sees columns up to
r + keys - queries). Dropout is always off: a DPO policy and its reference must be the same function.

Shapes: T query rows, K key rows (prompts twice), H heads, G key-value heads, D head dimension.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from dpo_ds.scoring.packed import segments_of

# Must hold none of "flash", "sdpa", "flex_attention", "/": transformers looks for these words in the name.
NAME = "dpo_packed_pairs"


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `attention_mask` is PackedBatch.layout. transformers' window counts the token itself; None is no window.
    """
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.int32:
        raise ValueError(
            f"{type(module).__name__} did not hand the packed layout on to its attention: this architecture cannot be "
            "scored with packed pairs"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks, which packed attention has no kernel for")
    segments = segments_of(attention_mask)
    key_rows = attention_mask[0, 0, 0, : segments.key_offsets[-1]]
    query_THD = query[0].transpose(0, 1)
    key_KGD, value_KGD = (x[0].transpose(0, 1).index_select(0, key_rows) for x in (key, value))
    kernel = _in_use.get(query.device.type, _per_segment)
    out_THD = kernel(
        query_THD,
        key_KGD,
        value_KGD,
        segments,
        1 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        sliding_window,
        softcap,
    )
    return out_THD[None], None


AttentionInterface.register(NAME, packed_attention)


def _flash_attention_3(query, key, value, segments, scale, window, softcap):
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        query,
        key,
        value,
        *segments.on_device,
        segments.longest_query,
        segments.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[0] if isinstance(out, tuple) else out  # earlier builds return the sums of exponents as well


def _flash_attention_2(query, key, value, segments, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        *segments.on_device,
        segments.longest_query,
        segments.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _torch_varlen(query, key, value, segments, scale, window, softcap):
    from torch.nn.attention.varlen import varlen_attn

    assert not softcap, "choose() gives such models another kernel"
    return varlen_attn(
        query,
        key,
        value,
        *segments.on_device,
        segments.longest_query,
        segments.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _per_segment(query, key, value, segments, scale, window, softcap):
    # Split at once: backward puts the parts together once, where slices would each make zeros of the whole.
    queries, keys = (
        [end - start for start, end in pairwise(o)] for o in (segments.query_offsets, segments.key_offsets)
    )
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
    """[queries, keys] bool: causal, aligned at the bottom right, at most `window` back (the token itself counted)."""
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
    """For counting memory on the meta device (activations.py): what a flash kernel keeps and allocates."""
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
    """An implementation, where to find it, and what it can do. All but the last want bf16 on CUDA."""

    call: Callable
    module: str | None = None  # that must be installed
    softcap: bool = True
    head_dim: int = 256  # at most
    capabilities: range = range(8, 100)  # major numbers of CUDA's compute capability
    remedy: str = ""


# The fastest first.
KERNELS = {
    "flash_attention_3": Kernel(
        _flash_attention_3,
        "flash_attn_interface",
        capabilities=range(9, 10),
        remedy="build it from flash-attention's hopper folder",
    ),
    "flash_attention_2": Kernel(_flash_attention_2, "flash_attn", remedy="pip install flash-attn"),
    "varlen": Kernel(_torch_varlen, "torch.nn.attention.varlen", softcap=False, remedy="torch 2.11 or newer has it"),
    "sdpa": Kernel(_per_segment),
}
# What packed_attention calls, by the kind of device; elsewhere it goes segment by segment.
_in_use: dict[str, Callable] = {"meta": _sizes_only}


def choose(wanted: str, config, dtype: torch.dtype, capability: tuple[int, int] | None) -> str:
    """The name of the kernel for a model of `config`: the fastest that will do, or the wanted one.

    capability: CUDA's compute capability, None on CPU. Raises ValueError, with what to do, if the wanted one cannot.
    """
    obstacles = {name: _obstacle(kernel, name, config, dtype, capability) for name, kernel in KERNELS.items()}
    if wanted != "auto" and obstacles[wanted]:
        usable = ", ".join(name for name, obstacle in obstacles.items() if not obstacle)
        raise ValueError(f"--attention {wanted} {obstacles[wanted]}; what works here: auto, {usable}")
    return next(name for name in KERNELS if wanted in ("auto", name) and not obstacles[name])


def _obstacle(kernel: Kernel, name: str, config, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Why a kernel will not do, or None."""
    if name == "sdpa":
        return None
    if capability is None:
        return "needs a GPU"
    if capability[0] not in kernel.capabilities:
        return f"is not for GPUs of compute capability {capability[0]}.{capability[1]}"
    if not _installed(kernel.module):
        return f"is not installed ({kernel.remedy})"
    if dtype == torch.float32:
        return "has no fp32 (--precision bf16)"
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and not kernel.softcap:
        return f"has no soft-capping, which {type(config).__name__.removesuffix('Config')} needs"
    if getattr(text, "kv_lora_rank", None):
        return "wants keys and values of one width"
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim > kernel.head_dim:
        return f"goes up to heads of {kernel.head_dim} numbers, not {head_dim}"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def use(wanted: str, config, dtype: torch.dtype) -> str:
    """Makes the kernel that `choose` names for this process's device the one that attention calls. Returns its name."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    name = choose(wanted, config, dtype, capability)
    _in_use["cuda"] = KERNELS[name].call
    return name
