"""Attention over packed pairs: one function, registered with transformers, that serves every architecture.

Its kernel is chosen once per process (`choose_kernel`): flash-attention 2 where it is installed, torch's own varlen
flash kernel on other GPUs, and per-segment scaled-dot-product attention on CPU. All of them take the same thing:
queries and keys in segments, causal, aligned at the bottom right (row r of a segment sees columns up to
r + keys - queries). Dropout is always off: a DPO policy and its reference must be the same function.

Shapes: T query rows, K key rows (prompts twice), H heads, G key-value heads, D head dimension.
"""

import functools
import importlib.util
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from dpo_ds.scoring.packed import Segments, segments_of

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
    kernel = choose_kernel(query.device.type)
    out_THD = kernel(
        query_THD,
        key_KGD,
        value_KGD,
        segments,
        attention_mask[0, 0, 1:],
        1 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        sliding_window,
        softcap,
    )
    return out_THD[None], None


AttentionInterface.register(NAME, packed_attention)


@functools.cache
def choose_kernel(device_type: str):
    """The fastest kernel that this process can run on this kind of device."""
    if device_type == "meta":
        return _sizes_only
    if device_type != "cuda":
        return _per_segment
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attention_2
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return _torch_varlen
    print("dpo_ds: no flash-attention kernel found: attention runs segment by segment (pip install flash-attn)")
    return _per_segment


def _offsets(offsets: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    length = len(segments.query_offsets)
    return offsets[0, :length].contiguous(), offsets[1, :length].contiguous()


def _flash_attention_2(query, key, value, segments, offsets, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    query_offsets, key_offsets = _offsets(offsets, segments)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        query_offsets,
        key_offsets,
        segments.longest_query,
        segments.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _torch_varlen(query, key, value, segments, offsets, scale, window, softcap):
    if softcap or query.dtype == torch.float32:  # torch's kernel has neither soft-capping nor fp32
        return _per_segment(query, key, value, segments, offsets, scale, window, softcap)
    from torch.nn.attention.varlen import varlen_attn

    query_offsets, key_offsets = _offsets(offsets, segments)
    return varlen_attn(
        query,
        key,
        value,
        query_offsets,
        key_offsets,
        segments.longest_query,
        segments.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _per_segment(query, key, value, segments, offsets, scale, window, softcap):
    del offsets
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(segments.query_offsets), pairwise(segments.key_offsets), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        square = q1 - q0 == k1 - k0
        mask = None if square and window is None else visible(q1 - q0, k1 - k0, window, query.device)
        if softcap:
            out = _softcapped(q, k, v, visible(q1 - q0, k1 - k0, window, query.device), scale, softcap)
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
