"""Which pairs are held out for evaluation: no prompt, and no variant of one, is on both sides.

Two prompts are variants of each other if they have one of these keys in common, 16 bytes of sha256 each:

    of the token ids
    of the messages' texts
    of the question, if one of the two was found as what the answers have in common. The answers decide where such a
    prompt ends, so less of it is compared: its last user's turn, or of a text its whole lines and sentences. If more
    than MOST_VARIANTS different prompts end alike, that is not what they ask

Texts are compared without regard to case, blanks and Unicode's normal forms.

This file imports only numpy and data/comparison.py.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from dpo_ds.data.comparison import Comparison, Message

# Of the token ids; of the texts; of what a prompt asks that was found, zeros for one that is given; and two that any
# prompt has to be compared with that: its last user's turn, and the whole lines and sentences of it.
KEYS = 5
FOUND = 2  # the place of the third
MOST_VARIANTS = 20  # of different texts that may ask one question


def prompt_hash(text: str) -> bytes:
    """16 bytes of sha256. They decide the order in which prompts are held out, for every model and tokenizer alike."""
    return _hash(text.encode())


def prompt_keys(comparison: Comparison, text: str, ids: Sequence[int]) -> bytes:
    """The keys of a prompt, one after another. `text` is the prompt as plain text, `ids` its tokens."""
    # The same question may be given as a text in one set and as messages in another.
    said = "\n".join(_said(message) for message in comparison.messages) or text
    asked = [message["content"] for message in comparison.messages if message["role"] == "user"]
    turn = (asked[-1] if asked else None) or text
    whole, sentences = _text_hash(turn), _text_hash(_sentences(turn))
    dialogue = any(message["role"] == "assistant" for message in comparison.messages) or any(
        len(answer.messages) > 1 for answer in comparison.answers
    )
    found = (whole if dialogue else sentences) if comparison.implicit else bytes(16)
    return _hash(np.asarray(ids, dtype=np.int32).tobytes()) + _text_hash(said) + found + whole + sentences


def _said(message: Message) -> str:
    return f"{message['role']}: {message['content'] or ''} {message.get('tool_calls') or ''}"


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _text_hash(text: str) -> bytes:
    return _hash(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode())


def _sentences(text: str) -> str:
    """A text as far as the end of its last whole line or, where it is one line, of its last whole sentence."""
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
    links = [(family.copy(), _numbers(keys[:, n])) for n in range(FOUND)]
    found = np.flatnonzero(keys[:, FOUND].any(axis=1))
    if len(found):
        links.append(_by_question(keys, found))
    while True:
        before = family.copy()
        for members, number in links:
            least = np.full(number.max(initial=-1) + 1, len(keys))
            np.minimum.at(least, number, family[members])
            np.minimum.at(family, members, least[number])
        family = family[family]
        if np.array_equal(family, before):
            return family


def _by_question(keys: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, and the number of the question that each asks: those that a prompt that was found asks, too."""
    given = keys.shape[1] - FOUND - 1
    asked = np.concatenate([keys[found, FOUND], *(keys[:, FOUND + 1 + n] for n in range(given))])
    prompts = np.concatenate([found, np.tile(np.arange(len(keys)), given)])
    number = _numbers(asked)
    also = np.isin(number, number[: len(found)])  # no two prompts of which neither was found
    # What so many different prompts end with ("Go on.") is not what they ask.
    texts = np.unique(np.stack([number, _numbers(keys[:, 1])[prompts]]), axis=1)[0]
    also &= (np.bincount(texts) <= MOST_VARIANTS)[number]
    return prompts[also], number[also]


def _numbers(keys: np.ndarray) -> np.ndarray:
    """Equal keys have the same number. keys: uint8 [n, 16]."""
    return np.unique(np.ascontiguousarray(keys).view(np.uint64), axis=0, return_inverse=True)[1].reshape(-1)


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
