"""A micro-batch of preference pairs as one row of tokens, each prompt computed once (prefix sharing).

    tokens   [ P0 | C0 | R0 | P1 | C1 | R1 | ... ]          no padding
    position   0..   ..   P0..  0..  ...                    rejected goes on right after its prompt

A pair is two attention segments. Queries [P+C] see keys [P+C]; queries [R] see keys [P+R], the prompt's keys being
gathered a second time; causal, aligned at the bottom right, so that rejected never sees chosen. The last prompt row
predicts the first token of both responses and is therefore taken twice for the head.

The layout travels to every attention layer as a 4-D integer `attention_mask`, the one thing that transformers hands
on untouched for every architecture (some drop keyword arguments, StableLM among them).

Shapes: T tokens of the pack, N response tokens, S segments (two a pair), B pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import numpy as np
import torch

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen and rejected token ids


@dataclass
class PackedBatch:
    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    layout: torch.Tensor  # [1, 1, 3, K] int32: key rows, query offsets, key offsets; -1 fills up
    rows: torch.Tensor  # [N] int64: the row of the pack that predicts each response token
    targets: torch.Tensor  # [N] int64: the response tokens
    responses: torch.Tensor  # [N] int64: 2b for chosen of pair b, 2b + 1 for its rejected
    token_pairs: torch.Tensor  # [T] int64: the pair of each token
    pairs: int  # B

    def to(self, device: torch.device | str) -> "PackedBatch":
        """On another device, without waiting for the copies: to a GPU they are made from page-locked memory."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        moved = {f.name: move(getattr(self, f.name), device) for f in fields(self) if f.type is torch.Tensor}
        # Kernels need the segments as Python numbers, taken here, before the layout leaves the host, and their offsets
        # as tensors: made once for all layers.
        segments = segments_of(self.layout)
        offsets = moved["layout"][0, 0, 1:, : len(segments.query_offsets)]
        moved["layout"].segments = replace(segments, on_device=(offsets[0].contiguous(), offsets[1].contiguous()))
        return PackedBatch(**moved, pairs=self.pairs)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From the host to a device; to a GPU without waiting."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(pairs: Sequence[Pair]) -> PackedBatch:
    """Packs pairs, in order, into one row. Prompts and responses must not be empty."""
    tokens, positions, key_rows, rows, targets, responses = [], [], [], [], [], []
    query_lengths, key_lengths = [], []
    start = 0
    for b, (prompt, chosen, rejected) in enumerate(pairs):
        P, C, R = len(prompt), len(chosen), len(rejected)
        assert P and C and R, "data/tokens.py leaves no empty prompt or response"
        prompt_rows = np.arange(start, start + P)
        chosen_rows = np.arange(start + P, start + P + C)
        rejected_rows = np.arange(start + P + C, start + P + C + R)
        last_prompt_row = prompt_rows[-1:]

        tokens += [prompt, chosen, rejected]
        positions += [np.arange(P + C), np.arange(P, P + R)]
        query_lengths += [P + C, R]
        key_lengths += [P + C, P + R]
        key_rows += [prompt_rows, chosen_rows, prompt_rows, rejected_rows]
        rows += [last_prompt_row, chosen_rows[:-1], last_prompt_row, rejected_rows[:-1]]
        targets += [chosen, rejected]
        responses += [np.full(C, 2 * b), np.full(R, 2 * b + 1)]
        start += P + C + R

    return PackedBatch(
        input_ids=_int64(tokens)[None],
        position_ids=_int64(positions)[None],
        layout=_layout(np.concatenate(key_rows), query_lengths, key_lengths),
        rows=_int64(rows),
        targets=_int64(targets),
        responses=_int64(responses),
        token_pairs=torch.repeat_interleave(torch.tensor([sum(map(len, pair)) for pair in pairs])),
        pairs=len(pairs),
    )


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _layout(key_rows: np.ndarray, query_lengths: list[int], key_lengths: list[int]) -> torch.Tensor:
    layout = np.full((1, 1, 3, max(len(key_rows), len(query_lengths) + 1)), -1, dtype=np.int32)
    layout[0, 0, 0, : len(key_rows)] = key_rows
    layout[0, 0, 1, : len(query_lengths) + 1] = np.cumsum([0, *query_lengths])
    layout[0, 0, 2, : len(key_lengths) + 1] = np.cumsum([0, *key_lengths])
    tensor = torch.from_numpy(layout)
    tensor.segments = Segments(
        layout[0, 0, 1, : len(query_lengths) + 1].tolist(), layout[0, 0, 2, : len(key_lengths) + 1].tolist()
    )
    return tensor


@dataclass(frozen=True)
class Segments:
    """The layout's numbers on the host. Kernels want the longest segment, the plain path wants every offset."""

    query_offsets: list[int]  # S + 1 numbers
    key_offsets: list[int]
    on_device: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False)  # the same, int32

    @property
    def longest_query(self) -> int:
        return _longest(self.query_offsets)

    @property
    def longest_key(self) -> int:
        return _longest(self.key_offsets)


def _longest(offsets: list[int]) -> int:
    return max(end - start for start, end in pairwise(offsets))


def segments_of(layout: torch.Tensor) -> Segments:
    """The segments of a layout: free where `pack` has left them, else read back from the tensor."""
    known = getattr(layout, "segments", None)
    if known is not None:
        return known
    query_offsets, key_offsets = ([n for n in row if n >= 0] for row in layout[0, 0, 1:].tolist())
    return Segments(query_offsets, key_offsets)
