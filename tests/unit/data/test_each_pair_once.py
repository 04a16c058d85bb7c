"""Any pairs in, each exactly once out: loading, tokenising, steps, dealing and packing, for any number of ranks."""

import json
from collections import Counter

import numpy as np
from byte_tokenizer import tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ds.data.cache import tokenize_pairs
from dpo_ds.data.encoder import Encoder, Tokenizing
from dpo_ds.data.pairs import PairSet, Part
from dpo_ds.data.rows.row import Reading
from dpo_ds.data.sources import load_sources
from dpo_ds.data.steps import Schedule, deal
from dpo_ds.scoring.packed import PackedBatch, pack

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(min_size=1, max_size=12)


@st.composite
def rows(draw) -> list[dict[str, str]]:
    """Rows of few prompts, so that some share one. All answers differ: the same pair twice would be one."""
    prompts = draw(st.lists(TEXT, min_size=1, max_size=4))
    found = []
    for number in range(draw(st.integers(1, 12))):
        chosen, rejected = (f" {kind}{number}{draw(TEXT)}." for kind in "cr")
        found.append({"prompt": f"Q{draw(st.sampled_from(prompts))}?", "chosen": chosen, "rejected": rejected})
    return found


def unpacked(batch: PackedBatch) -> list[tuple[list[int], ...]]:
    """The token ids of each pair, read from the packed row."""
    tokens, sequences = batch.input_ids[0], batch.token_sequences
    return [tuple(tokens[sequences == number].tolist() for number in pair) for pair in batch.pair_sequences.tolist()]


@given(
    rows=rows(),
    ranks=st.integers(1, 9),
    global_batch=st.integers(1, 14),
    spare=st.integers(0, 400),
    seed=st.integers(0),
)
@settings(QUICK, max_examples=40)
def test_every_pair_of_a_file_is_in_one_pack_of_an_epoch(rows, ranks, global_batch, spare, seed, tmp_path_factory):
    place = tmp_path_factory.mktemp("once")
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (loaded,) = load_sources(str(place / "pairs.jsonl"), place)
    encoder = Encoder(tokenizer(), Tokenizing(max_length=512))
    folder, _ = tokenize_pairs([loaded.split], encoder, Reading(), True, place / "cache")
    pairs = PairSet.open(folder)
    schedule = Schedule.of(pairs.pair_groups, global_batch, 1, None, seed)
    limit = int(pairs.packed_lengths.max()) + spare
    seen = Counter()
    for step in range(schedule.steps_per_epoch):
        dealt = deal(pairs.parts(schedule.step(step), limit), ranks, limit)
        assert len(dealt) == ranks and len({len(own) for own in dealt}) == 1, "ranks wait for each other"
        for micro_batch in (each for own in dealt for each in own):
            batch = pack([pairs.group(part) for part in micro_batch.parts])
            assert batch.input_ids.shape[1] <= limit
            if micro_batch.weight:
                seen.update(tuple(map(encoder.tokenizer.decode, pair)) for pair in unpacked(batch))
    end = encoder.tokenizer.eos_token
    wanted = Counter((row["prompt"], row["chosen"] + end, row["rejected"] + end) for row in rows)
    assert seen == wanted


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=80),
    ranks=st.integers(1, 70),
    spare=st.integers(0, 10_000),
)
@settings(QUICK, max_examples=200)
def test_every_part_is_dealt_once_within_the_limit(lengths, ranks, spare):
    parts = [Part(n, (2 * n, 2 * n + 1), (n,), length, length) for n, length in enumerate(lengths)]
    dealt = deal(parts, ranks, max(lengths) + spare)
    assert len(dealt) == ranks and len({len(own) for own in dealt}) == 1
    assert sorted(i for own in dealt for each in own if each.weight for i in each.pairs) == list(range(len(parts)))
    assert all(each.tokens <= max(lengths) + spare for own in dealt for each in own)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60), batch=st.integers(1, 100), seed=st.integers(0))
@settings(QUICK, max_examples=200)
def test_every_pair_is_in_one_step_of_each_epoch(sizes, batch, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    schedule = Schedule.of(groups, batch, 1, None, seed)
    for epoch in range(2):
        steps = [schedule.step(epoch * schedule.steps_per_epoch + n) for n in range(schedule.steps_per_epoch)]
        assert sorted(np.concatenate(steps)) == list(range(len(groups))) and all(len(step) for step in steps)
