"""The user's command on real dialogues: HH harmless, GPT-2's own tokenizer, two ranks, ZeRO-3 with CPU offload."""

import gzip
import json
import math
import subprocess
import sys

import launching
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.data.steps import Schedule, deal
from dpo_ds.plan.choose import tokens_on_cpu
from dpo_ds.plan.footprint import longest_pair

DATA = launching.ROOT.parent / "shared" / "data"
DIALOGUES = DATA / "hh-harmless" / "test.jsonl.gz"
STEPS = 20

pytestmark = pytest.mark.skipif(not DIALOGUES.is_file(), reason=f"needs the real dialogues in {DATA}")

# A stranger's view of the merged folder: plain transformers, one forward over prompt and response, full logits.
STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
logps = []
for prompt, response in json.load(open(file)):
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        rows = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    logps.append(rows.gather(1, ids[0, start:, None]).sum().item())
assert not [name for name in sys.modules if name.startswith(("dpo_ds", "deepspeed"))]
print("LOGPS", json.dumps(logps))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=50256,
        eos_token_id=50256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "llama")
    AutoTokenizer.from_pretrained(DATA / "gpt2-tokenizer").save_pretrained(place / "llama")
    printed = launching.run(
        2, "-m", "dpo_ds.train", "--model", place / "llama", "--dataset", DIALOGUES, "--ds_config",
        "zero3_offload_large", "--max_steps", STEPS, "--output_dir", place / "out", "--cache_dir", place / "cache",
        "--generations", 1, "--global_batch_pairs", 16, "--eval_pairs", 40, "--eval_every", 10,
    ).stdout  # fmt: skip
    return place / "out", printed


def test_it_trains_from_ln_2_and_evaluates(run):
    folder, printed = run
    losses = launching.curve(folder)
    assert len(losses) == STEPS and losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    held_out = launching.curve(folder, "eval/loss")
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-5) and held_out[-1] < held_out[0]
    assert "invalidate" not in printed.lower(), "ZeRO-3 kept its traces"


@pytest.mark.parametrize(("global_batch", "least"), [(32, 0.97), (64, 0.99), (256, 0.995)])
def test_eight_ranks_get_the_same_number_of_tokens(run, global_batch, least):
    """The part of the ranks' time, over an epoch, in which none waits for one with more tokens. A step whose longest
    pair is more than an eighth of it cannot be balanced: 1.1% of the time, with 32 pairs a step."""
    folder, _ = run
    pairs = PairSet.open(next((folder.parent / "cache" / "tokens").glob("*/manifest.json")).parent)
    schedule = Schedule.of(pairs.pair_groups, global_batch, 1.0, None, seed=42)
    work = held = 0
    for number in range(schedule.steps - 1):  # the last is whatever is left
        dealt = deal(pairs.parts(schedule.step(number), 8192), 8, 8192)
        tokens = np.array([[m.weight * m.tokens for m in own] for own in dealt])
        work += tokens.sum()
        held += 8 * tokens.max(axis=0).sum()
    assert work / held >= least


def test_a_micro_batch_on_cpu_is_as_long_as_the_longest_pair_needs(run):
    folder, _ = run
    options = parse_options(["--config", str(folder / "options.yaml")])
    pairs = PairSet.open(next((folder.parent / "cache" / "tokens").glob("*/manifest.json")).parent)
    longest = int(pairs.packed_lengths.max())
    assert longest < longest_pair(options), "else the data shortens nothing"
    assert options.micro_batch_tokens == tokens_on_cpu(longest)


def test_the_doctor_says_that_the_model_does_not_know_the_language(run):
    """Its weights are random: it guesses among 50,257 tokens."""
    folder, printed = run
    findings = {finding["kind"]: finding for finding in json.loads((folder / "summary.json").read_text())["findings"]}
    assert findings["improbable_answers"]["value"] == pytest.approx(-math.log(50257), abs=0.2)
    for finding in findings.values():
        assert printed.count(finding["figure"]) == 1
    assert "length_decides" not in findings and "cut_answers" not in findings


def test_every_row_is_accounted_for(run):
    _, printed = run
    assert "2303 of 2312 rows are used" in printed
    assert "5 left out: the dialogues differ" in printed and "4 left out: an answer is empty" in printed


def test_a_stranger_scores_the_merged_folder_as_the_policy_was_scored(run, tmp_path):
    folder, _ = run
    with gzip.open(DIALOGUES, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    told, texts = [], []
    for line in map(json.loads, (folder / "evaluation.jsonl").read_text().splitlines()):
        for key in ("chosen", "rejected"):
            whole = rows[line["row"]][key]
            at = whole.rfind("\n\nAssistant:") + len("\n\nAssistant:")
            told.append(line[key])
            texts.append((whole[:at], whole[at:]))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, folder / "merged", tmp_path / "texts.json"],
        env={**launching.environment(), "PYTHONPATH": ""}, capture_output=True, text=True,
        timeout=launching.HANGS, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOGPS")]
    logps = json.loads(line.removeprefix("LOGPS "))
    # The sum of a few hundred log-probabilities of about -10 each, in fp32.
    assert logps == pytest.approx(told, rel=1e-5)
