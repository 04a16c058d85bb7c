"""An evaluation's figures against numbers computed by hand, and against training's own metric."""

import itertools
import math

import numpy as np
import pytest
import torch

from dpo_ds.losses.compared import Compared
from dpo_ds.losses.metrics import kl_per_token
from dpo_ds.reports import figures
from dpo_ds.reports.figures import Judged, figures_of


def judged(policy, reference=None, lengths=None, weights=None, beta=0.5) -> Judged:
    policy = np.array(policy, dtype=np.float32)
    n = len(policy)
    return Judged(
        policy,
        None if reference is None else np.array(reference, dtype=np.float32),
        np.array(lengths if lengths is not None else [[2, 4]] * n),
        np.array(weights if weights is not None else [1.0] * n, dtype=np.float32),
        np.arange(n),
        beta,
    )


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_published_one(right, n, low, high):
    np.testing.assert_allclose(figures.wilson(right / n, n), (low, high), atol=5e-5)


def test_wilsons_interval_reaches_the_ends():
    low, high = figures.wilson(1.0, 10)
    assert high == pytest.approx(1.0) and low == pytest.approx(10 / (10 + figures.Z**2))


def test_equal_values_are_ties_and_not_right():
    share = figures.share_of(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 0.0]]), np.ones(4))
    assert (share.value, share.ties) == (0.5, 0.25)


def test_pairs_count_by_their_weights():
    values, weights = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), np.array([3.0, 1.0, 0.0])
    share = figures.share_of(values, weights)
    assert share.value == 0.75 and figures.effective(weights) == pytest.approx(16 / 10)
    assert (share.low, share.high) == pytest.approx(figures.wilson(0.75, 1.6))


def test_a_means_standard_error():
    mean = figures.mean_of(np.array([1.0, 2.0, 3.0, 6.0]), np.ones(4))
    assert mean.value == 3.0
    assert mean.error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    # Every pair counted twice as much is nothing new; a weight of 0 takes a pair out.
    assert figures.mean_of(np.array([1.0, 2.0, 3.0, 6.0]), np.full(4, 2.0)) == mean
    assert figures.mean_of(np.array([1.0, 2.0, 3.0, 6.0, 99.0]), np.array([1, 1, 1, 1, 0.0])) == mean
    assert figures.mean_of(np.array([7.0]), np.ones(1)) == figures.Mean(7.0, None)


def test_ranks_of_equal_values_are_shared():
    assert figures.ranks_of(np.array([10.0, 30.0, 10.0, 20.0])).tolist() == [1.5, 4.0, 1.5, 3.0]


def test_rank_correlation():
    x, ones = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5)
    assert figures.rank_correlation(x, np.exp(x), ones) == pytest.approx(1.0)
    assert figures.rank_correlation(x, -(x**3), ones) == pytest.approx(-1.0)
    # Ranks differ by 1, 1, 1, 1, 0: 1 - 6 * 4 / (5 * 24).
    assert figures.rank_correlation(x, np.array([20.0, 10.0, 40.0, 30.0, 50.0]), ones) == pytest.approx(0.8)
    assert figures.rank_correlation(x, np.full(5, 3.0), ones) is None
    assert figures.rank_correlation(x[:2], x[:2], ones[:2]) is None


def test_the_figures_of_two_pairs_by_hand():
    # Log-ratios: +2 and -1 of the first pair, +1 and +4 of the second; lengths 2 and 4, 1 and 8.
    found = figures_of(judged([[-2, -9], [-4, -6]], [[-4, -8], [-5, -10]], [[2, 4], [1, 8]], beta=0.5))
    against = found.against
    assert against.accuracy.value == 0.5 and against.accuracy.ties == 0
    assert against.margin.value == pytest.approx((1.5 - 1.5) / 2)
    assert against.margin.error == pytest.approx(math.sqrt((1.5**2 + 1.5**2) / 1 / 2))
    assert (against.chosen.value, against.rejected.value) == pytest.approx((1.5, 1.5))
    assert against.chosen_per_token.value == pytest.approx((1 + 1) / 2)
    assert against.rejected_per_token.value == pytest.approx((-0.25 + 0.5) / 2)
    each = [math.exp(-d) - 1 + d for d in (1, -0.25, 1, 0.5)]
    assert against.kl == pytest.approx(sum(each) / 4)
    # Rewards 1, -0.5, 0.5, 2 (ranks 3, 1, 2, 4) and lengths 2, 4, 1, 8 (ranks 2, 3, 1, 4): 1 - 6 * 6 / (4 * 15).
    assert against.reward_and_length == pytest.approx(0.4)
    assert against.margin_and_length is None, "two pairs have no correlation"
    assert found.longer.value == 0.0
    assert found.policy.accuracy.value == 1.0 and found.reference.accuracy.value == 1.0
    assert found.policy.chosen.value == pytest.approx((-1 - 4) / 2)
    assert found.policy.rejected.value == pytest.approx((-9 / 4 - 6 / 8) / 2)
    assert found.accuracy == against.accuracy


def test_without_a_reference_only_the_policys_own_figures():
    found = figures_of(judged([[-2, -9], [-8, -6], [-8, -8]]))
    assert found.against is None and found.reference is None
    assert found.accuracy == found.policy.accuracy
    assert found.accuracy.value == pytest.approx(1 / 3) and found.accuracy.ties == pytest.approx(1 / 3)


def test_kl_is_the_metric_of_training():
    random = np.random.default_rng(0)
    policy, reference = random.normal(-50, 5, (2, 20, 2)).astype(np.float32)
    lengths, weights = random.integers(5, 40, (20, 2)), random.uniform(0.5, 2, 20)
    x = Compared(
        policy=torch.tensor(policy, dtype=torch.float64),
        reference=torch.tensor(reference, dtype=torch.float64),
        lengths=torch.tensor(lengths),
        answers=torch.arange(40).view(20, 2),
        rankings=torch.arange(20),
        margins=torch.zeros(20),
        weights=torch.tensor(weights.astype(np.float32), dtype=torch.float64),
        mean_length=1.0,
    )
    metric = float(x.mean(kl_per_token(x).mean(1)))
    assert figures_of(judged(policy, reference, lengths, weights)).against.kl == pytest.approx(metric, rel=1e-12)


def test_length_bins_hold_every_pair_once():
    tokens = np.random.default_rng(1).integers(3, 300, 101)
    bins = figures.length_bins(tokens)
    assert len(bins) == figures.BINS
    assert sorted(np.concatenate([places for _, places in bins]).tolist()) == list(range(101))
    assert max(len(places) for _, places in bins) - min(len(places) for _, places in bins) <= 4
    for (_, shorter), (_, longer) in itertools.pairwise(bins):
        assert tokens[shorter].max() < tokens[longer].min()


def test_length_bins_of_few_lengths():
    assert [name for name, _ in figures.length_bins(np.array([5, 5, 5, 9]))] == ["5 tokens", "9 tokens"]
    assert figures.length_bins(np.array([5, 5, 5])) == []


def test_slices_add_up():
    random = np.random.default_rng(2)
    whole = judged(*random.normal(-50, 5, (2, 40, 2)), random.integers(5, 40, (40, 2)), random.uniform(0.5, 2, 40))
    sources = random.integers(0, 2, 40)
    found = figures.evaluate(whole, sources, ["a.jsonl", "b.jsonl"])
    assert [part.name for part in found.by_source] == ["a.jsonl", "b.jsonl"]
    weight = [whole.weights[sources == at].sum() for at in (0, 1)]
    parts = [part.figures.against.accuracy.value for part in found.by_source]
    assert np.dot(weight, parts) / sum(weight) == pytest.approx(found.all.against.accuracy.value)
    assert sum(part.figures.pairs for part in found.by_length) == 40
    assert figures.evaluate(whole, np.zeros(40, dtype=int), ["a.jsonl"]).by_source == []
