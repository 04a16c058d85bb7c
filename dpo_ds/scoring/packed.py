"""A micro-batch of groups as one row of tokens, each prompt computed once (prefix sharing).

    tokens   [ P0 | A | B | C | P1 | D | E | ... ]          no padding; A, B, C answer P0, and so on
    position   0.. P0.. P0.. P0.. 0..  ...                  every answer continues right after its prompt

A group of k answers is k attention segments. Queries [P+A] see keys [P+A]. Queries [B] see keys [P+B], for which the
prompt's keys are gathered once more. Attention is causal, aligned at the bottom right, and no answer sees another. The
last prompt row predicts the first token of every answer, so the head gets it as often.

Every attention layer gets the segments' lengths as a 4-D integer `attention_mask`: it is the only argument that
transformers passes on unchanged for every architecture (some, such as StableLM, drop keyword arguments). The lengths
stay on the host, three numbers per segment, so a layer can read them without waiting for the GPU. `layout_of` turns
them into what kernels need, once per batch and device. The tensor carries no attributes, so hooks may copy it.

Shapes: T tokens of the pack, N learned tokens of answers, S segments (one per answer), K keys of all segments,
A answers, B pairs, Q sequences (the prompts and the answers, in the order of their tokens).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike

from dpo_ds.data.pairs import Group


class CannotPack(ValueError):
    """A model's architecture cannot be scored with packed pairs. The message says why."""


@dataclass
class PackedBatch:
    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    segments: torch.Tensor  # [1, 1, S, 3] int32, on the host: own rows, first row shared with others, rows shared
    rows: torch.Tensor  # [N] int64: the row of the pack that predicts each learned token
    targets: torch.Tensor  # [N] int64: the learned tokens
    token_answers: torch.Tensor  # [N] int64: the answer of each learned token
    lengths: torch.Tensor  # [A] int64: learned tokens of each answer
    pairs: torch.Tensor  # [B, 2] int64: the chosen and the rejected answer of each pair
    shared: torch.Tensor  # [M, 2] int64: see shared_tokens
    token_sequences: torch.Tensor  # [T] int64: the sequence of each token
    pair_sequences: torch.Tensor  # [B, 3] int64: prompt, chosen and rejected of each pair, as sequences
    answers: int  # A
    sequences: int  # Q

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on another device. Copies to a GPU start from page-locked memory, so nothing waits for them."""
        device = torch.device(device)
        if device == self.input_ids.device:
            return self
        tensors = [f.name for f in fields(self) if f.type is torch.Tensor and f.name != "segments"]
        moved = {name: move(getattr(self, name), device) for name in tensors}
        layout_of(self.segments, device)  # made here, so that no layer has to wait for it
        return PackedBatch(**moved, segments=self.segments, answers=self.answers, sequences=self.sequences)


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device; to a GPU without waiting."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(groups: Sequence[Group], shared: bool = False) -> PackedBatch:
    """Packs groups, in order, into one row. Prompts and answers must not be empty. Without `shared`, the batch's
    `shared` is empty."""
    tokens, positions, segments, rows, targets, token_answers, pairs, pair_sequences = ([] for _ in range(8))
    start = answers = sequences = 0
    for group in groups:
        P = len(group.prompt)
        assert P and group.answers, "the data wing leaves no empty prompt"
        tokens.append(group.prompt)
        positions.append(np.arange(P))
        end = start + P  # of what is packed so far
        for number, (answer, scored) in enumerate(zip(group.answers, group.scored, strict=True)):
            R = len(answer)
            assert R, "the data wing leaves no empty answer"
            tokens.append(answer)
            positions.append(np.arange(P, P + R))
            # The first answer is in one segment with its prompt. The others share the prompt's keys.
            segments.append((R, start, P) if number else (P + R, start, 0))
            predicting = np.concatenate([[start + P - 1], np.arange(end, end + R - 1)])
            learned = slice(None) if scored is None else scored
            rows.append(predicting[learned])
            targets.append(answer[learned])
            token_answers.append(np.full(len(targets[-1]), answers + number))
            end += R
        pairs.append(group.pairs + answers)
        prompt = np.full((len(group.pairs), 1), sequences)
        pair_sequences.append(np.concatenate([prompt, sequences + 1 + group.pairs], axis=1))
        start, answers, sequences = end, answers + len(group.answers), sequences + 1 + len(group.answers)

    lengths = np.array([len(learned) for learned in targets])
    return PackedBatch(
        input_ids=_int64(tokens)[None],
        position_ids=_int64(positions)[None],
        segments=torch.tensor(segments, dtype=torch.int32)[None, None],
        rows=_int64(rows),
        targets=_int64(targets),
        token_answers=_int64(token_answers),
        lengths=torch.from_numpy(lengths),
        pairs=_int64(pairs),
        shared=torch.from_numpy(shared_tokens(lengths, np.concatenate(pairs) if shared else [])),
        token_sequences=torch.repeat_interleave(torch.tensor([len(sequence) for sequence in tokens])),
        pair_sequences=_int64(pair_sequences),
        answers=answers,
        sequences=sequences,
    )


def shared_tokens(lengths: np.ndarray, pairs: ArrayLike) -> np.ndarray:
    """The learned tokens of each pair's answers up to the shorter one's length, int64 [M, 2]: the token's number, and
    twice the pair's number (one more for its rejected answer). lengths [A]: learned tokens of all answers, in order."""
    starts = np.cumsum(lengths) - lengths
    found = [np.zeros((0, 2), dtype=np.int64)]
    for number, pair in enumerate(np.asarray(pairs)):
        shorter = lengths[pair].min()
        for side in range(2):
            own = starts[pair[side]] + np.arange(shorter)
            found.append(np.stack([own, np.full(shorter, 2 * number + side)], axis=1))
    return np.concatenate(found)


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
