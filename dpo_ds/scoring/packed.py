"""A micro-batch of preference pairs as one row of tokens, each prompt computed once (prefix sharing).

    tokens   [ P0 | C0 | R0 | P1 | C1 | R1 | ... ]          no padding
    position   0..   ..   P0..  0..  ...                    rejected continues right after its prompt

A pair is two attention segments. Queries [P+C] see keys [P+C]. Queries [R] see keys [P+R], for which the prompt's keys
are gathered a second time. Attention is causal, aligned at the bottom right, and rejected never sees chosen. The last
prompt row predicts the first token of both responses, so the head gets it twice.

Every attention layer gets the segments' lengths as a 4-D integer `attention_mask`: it is the only argument that
transformers passes on unchanged for every architecture (some, such as StableLM, drop keyword arguments). The lengths
stay on the host, three numbers per segment, so a layer can read them without waiting for the GPU. `layout_of` turns
them into what kernels need, once per batch and device. The tensor carries no attributes, so hooks may copy it.

Shapes: T tokens of the pack, N response tokens, S segments (two per pair), K keys of all segments, B pairs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen and rejected token ids


class CannotPack(ValueError):
    """A model's architecture cannot be scored with packed pairs. The message says why."""


@dataclass
class PackedBatch:
    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    segments: torch.Tensor  # [1, 1, S, 3] int32, on the host: own rows, first row shared with others, rows shared
    rows: torch.Tensor  # [N] int64: the row of the pack that predicts each response token
    targets: torch.Tensor  # [N] int64: the response tokens
    responses: torch.Tensor  # [N] int64: 2b for chosen of pair b, 2b + 1 for its rejected
    token_pairs: torch.Tensor  # [T] int64: the pair of each token
    pairs: int  # B

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on another device. Copies to a GPU start from page-locked memory, so nothing waits for them."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        tensors = [f.name for f in fields(self) if f.type is torch.Tensor and f.name != "segments"]
        moved = {name: move(getattr(self, name), device) for name in tensors}
        layout_of(self.segments, device)  # made here, so that no layer has to wait for it
        return PackedBatch(**moved, segments=self.segments, pairs=self.pairs)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device; to a GPU without waiting."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(pairs: Sequence[Pair]) -> PackedBatch:
    """Packs pairs, in order, into one row. Prompts and responses must not be empty."""
    tokens, positions, segments, rows, targets, responses = [], [], [], [], [], []
    start = 0
    for b, (prompt, chosen, rejected) in enumerate(pairs):
        P, C, R = len(prompt), len(chosen), len(rejected)
        assert P and C and R, "the data wing leaves no empty prompt or response"
        last_prompt_row = np.array([start + P - 1])

        tokens += [prompt, chosen, rejected]
        positions += [np.arange(P + C), np.arange(P, P + R)]
        segments += [(P + C, start, 0), (R, start, P)]
        rows += [last_prompt_row, start + P + np.arange(C - 1), last_prompt_row, start + P + C + np.arange(R - 1)]
        targets += [chosen, rejected]
        responses += [np.full(C, 2 * b), np.full(R, 2 * b + 1)]
        start += P + C + R

    return PackedBatch(
        input_ids=_int64(tokens)[None],
        position_ids=_int64(positions)[None],
        segments=torch.tensor(segments, dtype=torch.int32)[None, None],
        rows=_int64(rows),
        targets=_int64(targets),
        responses=_int64(responses),
        token_pairs=torch.repeat_interleave(torch.tensor([sum(map(len, pair)) for pair in pairs])),
        pairs=len(pairs),
    )


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@dataclass(frozen=True)
class Layout:
    """Where a packed row's segments begin and end, as attention kernels need it.

    A segment's queries are its own rows. Its keys are the rows that it shares with other segments, then its own.
    """

    query_offsets: list[int]  # S + 1 numbers: segment s has queries query_offsets[s] … query_offsets[s + 1]
    key_offsets: list[int]  # S + 1 numbers, likewise for the gathered keys
    longest_query: int
    longest_key: int
    key_rows: torch.Tensor  # [K] int32: the row of the pack of every gathered key
    offsets: tuple[torch.Tensor, torch.Tensor]  # the two offsets, int32 [S + 1] each


def is_segments(mask: torch.Tensor | None) -> bool:
    """Whether an attention mask is PackedBatch.segments."""
    return mask is not None and mask.dim() == 4 and mask.shape[-1] == 3 and mask.dtype == torch.int32


def layout_of(segments: torch.Tensor, device: torch.device) -> Layout:
    """The layout of PackedBatch.segments, with its tensors on `device`."""
    return _layout(segments.cpu().numpy().tobytes(), device)


@functools.lru_cache(maxsize=16)  # more than the micro-batches of policy and reference in use at a time
def _layout(segments: bytes, device: torch.device) -> Layout:
    own, shared_from, shared = np.frombuffer(segments, dtype=np.int32).reshape(-1, 3).T
    query_offsets, key_offsets = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (own, own + shared))
    key_rows = [
        rows
        for start, end, first, count in zip(query_offsets[:-1], query_offsets[1:], shared_from, shared, strict=True)
        for rows in (np.arange(first, first + count, dtype=np.int32), np.arange(start, end, dtype=np.int32))
    ]
    return Layout(
        query_offsets.tolist(),
        key_offsets.tolist(),
        int(own.max()),
        int((own + shared).max()),
        move(torch.from_numpy(np.concatenate(key_rows)), device),
        (move(torch.from_numpy(query_offsets), device), move(torch.from_numpy(key_offsets), device)),
    )
