"""What a run's losses need of the data is checked before weights load."""

import json

import pytest
from byte_tokenizer import tokenizer

from dpo_ds.config import Options, parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.errors import UserError
from dpo_ds.ranks.world import from_environment
from dpo_ds.runs.data import load_pairs
from dpo_ds.runs.prepare import require_data


def row(n: int, **fields) -> dict:
    return {"prompt": f"Question {n}:", "chosen": f" answer {n}", "rejected": f" no {n}", **fields}


def ranking(n: int, answers: int) -> dict:
    responses = [f" answer {n} {place}" for place in range(answers)]
    return {"prompt": f"Question {n}:", "responses": responses, "ranks": list(range(1, answers + 1))}


def options(**words) -> Options:
    return parse_options(["--model=none", "--max_length=64", *(f"--{name}={value}" for name, value in words.items())])


def loaded(place, rows: list[dict], **words) -> PairSet:
    """The rows' pairs, as a run has them."""
    (place / "rows.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    read = options(dataset=place / "rows.jsonl", cache_dir=place / "cache", eval_pairs=0, **words)
    return load_pairs(read, tokenizer(), from_environment(), "2026-01-01")[0]


def refusal(pairs: PairSet, /, **words) -> str:
    with pytest.raises(UserError) as refused:
        require_data(options(**words), pairs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("margins", "unusable"), [([1.5, None, 0.5, 2], 1), ([0, -1, 0.5, 2], 2), ([None] * 4, 4)], ids=str
)
def test_odpo_needs_a_margin_above_0_of_every_pair(margins, unusable, tmp_path):
    rows = [row(n, **({} if margin is None else {"margin": margin})) for n, margin in enumerate(margins)]
    pairs = loaded(tmp_path, rows)
    for loss in ("odpo", "sft,odpo"):
        assert refusal(pairs, loss=loss) == (
            f"--loss odpo reads by how much a chosen answer is better, but {unusable} of 4 pairs have no margin above "
            "0: name its column with --columns margin=..., or leave these rows out"
        )
    require_data(options(), pairs)


def test_odpo_takes_margins_from_a_column_and_from_scores(tmp_path):
    require_data(options(loss="odpo"), loaded(tmp_path, [row(n, margin=1 + n) for n in range(4)]))
    scored = [{**ranking(n, 3), "scores": [9, 4, 1]} for n in range(4)]
    for fields in scored:
        del fields["ranks"]
    require_data(options(loss="odpo"), loaded(tmp_path, scored))


def test_losses_that_sort_take_no_weights(tmp_path):
    weighted = loaded(tmp_path, [row(n, weight=1 + n % 2) for n in range(4)])
    equal = loaded(tmp_path, [row(n, weight=2) for n in range(4)])
    for loss in ("aot", "aot_unpaired", "sigmoid,aot"):
        assert refusal(weighted, loss=loss) == (
            f"--loss {loss.split(',')[-1]} sorts a step's pairs, so they cannot be weighted: remove the column weight, "
            "or choose another loss"
        )
        require_data(options(loss=loss), equal)
    require_data(options(), weighted)


def test_a_ranking_must_fit_into_a_step(tmp_path):
    """Five answers, each better than the next, are four pairs of one row."""
    words = {"loss": "plackett_luce", "pairs": "adjacent"}
    pairs = loaded(tmp_path, [ranking(n, 5 if n == 2 else 3) for n in range(4)], **words)
    assert refusal(pairs, global_batch_pairs=3, **words) == (
        "--loss plackett_luce reads whole rankings, but a prompt has 4 pairs, more than a step: raise "
        "--global_batch_pairs to 4"
    )
    require_data(options(global_batch_pairs=4, **words), pairs)
    require_data(options(global_batch_pairs=3, pairs="adjacent"), pairs)


def test_rankings_of_one_prompt_share_its_step(tmp_path):
    """Two rankings of a prompt have four pairs together. Each in a group of its own, they fit."""
    rows = [{**ranking(n, 3), "prompt": "Question:"} for n in range(2)]
    words = {"loss": "plackett_luce", "pairs": "adjacent", "global_batch_pairs": 3}
    assert refusal(loaded(tmp_path, rows, **words), **words) == (
        "--loss plackett_luce reads whole rankings, but a prompt has 4 pairs, more than a step: raise "
        "--global_batch_pairs to 4, or add --group_prompts false"
    )
    require_data(options(**words), loaded(tmp_path, rows, group_prompts="false", **words))
