"""Which pairs make a step, and how a step's pairs are dealt to ranks and micro-batches.

Seed, epoch and step alone decide which pairs a step has. Token counts decide how they are dealt: every rank gets the
same number of micro-batches and, in each, about the same number of tokens. The step's loss is the weighted sum over its
pairs divided by the sum of their weights, so neither the number of ranks nor the micro-batch's size changes the loss
curve.
"""

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ds.data.pairs import Part


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of a run: `steps` steps of about `global_batch` pairs each.

    groups: the group of every pair, int64 [n], ascending. The pairs of a group go into one step, for they share tokens:
    so a step ends at the end of a group, the one that is nearest to `global_batch` pairs a step. A group of more pairs
    than that is cut into pieces of `global_batch` pairs.
    """

    groups: np.ndarray
    global_batch: int
    steps: int
    seed: int

    @classmethod
    def of(cls, groups: np.ndarray, global_batch: int, epochs: float, max_steps: int | None, seed: int) -> "Schedule":
        steps = max_steps if max_steps is not None else max(1, round(math.ceil(len(groups) / global_batch) * epochs))
        return cls(groups, global_batch, steps, seed)

    @property
    def pairs(self) -> int:
        return len(self.groups)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch. The last one may have fewer pairs; it is not dropped."""
        return math.ceil(self.pairs / self.global_batch)

    def step(self, number: int) -> np.ndarray:
        """Indices of the pairs of step `number` (from 0)."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order, ends = self.epoch(epoch)
        return order[ends[within] : ends[within + 1]]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a schedule lives as long as its run; a step must not permute all pairs)
    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs in the order of an epoch, and where its steps end: step s is order[ends[s] : ends[s + 1]]."""
        starts, sizes = self._pieces()
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(starts))
        ends = np.cumsum(np.concatenate([[0], sizes[shuffled]]))
        offsets = np.arange(self.pairs) - np.repeat(ends[:-1], sizes[shuffled])
        order = np.repeat(starts[shuffled], sizes[shuffled]) + offsets
        wanted = self.global_batch * np.arange(1, self.steps_per_epoch)
        place = np.searchsorted(ends, wanted, side="right")
        below, above = ends[place - 1], ends[place]
        nearest = np.where(wanted - below <= above - wanted, below, above)
        nearest = np.where(nearest == self.pairs, wanted, nearest)  # the last step must not be empty
        return order, np.concatenate([[0], nearest, [self.pairs]])

    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each group, or piece of a group, starts in the set, and its number of pairs."""
        firsts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        counts = np.diff(firsts, append=self.pairs)
        within = np.arange(self.pairs) - np.repeat(firsts, counts)
        starts = np.flatnonzero(within % self.global_batch == 0)
        return starts, np.diff(starts, append=self.pairs)

    def visited(self) -> np.ndarray:
        """Which pairs the run trains on at all: bool [pairs]."""
        mask = np.zeros(self.pairs, dtype=bool)
        for number in range(min(self.steps, self.steps_per_epoch)):
            mask[self.step(number)] = True
        return mask


@dataclass(frozen=True)
class MicroBatch:
    """Parts of groups that one rank scores in one forward. With weight 0 the micro-batch has no effect: a rank without
    pairs runs it because every rank must take part in the collectives of forward and backward."""

    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def pairs(self) -> list[int]:
        return [pair for part in self.parts for pair in part.pairs]

    @property
    def answers(self) -> list[int]:
        """The answers in the order in which the packed batch has them."""
        return [answer for part in self.parts for answer in part.answers]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)


def deal(parts: Sequence[Part], ranks: int, micro_batch_tokens: int) -> list[list[MicroBatch]]:
    """Deals parts to ranks: [rank][micro-batch]. Every rank gets equally many, each within the token limit, which no
    part may exceed."""
    lengths = np.array([part.tokens for part in parts])
    order = sorted(range(len(parts)), key=lambda i: (-lengths[i], i))
    assert lengths[order[0]] <= micro_batch_tokens, "PairSet.parts keeps the limit"
    rounds = math.ceil(int(lengths.sum()) / (ranks * micro_batch_tokens))
    while (bins := _spread(order, lengths, rounds * ranks, micro_batch_tokens)) is None:
        rounds += 1
    _level(bins, lengths, micro_batch_tokens)
    # The heaviest bins go into the same round: then ranks wait least for each other in collectives.
    bins.sort(key=lambda own: (-sum(int(lengths[i]) for i in own), own))
    idle = MicroBatch((parts[order[-1]],), weight=0.0)  # the shortest part is the cheapest
    dealt = [MicroBatch(tuple(parts[i] for i in own)) if own else idle for own in bins]
    return [dealt[rank::ranks] for rank in range(ranks)]


def _spread(order: list[int], lengths: np.ndarray, count: int, limit: int) -> list[list[int]] | None:
    """Puts each part, longest first, into the lightest of `count` bins. Returns None if a bin would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in order:
        load, number = heap[0]
        if load + lengths[i] > limit:
            return None
        bins[number].append(i)
        heapq.heapreplace(heap, (load + int(lengths[i]), number))
    return bins


def _level(bins: list[list[int]], lengths: np.ndarray, limit: int) -> None:
    """Moves a part from the heaviest bin to another, or swaps it for a shorter one, as long as the heavier of the two
    bins becomes lighter. On HH's lengths, 32 pairs on 8 ranks, this raises the balance from 96% to 98%."""
    loads = [int(lengths[pairs].sum()) if pairs else 0 for pairs in bins]
    for _ in range(10 * len(bins)):
        heavy = max(range(len(bins)), key=loads.__getitem__)
        best = None
        for other in range(len(bins)):
            if other == heavy:
                continue
            given, taken = lengths[bins[heavy]], np.append(lengths[bins[other]], 0)  # 0: no part in return
            moved = given[:, None] - taken[None]
            heavier = np.maximum(loads[heavy] - moved, loads[other] + moved)
            place = np.unravel_index(heavier.argmin(), heavier.shape)
            if heavier[place] < min(loads[heavy], limit + 1, best[0] if best else math.inf):
                best = heavier[place], other, place, int(moved[place])
        if best is None:
            return
        _, other, (give, take), moved = best
        part = bins[heavy].pop(give)
        if take < len(bins[other]):
            bins[heavy].append(bins[other].pop(take))
        bins[other].append(part)
        loads[heavy] -= moved
        loads[other] += moved
