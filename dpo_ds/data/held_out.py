"""Which pairs are held out for evaluation: no prompt, and no variant of one, is on both sides.

Two prompts are variants of each other if one of their keys is equal. A prompt has three keys, 16 bytes of sha256 each:

    of its token ids
    of its messages' texts, without regard to case and blanks
    for a prompt that was found as what the answers have in common: of its last question, since the answers decide
    where such a prompt ends; otherwise zeros

This file imports only numpy and data/comparison.py.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from dpo_ds.data.comparison import Comparison

KEYS = 3


def prompt_hash(text: str) -> bytes:
    """16 bytes of sha256. They decide the order in which prompts are held out, for every model and tokenizer alike."""
    return _hash(text.encode())


def prompt_keys(comparison: Comparison, text: str, ids: Sequence[int]) -> bytes:
    """The three keys of a prompt, one after another. `text` is the prompt as plain text, `ids` its tokens."""
    question = _question(comparison, text) if comparison.implicit else ""
    # The same question may be given as a text in one set and as messages in another.
    said = "\n".join(_said(message) for message in comparison.messages) or text
    return (
        _hash(np.asarray(ids, dtype=np.int32).tobytes())
        + _hash(_plain(said).encode())
        + (_hash(_plain(question).encode()) if question else bytes(16))
    )


def _said(message: dict) -> str:
    return f"{message['role']}: {message['content'] or ''} {message.get('tool_calls') or ''}"


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _question(comparison: Comparison, text: str) -> str:
    """What an implicit prompt asks: of a dialogue, the last user's turn; of a text, all up to the end of its last whole
    line or sentence."""
    asked = [message["content"] for message in comparison.messages if message["role"] == "user"]
    if len(comparison.messages) > 1 and asked and isinstance(asked[-1], str):
        return asked[-1]
    for end in (r"\n", r"[.?!:](?=\s)"):
        *_, last = [0, *(match.end() for match in re.finditer(end, text.rstrip()))]
        if last:
            return text[:last]
    return text


def families(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: prompts that are variants of each other, directly or by way of others, have the same number.

    keys: uint8 [n, KEYS, 16].
    """
    family = np.arange(len(keys))
    columns = []
    for column in range(keys.shape[1]):
        halves = np.ascontiguousarray(keys[:, column]).view(np.uint64)
        there = halves.any(axis=1)
        _, number = np.unique(halves[there], axis=0, return_inverse=True)
        columns.append((there, number.reshape(-1)))
    while True:
        before = family.copy()
        for there, number in columns:
            if len(number):
                least = np.full(number.max() + 1, len(keys))
                np.minimum.at(least, number, family[there])
                family[there] = least[number]
        family = family[family]
        if np.array_equal(family, before):
            return family


def held_out(
    hashes: np.ndarray, family: np.ndarray, sizes: np.ndarray, fraction: float = 0.05, most: int = 500
) -> np.ndarray:
    """Which groups are held out: bool [G]. The choice depends on the prompts' content alone.

    hashes: uint8 [G, 16], of the prompts' texts; family: see `families`; sizes: the pairs of each group. Families are
    taken in the order of their lowest hash until they have `fraction` of the pairs, `most` at most. Of two or more
    families at least one is held out, and never all.
    """
    _, members = np.unique(family, return_inverse=True)
    members = members.reshape(-1)
    # Hashes are viewed as two big-endian numbers, because numpy does not sort bytes that hold zeros.
    halves = np.ascontiguousarray(hashes).view(">u8")
    by_hash = np.lexsort((halves[:, 1], halves[:, 0]))
    _, first = np.unique(members[by_hash], return_index=True)  # each family's lowest hash, as a place in by_hash
    order = np.argsort(first)
    pairs = np.bincount(members, weights=sizes).astype(np.int64)[order]
    wanted = min(most, max(1, round(fraction * int(sizes.sum()))))
    before = np.concatenate([[0], np.cumsum(pairs)[:-1]])
    taken = before < wanted
    taken[-1] = False
    out = np.zeros(len(order), dtype=bool)
    out[order] = taken
    return out[members]


def shared(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which prompts are variants of one in another set: bool [n]. keys: uint8 [n, KEYS, 16]; others: likewise."""
    family = families(np.concatenate([keys, others]))
    return np.isin(family[: len(keys)], family[len(keys) :])
