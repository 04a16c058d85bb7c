"""Tokenised pairs as training reads them: arrays in a folder that data/cache.py has written; and the held-out split.

This file imports only numpy: `datasets` would take 90 MiB of every rank's memory.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dpo_ds.errors import UserError


@dataclass(frozen=True)
class PairSet:
    """Tokenised pairs in memory-mapped arrays; `subset` is a view.

    tokens int32 [total]: every pair's prompt, chosen and rejected, one after another.
    lengths int32 [n, 3], starts int64 [n], rows int64 [n] (row in the source).
    pair_ids and prompt_hashes uint8 [n, 16].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    pair_ids: np.ndarray
    prompt_hashes: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "PairSet":
        """Opens a folder of tokenised pairs. Raises UserError if files are missing or damaged."""
        manifest = read_manifest(folder)
        try:
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "tokens" else None)
                for name in cls.__dataclass_fields__
            }
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} is an incomplete set of tokenised pairs; remove it: {error}") from error
        if len(arrays["tokens"]) != manifest["tokens"] or {len(arrays[n]) for n in arrays if n != "tokens"} != {
            manifest["pairs"]
        }:
            raise UserError(f"{folder} does not hold what its manifest says; remove it")
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.lengths)

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of prompt, chosen and rejected."""
        P, C, R = self.lengths[i]
        start = self.starts[i]
        whole = self.tokens[start : start + P + C + R]
        return whole[:P], whole[P : P + C], whole[P + C :]

    def pair_id(self, i: int) -> str:
        return self.pair_ids[i].tobytes().hex()

    @cached_property
    def packed_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of the pair in a packed row, P + C + R."""
        return self.lengths.sum(axis=1, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """sha256 over the pairs' ids, in order: it depends on the content of this set alone, not on its folder."""
        return hashlib.sha256(np.ascontiguousarray(self.pair_ids).tobytes()).hexdigest()

    def subset(self, indices: ArrayLike) -> "PairSet":
        chosen = np.asarray(indices, dtype=np.int64)
        per_pair = (self.lengths, self.starts, self.rows, self.pair_ids, self.prompt_hashes)
        return PairSet(self.tokens, *(array[chosen] for array in per_pair))


def read_manifest(folder: Path) -> dict:
    """Reads the numbers of pairs and tokens and the report's counts. Raises UserError if the manifest is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {key: manifest[key] for key in ("pairs", "tokens", "left_out", "changed")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is an incomplete set of tokenised pairs; remove it: {error!r}") from error


def held_out(prompt_hashes: np.ndarray, fraction: float = 0.05, most: int = 500) -> np.ndarray:
    """Which pairs are held out for evaluation: bool [n]. The choice depends on the prompts' content alone; no prompt is
    in both parts.

    prompt_hashes: uint8 [n, 16]. Prompts are taken in the order of their hashes until they have `fraction` of the
    pairs, `most` at most. Of two or more prompts at least one is held out, and never all.
    """
    # Hashes are viewed as two big-endian numbers, because numpy does not sort bytes that hold zeros.
    halves = np.ascontiguousarray(prompt_hashes).view(">u8")
    _, inverse, sizes = np.unique(halves, axis=0, return_inverse=True, return_counts=True)
    wanted = min(most, max(1, round(fraction * len(prompt_hashes))))
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taken = before < wanted
    taken[-1] = False
    return taken[inverse.reshape(-1)]
