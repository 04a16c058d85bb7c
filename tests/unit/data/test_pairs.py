"""Groups as training reads them: parts within a limit, subsets, and what cannot be packed."""

import numpy as np
import pytest

from dpo_ds.data.pairs import PairSet
from dpo_ds.errors import UserError

# Of a prompt and its answers; the pairs among them, as places in the group.
GROUPS = [
    ((10, 3, 4), [(0, 1)]),
    ((20, 5, 6, 7, 8), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
    ((5, 2, 2, 2), [(0, 1), (0, 2)]),
    ((100, 1, 1, 1, 1, 1, 1), [(0, n) for n in range(1, 6)]),
]


def pair_set(groups=GROUPS) -> PairSet:
    """Token n of the set has the id n."""
    lengths = [n for sizes, _ in groups for n in sizes]
    starts = np.cumsum([0, *lengths])
    sequences = np.stack([starts[:-1], lengths], axis=1)
    counts = [len(sizes) - 1 for sizes, _ in groups]
    prompts = np.cumsum([0, *(len(sizes) for sizes, _ in groups)])[:-1]
    first = np.cumsum([0, *counts])
    pairs = np.array([(first[g] + a, first[g] + b) for g, (_, own) in enumerate(groups) for a, b in own])
    n, answers = len(pairs), int(first[-1])
    ids = np.arange(16 * n, dtype=np.uint8).reshape(n, 16)
    return PairSet(
        tokens=np.arange(starts[-1], dtype=np.int32),
        scored=np.zeros(0, dtype=np.uint8),
        prompts=sequences[prompts],
        prompt_gaps=np.zeros((len(groups), 2, 2), dtype=np.int32),
        prompt_hashes=np.zeros((len(groups), 16), dtype=np.uint8),
        prompt_keys=np.zeros((len(groups), 3, 16), dtype=np.uint8),
        answers=np.delete(sequences, prompts, axis=0),
        answer_cuts=np.zeros(answers, dtype=np.int32),
        answer_groups=np.repeat(np.arange(len(groups)), counts),
        answer_ids=np.arange(16 * answers, dtype=np.uint8).reshape(answers, 16),
        pairs=pairs,
        rows=np.arange(n),
        sources=np.zeros(n, dtype=np.int64),
        weights=np.ones(n, dtype=np.float32),
        margins=np.full(n, np.nan, dtype=np.float32),
        pair_ids=ids,
    )


@pytest.mark.parametrize("limit", [40, 46, 60, 102, 110, 1000])
def test_every_pair_is_in_one_part_which_has_its_answers_and_keeps_the_limit(limit):
    pairs = pair_set()
    indices = [i for i in range(len(pairs)) if pairs.packed_lengths[i] <= limit]
    parts = pairs.parts(indices[::-1], limit)
    assert sorted(i for part in parts for i in part.pairs) == indices
    for part in parts:
        group = pairs.group(part)
        assert part.tokens == len(group.prompt) + sum(map(len, group.answers)) <= limit
        assert part.keys == len(group.answers) * len(group.prompt) + sum(map(len, group.answers)) <= 2 * limit
        for i, (chosen, rejected) in zip(part.pairs, group.pairs, strict=True):
            found = (group.prompt, group.answers[chosen], group.answers[rejected])
            assert all(np.array_equal(a, b) for a, b in zip(found, pairs.pair(i), strict=True))


def test_a_group_that_fits_is_one_part_with_each_answer_once():
    pairs = pair_set()
    (part,) = pairs.parts(range(1, 7), 53)
    assert part.answers == (2, 3, 4, 5) and (part.tokens, part.keys) == (46, 106)
    assert len(pairs.parts(range(1, 7), 52)) > 1


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_the_least_limit_that_leaves_a_group_whole(group):
    pairs = pair_set()
    members = np.flatnonzero(pairs.pair_groups == group)
    limit = int(pairs.group_limits[group])
    assert len(pairs.parts(members, limit)) == 1
    if len(members) > 1:
        assert len(pairs.parts(members, limit - 1)) > 1


def test_many_short_answers_to_a_long_prompt_do_not_read_its_keys_without_bound():
    """Attention reads the prompt's keys once for each answer; the plan counts on two times a micro-batch's tokens."""
    pairs = pair_set()
    assert len(pairs.parts(range(9, 14), 106)) > 1 and len(pairs.parts(range(9, 14), 400)) == 1


@pytest.mark.parametrize("limit", [40, 110, 1000])
def test_answers_are_scored_once_each(limit):
    pairs = pair_set()
    short = [a for a in range(len(pairs.answers)) if pairs.answer_groups[a] < 3]
    parts = pairs.answer_parts(short, limit)
    assert sorted(a for part in parts for a in part.answers) == short
    assert all(part.tokens <= limit and part.pairs == () and len(pairs.group(part).pairs) == 0 for part in parts)


def test_a_limit_below_a_pair_names_both_numbers():
    with pytest.raises(UserError, match=r"micro_batch_tokens 16 .* packs to 17 tokens"):
        pair_set().parts([0], 16)


def test_a_subset_keeps_pairs_and_drops_what_none_of_them_needs():
    pairs = pair_set()
    kept = [0, 4, 5, 9]
    subset = pairs.subset(kept)
    assert len(subset) == 4 and len(subset.prompts) == 3 and len(subset.answers) == 2 + 3 + 2
    for n, i in enumerate(kept):
        assert all(np.array_equal(a, b) for a, b in zip(subset.pair(n), pairs.pair(i), strict=True))
        assert subset.pair_id(n) == pairs.pair_id(i) and subset.rows[n] == i
    assert list(subset.group_lengths) == [17, 41, 102] and list(pairs.group_lengths) == [17, 46, 11, 106]
    assert subset.digest != pairs.digest == pair_set().digest
    assert len(pairs.subset([])) == 0 == len(pairs.subset([]).answers)


def test_weights_and_margins_are_part_of_what_a_run_is():
    pairs = pair_set()
    other = pair_set()
    other.weights[3] = 2
    assert other.digest != pairs.digest and other.answers_digest == pairs.answers_digest
