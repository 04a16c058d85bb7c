"""Dealing: which pairs make a step, and how they are dealt to ranks and micro-batches."""

import numpy as np
import pytest

from dpo_ds.data.steps import Schedule, deal
from dpo_ds.errors import UserError


def some_lengths(n=400, seed=0):
    return np.random.default_rng(seed).integers(20, 900, n)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [900, 2000, 100_000])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_every_pair_once_within_the_limit_and_as_many_rounds_on_every_rank(ranks, limit, count):
    lengths = some_lengths()
    indices = Schedule.of(400, count, 1, None, seed=1).step(0)
    dealt = deal(indices, lengths, ranks, limit)
    assert len(dealt) == ranks and len({len(own) for own in dealt}) == 1
    counted = [i for own in dealt for m in own if m.weight for i in m.indices]
    assert sorted(counted) == sorted(indices)
    assert all(sum(lengths[list(m.indices)]) <= limit for own in dealt for m in own)
    assert all(set(m.indices) <= set(indices) for own in dealt for m in own), "idle ranks run one of the step's pairs"


def test_the_order_the_pairs_come_in_does_not_matter():
    lengths = some_lengths()
    assert deal(range(40), lengths, 3, 2000) == deal(reversed(range(40)), lengths, 3, 2000)


def test_ranks_get_about_the_same_number_of_tokens_in_each_round():
    lengths = some_lengths()
    dealt = deal(range(256), lengths, 8, 4096)
    tokens = np.array([[sum(lengths[list(m.indices)]) for m in own] for own in dealt])
    assert (tokens.mean(0) / tokens.max(0)).min() > 0.95


def test_a_limit_below_the_longest_pair_names_both_numbers():
    with pytest.raises(UserError, match=r"micro_batch_tokens 500 .* 812 tokens"):
        deal([0, 1], np.array([300, 812]), 2, 500)


def test_an_epoch_is_every_pair_once_and_its_last_step_is_smaller():
    schedule = Schedule.of(pairs=70, global_batch=32, epochs=2, max_steps=None, seed=5)
    steps = [schedule.step(number) for number in range(schedule.steps)]
    assert [len(step) for step in steps] == [32, 32, 6, 32, 32, 6]
    assert sorted(np.concatenate(steps[:3])) == list(range(70)) == sorted(np.concatenate(steps[3:]))
    assert list(np.concatenate(steps[:3])) != list(np.concatenate(steps[3:])), "another order every epoch"


def test_a_step_follows_from_seed_and_number_alone():
    first = Schedule.of(70, 32, 1, 9, seed=5).step(4)
    assert list(first) == list(Schedule.of(70, 32, 3, None, seed=5).step(4))
    assert list(first) != list(Schedule.of(70, 32, 3, None, seed=6).step(4))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (0.34, 1), (0.01, 1), (2, 6)])
def test_epochs_may_be_a_fraction(epochs, steps):
    assert Schedule.of(70, 32, epochs, None, 0).steps == steps
