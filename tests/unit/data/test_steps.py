"""Dealing: which pairs make a step, and how they are dealt to ranks and micro-batches."""

import numpy as np
import pytest

from dpo_ds.data.pairs import Part
from dpo_ds.data.steps import Schedule, deal

ALONE = np.arange(70)  # every pair is a group of its own


def some_parts(count, seed=0) -> list[Part]:
    lengths = np.random.default_rng(seed).integers(20, 900, count)
    return [Part(n, (2 * n, 2 * n + 1), (n,), int(tokens), int(tokens)) for n, tokens in enumerate(lengths)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [900, 2000, 100_000])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_every_part_once_within_the_limit_and_as_many_rounds_on_every_rank(ranks, limit, count):
    parts = some_parts(count)
    dealt = deal(parts, ranks, limit)
    assert len(dealt) == ranks and len({len(own) for own in dealt}) == 1
    counted = [i for own in dealt for m in own if m.weight for i in m.pairs]
    assert sorted(counted) == list(range(count))
    assert all(m.tokens == sum(part.tokens for part in m.parts) <= limit for own in dealt for m in own)
    assert all(set(m.parts) <= set(parts) for own in dealt for m in own), "idle ranks run one of the step's pairs"


def test_ranks_get_about_the_same_number_of_tokens_in_each_round():
    dealt = deal(some_parts(256), 8, 4096)
    tokens = np.array([[m.tokens for m in own] for own in dealt])
    assert (tokens.mean(0) / tokens.max(0)).min() > 0.95


def test_an_epoch_is_every_pair_once_and_its_last_step_is_smaller():
    schedule = Schedule.of(ALONE, global_batch=32, epochs=2, max_steps=None, seed=5)
    steps = [schedule.step(number) for number in range(schedule.steps)]
    assert [len(step) for step in steps] == [32, 32, 6, 32, 32, 6]
    assert sorted(np.concatenate(steps[:3])) == list(range(70)) == sorted(np.concatenate(steps[3:]))
    assert list(np.concatenate(steps[:3])) != list(np.concatenate(steps[3:])), "another order every epoch"


def test_a_step_follows_from_seed_and_number_alone():
    first = Schedule.of(ALONE, 32, 1, 9, seed=5).step(4)
    assert list(first) == list(Schedule.of(ALONE, 32, 3, None, seed=5).step(4))
    assert list(first) != list(Schedule.of(ALONE, 32, 3, None, seed=6).step(4))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (0.34, 1), (0.01, 1), (2, 6)])
def test_epochs_may_be_a_fraction(epochs, steps):
    assert Schedule.of(ALONE, 32, epochs, None, 0).steps == steps


@pytest.mark.parametrize("batch", [1, 4, 8, 32, 1000])
@pytest.mark.parametrize(
    "sizes", [[6] * 50, [1, 2, 3] * 40, [21] * 9, [100, 1, 1], [1] * 7 + [30], [1]], ids=lambda s: f"{len(s)}x{s[0]}"
)
def test_a_groups_pairs_are_in_one_step_where_a_step_can_hold_them(sizes, batch):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    schedule = Schedule.of(groups, batch, 1, None, seed=3)
    for epoch in range(3):
        steps = [schedule.step(epoch * schedule.steps_per_epoch + n) for n in range(schedule.steps_per_epoch)]
        assert sorted(np.concatenate(steps)) == list(range(len(groups))), "every pair once"
        assert all(len(step) for step in steps), "no step without a pair"
        # A step ends less than half a group from where `batch` pairs would end it.
        assert all(len(step) <= batch + min(batch, max(sizes)) for step in steps)
        split = [g for g in range(len(sizes)) if sum(g in groups[step] for step in steps) > 1 and sizes[g] <= batch]
        assert len(split) <= 1, "only the last step of an epoch may begin within a group"
