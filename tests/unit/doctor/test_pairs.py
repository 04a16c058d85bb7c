"""What the doctor finds in pairs: each finding in a set that was made for it, and none in three real sets."""

import json
from pathlib import Path

import launching
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, GPT2Config

from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.doctor.pairs import _Beginnings, check_reference, check_tokens
from dpo_ds.models.files import load_tokenizer
from dpo_ds.models.find import find_model
from dpo_ds.ranks.world import from_environment
from dpo_ds.runs.data import read_pairs

DATA = launching.ROOT.parent / "shared" / "data"
REAL = {"hh": "hh-harmless/test.jsonl.gz", "alpaca": "alpaca-eval/pairs.jsonl.gz"}
WORDS = "red green blue small large round flat old new good".split()


def pairs_of(place: Path, rows: list[dict] | str | Path, *flags: str, model: str | Path = "tiny-gpt2"):
    """The pairs as a run reads them: training, held out, and how many were dropped."""
    if isinstance(rows, list):
        place.mkdir(exist_ok=True)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = place / "rows.jsonl"
    options = parse_options([f"--model={model}", f"--dataset={rows}", f"--cache_dir={place / 'cache'}", *flags])
    shape = find_model(options.model)
    options = options.replace(max_length=shape.max_length(options.max_length))
    found = read_pairs(options, load_tokenizer(shape), from_environment(), "2026-01-01")
    return found.train, found.held_out, sum(report.equal_once_cut for _, report in found.train_reports)


def row(n: int, chosen: str = "", rejected: str = "") -> dict:
    words = [WORDS[int(digit)] for digit in f"{n:03d}"]
    return {
        "prompt": f"Story {' '.join(words)}:",
        "chosen": chosen or f" The {words[2]} {words[0]} thing.",
        "rejected": rejected or f" A {words[1]} {words[2]} place.",
    }


def found_in(train: PairSet, held_out: PairSet, dropped: int = 0) -> set[str]:
    return {check.kind for check in check_tokens(train, held_out, dropped, 128) if not check.healthy}


@pytest.fixture
def gpt2(tmp_path) -> Path:
    if not DATA.is_dir():
        pytest.skip(f"needs the real pairs in {DATA}")
    AutoTokenizer.from_pretrained(DATA / "gpt2-tokenizer").save_pretrained(tmp_path / "gpt2")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    assert AutoConfig.from_pretrained(tmp_path / "gpt2").n_positions == 1024
    return tmp_path / "gpt2"


@pytest.mark.parametrize("name", REAL)
def test_real_pairs_are_healthy(name, gpt2, tmp_path):
    train, held_out, dropped = pairs_of(tmp_path, DATA / REAL[name], model=gpt2)
    assert len(train) > 2000
    assert found_in(train, held_out, dropped) == set()


def test_alpaca_is_cut_at_512(gpt2, tmp_path):
    train, held_out, dropped = pairs_of(tmp_path, DATA / REAL["alpaca"], "--max_length=512", model=gpt2)
    assert found_in(train, held_out, dropped) == {"cut_answers"}


def test_the_sample_is_healthy(tmp_path):
    train, held_out, dropped = pairs_of(tmp_path, "sample")
    assert found_in(train, held_out, dropped) == set()
    checks = check_tokens(train, held_out, dropped, 128)
    assert len({check.kind for check in checks}) == len(checks) == 7, "every check has looked"


MADE = {
    "contradicting_pairs": [*map(row, range(98)), row(7, row(7)["rejected"], row(7)["chosen"])],
    "repeated_pairs": [*map(row, range(90)), *map(row, range(10))],
    "length_decides": [row(n, chosen=" It is good, and it is old, and it is round and large.") for n in range(60)],
    "equal_beginnings": [
        row(n, *(" good" * 104 + word for word in (" red.", " blue."))) if n % 10 == 0 else row(n) for n in range(99)
    ],
    "cut_answers": [row(n, chosen=" red blue" * 80) if n % 3 == 0 else row(n) for n in range(99)],
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_made_for_it_is_found(kind, tmp_path):
    """And nothing else: the rows differ from healthy ones in nothing else."""
    assert found_in(*pairs_of(tmp_path / "healthy", [*map(row, range(99))], "--eval_pairs=0")) == set()
    flags = ["--eval_pairs=0", "--max_length=128", "--group_prompts=false"]
    assert found_in(*pairs_of(tmp_path / "made", MADE[kind], *flags)) == {kind}


def test_the_shorter_answer_may_decide_as_well(tmp_path):
    rows = [row(n, rejected=" It is good, and it is old, and it is round and large.") for n in range(60)]
    train, held_out, dropped = pairs_of(tmp_path, rows, "--eval_pairs=0")
    [finding] = [check for check in check_tokens(train, held_out, dropped, 128) if not check.healthy]
    assert finding.kind == "length_decides" and "in 0.0% of the pairs" in finding.figure


def test_answers_that_are_equal_once_cut_are_found(tmp_path):
    same = [row(n, *(" red blue" * 80 + word for word in (" red.", " blue."))) for n in range(5)]
    train, held_out, dropped = pairs_of(
        tmp_path, [*map(row, range(10, 99)), *same], "--max_length=128", "--eval_pairs=0"
    )
    [finding] = [check for check in check_tokens(train, held_out, dropped, 128) if not check.healthy]
    assert finding.kind == "cut_to_equal" and finding.figure.startswith("5 pairs were dropped")


def test_leaks_are_found(tmp_path):
    """Other prompts' equal answers, and dialogues that go on. Not the short answers that many prompts have."""
    held_out = [row(n, chosen=f" The {WORDS[n]} thing is round and flat and old and large and new.") for n in range(10)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(made) + "\n" for made in held_out))
    flag = f"--eval_dataset={tmp_path / 'held.jsonl'}"
    clean = [*map(row, range(100, 160))]
    goes_on = {**row(161), "prompt": held_out[3]["prompt"] + held_out[3]["chosen"] + "<|endoftext|> And then?"}
    cases = {
        "none": (clean, 0),
        "other prompt": ([*clean, {**held_out[4], "prompt": "Another story:"}], 1),
        "goes on": ([*clean, goes_on], 1),
    }
    for name, (rows, leaks) in cases.items():
        train, held, _ = pairs_of(tmp_path / name, rows, flag)
        [check] = [check for check in check_tokens(train, held, 0, 128) if check.kind == "leaked_pairs"]
        assert check.value == leaks / 10 and check.healthy == (leaks == 0), name
    short = [row(n, " yes.", " no.") for n in range(200, 240)]
    train, held, _ = pairs_of(tmp_path / "short", short)
    assert len(held) and "leaked_pairs" not in found_in(train, held)


def test_beginnings_are_those_that_a_plain_search_finds():
    generator = np.random.default_rng(0)
    strings = [bytes(generator.integers(97, 99, generator.integers(1, 7)).tolist()) for _ in range(60)]
    search = _Beginnings(strings)
    for _ in range(300):
        text = bytes(generator.integers(97, 99, generator.integers(1, 9)).tolist())
        assert sorted(search.of(text)) == [n for n, string in enumerate(strings) if text.startswith(string)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "kinds"),
    [
        ([-1.0, -1.2, -0.9, -1.4], [-1.1, -1.1, -1.3, -0.8], set()),
        ([-1.0] * 4, [-1.1] * 4, {"reference_accuracy"}),
        ([-1.1] * 4, [-1.0] * 4, {"reference_accuracy"}),
        ([-6.0, -5.9, -6.1, -6.2], [-5.9, -6.0, -6.0, -6.3], {"improbable_answers"}),
        ([-3.0, -0.9, -3.2, -3.1], [-1.0] * 4, {"sides_apart"}),
        ([np.nan] * 4, [-1.1] * 4, set()),
    ],
)
def test_what_the_reference_shows(chosen, rejected, kinds, tmp_path):
    """Log-probabilities per token of four pairs, and NaN for the others."""
    train, _, _ = pairs_of(tmp_path, [*map(row, range(20))], "--eval_pairs=0")
    logps = np.full(len(train.answers), np.nan, dtype=np.float32)
    for pair, values in enumerate(zip(chosen, rejected, strict=True)):
        logps[train.pairs[pair]] = values * train.learned_lengths[train.pairs[pair]]
    checks = check_reference(train, logps)
    assert {check.kind for check in checks if not check.healthy} == kinds
    assert len(checks) == (0 if np.isnan(chosen).any() else 3)
