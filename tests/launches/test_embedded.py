"""The embedded default: made from the stories as its script says, no giveaway in its pairs, and DPO visibly works."""

import gzip
import itertools
import json
import re

import launching
import oracle
import pytest
import torch
from transformers import AutoTokenizer

from dpo_ds.embedded import make, model_folder, sample_file
from dpo_ds.embedded.stories import BOYS, GIRLS, NEEDS, preferences, stories

NAMES = {*BOYS, *GIRLS}


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    with gzip.open(sample_file(), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def answers(folder, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy; an answer that does not come to its end keeps no full stop."""
    model = oracle.load(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        ended = out[0, -1] == tokenizer.eos_token_id
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) if ended else "")
    return texts


def share_of_stories(prompts: list[str], texts: list[str]) -> float:
    """How many answers are simple sentences: whole, in the stories' words, about the prompt's two children."""
    vocabulary = set().union(*map(words, itertools.islice(stories(0), 5000)))
    good = [
        text.endswith((".", "!")) and words(text) <= vocabulary and words(text) & NAMES <= words(prompt)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return sum(good) / len(good)


def share_of_kind_deeds(texts: list[str]) -> float:
    gap = r"[\w ]+"
    deeds = [gap.join(map(re.escape, re.split(r"\{\w+\}", deed))) for need in NEEDS for deed in need.kind]
    return sum(any(re.match(f" {deed}", text) for deed in deeds) for text in texts) / len(texts)


def test_it_is_what_its_script_makes():
    assert make.check() == []


def test_it_is_small(tokenizer):
    assert sum(file.stat().st_size for file in model_folder().iterdir()) < 4e6
    assert sample_file().stat().st_size < 100_000
    assert len(tokenizer) <= 1000


def test_pairs_are_whole_and_different(pairs):
    assert len(pairs) == 1000 == len({pair["prompt"] for pair in pairs})
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"].startswith(" ") and pair["chosen"].endswith(".")


def test_length_gives_nothing_away(pairs, tokenizer):
    counts = [[len(tokenizer(pair[key])["input_ids"]) for key in ("chosen", "rejected")] for pair in pairs]
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in counts) / len(counts)
    assert abs(longer - 0.5) < 0.01
    assert abs(sum(chosen for chosen, _ in counts) / sum(rejected for _, rejected in counts) - 1) < 0.03


def test_no_token_gives_the_preference_away(pairs, tokenizer):
    """Whoever looked for a single token, present or not, would be right in six of ten pairs at most."""
    ids = {key: [set(tokenizer(pair[key])["input_ids"]) for pair in pairs] for key in ("chosen", "rejected")}
    for token in set().union(*ids["chosen"], *ids["rejected"]):
        chosen, rejected = (sum(token in tokens for tokens in ids[key]) / len(pairs) for key in ("chosen", "rejected"))
        assert abs(chosen - rejected) / 2 < 0.1, tokenizer.decode(token)


def test_the_model_leans_to_the_unkind_side_but_little(pairs, tokenizer):
    model = oracle.load(model_folder())
    ids = [[tokenizer(pair[key])["input_ids"] for key in ("prompt", "chosen", "rejected")] for pair in pairs[:200]]
    with torch.no_grad():
        chosen, rejected = oracle.pairs_logps(model, ids).unbind(1)
    right = (chosen > rejected).sum()
    assert 0.25 < right / 200 < 0.5


def test_dpo_turns_it_kind_and_it_goes_on_writing_sentences(tokenizer, tmp_path):
    flags = [
        "--model", "tiny-gpt2", "--dataset", "sample", "--output_dir", tmp_path / "run", "--cache_dir",
        tmp_path / "cache",
    ]  # fmt: skip
    launching.run(1, "-m", "dpo_ds.train", *flags)
    accuracies = launching.curve(tmp_path / "run", "eval/rewards/accuracies")
    assert accuracies[0] == 0.5 and accuracies[-1] >= 0.85
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["findings"] == [] and 0 < summary["clipped_share"] < 0.5
    checks = launching.run(1, "-m", "dpo_ds.doctor", *flags, "--output", tmp_path / "checks.json").stdout
    kinds = {check["kind"]: check["healthy"] for check in json.loads((tmp_path / "checks.json").read_text())}
    assert {"length_decides", "improbable_answers", "chosen_falls", "rewards_by_length"} <= set(kinds)
    assert all(kinds.values()) and f"findings: 0 of {len(kinds)} checks" in checks
    assert "**Before**" in (tmp_path / "run" / "generations.md").read_text()

    new = preferences(99, 40, len)
    prompts = [pair["prompt"] for pair in new]
    before, after = (answers(folder, tokenizer, prompts) for folder in (model_folder(), tmp_path / "run" / "merged"))
    assert share_of_stories(prompts, before) >= 0.9
    assert share_of_stories(prompts, after) >= 0.9
    assert share_of_kind_deeds(before) < 0.5 and share_of_kind_deeds(after) > 0.85
