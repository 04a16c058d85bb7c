"""The pairs of a run, from --dataset to the training and the held-out set."""

import json

import layouts
import numpy as np
import pytest
from byte_tokenizer import tokenizer

from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.errors import UserError
from dpo_ds.ranks.world import from_environment
from dpo_ds.runs.data import far_from, load_pairs, mixed

DATE = "2026-01-01"


def write(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(count: int, name: str = "Question") -> list[dict]:
    """Each prompt twice."""
    return [{"prompt": f"{name} {n // 2}:", "chosen": f" answer {n}", "rejected": f" no {n}"} for n in range(count)]


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """100 pairs in a file, the same in another order, and a few of them."""
    place = tmp_path_factory.mktemp("held-out")
    rows = numbered(100)
    shuffled = np.random.default_rng(0).permutation(100)
    for name, order in {"rows": range(100), "shuffled": shuffled, "few": range(7)}.items():
        write(place / f"{name}.jsonl", [rows[n] for n in order])
    write(place / "others.jsonl", numbered(60, "Other"))
    return place


def parts(place, dataset="rows.jsonl", **options) -> tuple[PairSet, PairSet]:
    words = {"model": "none", "dataset": place / dataset, "cache_dir": place / "cache", "max_length": 64}
    argv = [f"--{key}={value}" for key, value in {**words, **options}.items()]
    return load_pairs(parse_options(argv), tokenizer(), from_environment(), DATE)


def ids(pairs: PairSet) -> set[str]:
    return {pairs.pair_id(n) for n in range(len(pairs))}


def prompts(pairs: PairSet) -> set[str]:
    return {tokenizer().decode(pairs.prompt(n)) for n in range(len(pairs.prompts))}


def test_the_parts_are_the_whole_and_share_no_prompt(hundred, capsys):
    train, held = parts(hundred)
    assert (len(train), len(held)) == (94, 6), "a twentieth is 5, and a prompt has two pairs"
    assert not prompts(train) & prompts(held) and len(ids(train) | ids(held)) == 100
    assert f"{hundred}/rows.jsonl: 100 of 100 rows are used" in capsys.readouterr().out


def test_the_held_out_part_does_not_depend_on_the_order_of_the_rows(hundred):
    assert [ids(part) for part in parts(hundred)] == [ids(part) for part in parts(hundred, "shuffled.jsonl")]


def test_the_number_of_held_out_pairs_may_be_said(hundred):
    assert [len(part) for part in parts(hundred, eval_pairs=20)] == [80, 20]
    assert [len(part) for part in parts(hundred, eval_pairs=0)] == [100, 0]
    with pytest.raises(UserError, match="more than half of the 100 pairs"):
        parts(hundred, eval_pairs=51)


@pytest.mark.parametrize("sizes", [[1], [9], [3, 96], [40, 60]])
def test_a_held_out_part_that_is_far_from_what_was_asked_for_is_said(tmp_path, capsys, sizes):
    """Prompts of so many pairs each."""
    rows = [{"prompt": f"Question {prompt}:", "chosen": f" answer {n}", "rejected": f" no {n}"}
            for prompt, size in enumerate(sizes) for n in range(size)]  # fmt: skip
    write(tmp_path / "rows.jsonl", rows)
    held = len(parts(tmp_path)[1])
    line = far_from(1 if sum(sizes) < 20 else 5, held)
    assert (line is None) == (sizes == [3, 96] and held == 3)
    if line is not None:
        assert line in capsys.readouterr().out
        assert ("no pair is held out" in line) == (len(sizes) == 1) and "--eval_dataset" in line


@pytest.mark.parametrize(
    ("wanted", "held", "said"), [(5, 5, 0), (5, 10, 0), (4, 2, 0), (5, 11, 1), (5, 2, 1), (0, 0, 0)]
)
def test_far_is_half_or_twice(wanted, held, said):
    assert (far_from(wanted, held) is not None) == bool(said)


def test_a_set_of_its_own_for_evaluation(hundred):
    others = hundred / "others.jsonl"
    assert [len(part) for part in parts(hundred, eval_dataset=others)] == [100, 60]
    assert [len(part) for part in parts(hundred, eval_dataset=others, eval_pairs=3)] == [100, 3]


def test_training_pairs_whose_prompt_is_held_out_are_taken_out_and_counted(hundred, capsys):
    """The seven pairs ask four questions, which eight training pairs ask too."""
    train, held = parts(hundred, eval_dataset=hundred / "few.jsonl")
    assert (len(train), len(held)) == (92, 7) and not prompts(train) & prompts(held)
    assert "8 training pairs are left out: held-out pairs have the same prompts" in capsys.readouterr().out
    with pytest.raises(UserError, match="every prompt of --dataset is also in --eval_dataset"):
        parts(hundred, "few.jsonl", eval_dataset=hundred / "rows.jsonl")


def test_a_test_split_that_comes_with_the_data_is_held_out_and_said(tmp_path, capsys):
    write(tmp_path / "set" / "data" / "train.jsonl", numbered(20))
    write(tmp_path / "set" / "data" / "test.jsonl", numbered(6, "Test"))
    train, held = parts(tmp_path, "set")
    assert (len(train), len(held)) == (20, 6) and prompts(held) == {f"Test {n}:" for n in range(3)}
    assert "set, split test: 6 of 6 rows are used" in capsys.readouterr().out
    assert [len(part) for part in parts(tmp_path, "set", eval_pairs=0)] == [20, 0]


def test_a_test_split_that_asks_all_that_is_trained_on_is_named(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "set" / "data" / f"{split}.jsonl", numbered(6))
    with pytest.raises(UserError, match="every prompt of --dataset is also in its own test split"):
        parts(tmp_path, "set")


@pytest.mark.parametrize("name", ["09_implicit_prompts_leak", "09b_blank_variants_leak"])
def test_no_question_is_on_both_sides(name, tmp_path):
    file = layouts_data() / f"{name}.jsonl"
    train, held = parts(tmp_path, file, eval_pairs=5)
    assert len(held) >= 5 and not asked(train) & asked(held)


def layouts_data():
    from launching import ROOT

    folder = ROOT.parent / "shared" / "data" / "forms"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


def asked(pairs: PairSet) -> set[str]:
    """The questions of the two files: "item 3", in any arrangement."""
    return {" ".join(prompt.lower().split("?")[0].split()[-2:]) for prompt in prompts(pairs)}


# ---------------------------------------------------------------------------------------------------- several data sets


def test_several_sets_are_read_as_one(hundred):
    train, held = parts(hundred, f"rows.jsonl,{hundred}/others.jsonl")
    assert len(train) + len(held) == 160 and len(train.prompts) + len(held.prompts) == 80


@pytest.mark.parametrize(
    ("weights", "counts"), [((0.5, 0.5), (60, 60)), ((0.8, 0.2), (100, 25)), ((0.1, 0.9), (7, 60))]
)
def test_a_mix_has_the_shares_that_were_asked_for(hundred, weights, counts, capsys):
    name = f"rows.jsonl:{weights[0]},{hundred}/others.jsonl:{weights[1]}"
    train, _ = parts(hundred, name, eval_pairs=0)
    assert np.bincount(train.sources).tolist() == list(counts)
    assert f"{hundred}/rows.jsonl: {counts[0]} of 100 pairs are in the mix" in capsys.readouterr().out
    again, _ = parts(hundred, name, eval_pairs=0)
    other, _ = parts(hundred, name, eval_pairs=0, seed=7)
    assert ids(again) == ids(train) and (ids(other) != ids(train) or counts == (100, 25))


def test_a_share_of_less_than_a_pair_is_refused(hundred):
    with pytest.raises(UserError, match=r"others\.jsonl has the weight 0\.001 in a mix of 100 pairs"):
        parts(hundred, f"rows.jsonl:0.999,{hundred}/others.jsonl:0.001", eval_pairs=0)


def test_a_mix_takes_no_pair_twice_and_keeps_prompts_together(hundred):
    whole, _ = parts(hundred, f"rows.jsonl,{hundred}/others.jsonl", eval_pairs=0)
    mix = mixed(whole, [("one", 0.25), ("two", 0.75)], seed=0, note=print)
    assert len(ids(mix)) == len(mix) == 80 and np.bincount(mix.sources).tolist() == [20, 60]
    assert len(mix.prompts) == 40, "both pairs of a prompt"


# -------------------------------------------------------------------------------------------------------- whole layouts


@pytest.mark.parametrize("name", layouts.LARGEST)
def test_the_largest_public_layouts_load_by_dataset_alone(name, tmp_path, capsys):
    write(tmp_path / "rows.jsonl", layouts.rows(name, 10))
    train, held = parts(tmp_path, max_length=2000)
    assert "10 of 10 rows are used" in capsys.readouterr().out
    assert len(train) + len(held) == 10 and len(held) >= 1
    assert not len(train.scored) and (train.answers[:, 1] > 1).all()


def test_four_answers_make_six_pairs_of_one_group(tmp_path):
    rows = [
        {"prompt": f"Question {n}:", "responses": [f" answer {n} {a}" for a in "abcd"], "ranks": [1, 2, 3, 4]}
        for n in range(8)
    ]
    write(tmp_path / "rows.jsonl", rows)
    train, _ = parts(tmp_path, pairs="all", eval_pairs=0)
    assert (len(train), len(train.prompts), len(train.answers)) == (48, 8, 32)
    apart, _ = parts(tmp_path, pairs="all", eval_pairs=0, group_prompts="false")
    assert (len(apart), len(apart.prompts), len(apart.answers)) == (48, 8, 32), "a row is a group in any case"
