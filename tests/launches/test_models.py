"""The twelve models of the report, each as its tiny twin, through every check: the table that docs/models.md shows.

Real runs: one rank at stage 0; two ranks at ZeRO-3, stopped and resumed; LoRA likewise. Exported in small shards.
"""

import gzip
import json
import re
from itertools import islice

import launching
import numpy as np
import oracle
import pytest
import templates
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_ds.config import Options
from dpo_ds.data.pairs import Group, PairSet
from dpo_ds.embedded import sample_file
from dpo_ds.engine.slices import SliceReader
from dpo_ds.models.lora import add_lora
from dpo_ds.runs.folders import describe
from dpo_ds.scoring.attention import SDPA, implementation
from dpo_ds.scoring.packed import pack
from dpo_ds.scoring.scorer import Scorer

STEPS, STOP, SAVE = 5, 3, 2
SHARD = 200_000  # bytes: several shards of each twin
PEER = {  # what the hub's checkpoints call a tensor of theirs that transformers holds in another way, or this one has
    "gpt2": "transformer.h.1.attn.c_attn.bias",
    "microsoft/Phi-3-mini-4k-instruct": "model.layers.1.mlp.gate_up_proj.weight",
    "Qwen/Qwen2-7B-Instruct": "model.layers.1.self_attn.q_proj.bias",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every run, in one launch per number of ranks."""
    place = tmp_path_factory.mktemp("models")
    for stage in (0, 3):
        (place / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    with gzip.open(sample_file(), "rt", encoding="utf-8") as file:
        (place / "pairs.jsonl").write_text("".join(islice(file, 60)))
    scenarios: dict[int, list] = {1: [], 2: []}
    for model_id in tiny.TWELVE:
        tiny.make(model_id, place / tiny.short(model_id))
        runs = {
            "one": (1, {"ds_config": place / "stage0.json", "export": "none"}),
            "resumed": (2, {"ds_config": place / "stage3.json", "save_every": SAVE}),
            "lora": (2, {"ds_config": place / "stage3.json", "lora": "true", "max_steps": 3, "learning_rate": 5e-3}),
        }
        for kind, (ranks, extra) in runs.items():
            options = {
                "model": place / tiny.short(model_id),
                "dataset": place / "pairs.jsonl",
                "output_dir": place / f"{tiny.short(model_id)}-{kind}",
                "cache_dir": place / f"cache-{tiny.short(model_id)}",
                "max_steps": STEPS,
                "global_batch_pairs": 8,
                "learning_rate": 4e-4,
                "max_length": 96,
                "eval_pairs": 6,
                "eval_every": 0,
                "generations": 0,
                "precision": "fp32",
                **extra,
            }
            scenario = {"argv": [f"--{key}={value}" for key, value in options.items()], "shard_bytes": SHARD}
            if kind == "resumed":
                scenarios[ranks].append({**scenario, "stop_after": STOP})
            scenarios[ranks].append(scenario)
    for ranks, runs in scenarios.items():
        launching.run_scenarios(ranks, runs, place / f"{ranks}.json")
    return place


def merged(place, model_id: str, kind: str) -> dict[str, torch.Tensor]:
    folder = place / f"{tiny.short(model_id)}-{kind}" / "merged"
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pairs_of(place, model_id: str) -> dict:
    """The tokenised pairs by their id."""
    (manifest,) = (place / f"cache-{tiny.short(model_id)}" / "tokens").glob("*/manifest.json")
    pairs = PairSet.open(manifest.parent)
    return {pairs.pair_id(i): pairs.pair(i) for i in range(len(pairs))}


# ------------------------------------------------------------------------------------------------------- the checks


def packed_scoring(model_id, place):
    """Values and gradients of packed pairs are those of two plain forwards, to 1e-5."""
    folder = place / tiny.short(model_id)
    pairs = list(pairs_of(place, model_id).values())[:4]
    plain = oracle.load(folder)
    expected = oracle.pairs_logps(plain, pairs)
    oracle.losses(expected, torch.zeros_like(expected), 0.1).sum().backward()
    packed = Scorer(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation(SDPA)).eval())
    logps = packed(pack([Group.of_pair(*pair) for pair in pairs])).answers.view(-1, 2)
    oracle.losses(logps, torch.zeros_like(expected), 0.1).sum().backward()
    lengths = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])
    torch.testing.assert_close(logps / lengths, expected / lengths, atol=1e-5, rtol=0)  # a token, on average
    gradients = dict(packed.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def two_ranks_zero3(model_id, place):
    """Five steps on two ranks at ZeRO-3 are those on one rank at stage 0, to 1e-5, from ln 2 on."""
    one, two = (launching.curve(place / f"{tiny.short(model_id)}-{kind}") for kind in ("one", "resumed"))
    assert len(one) == STEPS and abs(one[0] - 0.693147) < 1e-5 and max(abs(np.diff(one))) > 1e-3
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def lora_merge(model_id, place):
    """LoRA trains on two ranks at ZeRO-3; the export merges it as peft does, and leaves the rest as it was."""
    run = place / f"{tiny.short(model_id)}-lora"
    curve = launching.curve(run)
    assert abs(curve[0] - 0.693147) < 1e-5 and abs(curve[-1] - curve[0]) > 1e-4
    (folder,) = (run / "checkpoints").iterdir()
    facts = describe(folder)
    base = AutoModelForCausalLM.from_pretrained(place / tiny.short(model_id), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = add_lora(base, Options(**facts["options"]))
    stored = SliceReader(folder, "state")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"weight/model.{name}" in stored:  # the others were frozen
                parameter.copy_(stored.whole(f"weight/model.{name}"))
    theirs = adapted.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).state_dict()
    changed = set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0, msg=name)
        changed |= {name} if not torch.equal(tensor, before[name]) else set()
    assert changed and all(re.search(r"(proj|attn|fc|fc1|fc2)\.weight$", name) for name in changed)


def resume(model_id, place):
    """Stopped after step 3 and resumed from the checkpoint of step 2, it has the losses and norms of a run that was not
    stopped. (That they are equal to the bit, on as many ranks: test_resume.py.)"""
    one, resumed = (place / f"{tiny.short(model_id)}-{kind}" for kind in ("one", "resumed"))
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3), ("eval/loss", 2e-5)):
        np.testing.assert_allclose(
            launching.curve(resumed, key), launching.curve(one, key), rtol=0, atol=tolerance, err_msg=key
        )
    steps = [line["step"] for line in launching.metrics(resumed) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def export(model_id, place):
    """The merged folder has the hub's tensor names, and plain transformers finds the policy's log-probabilities."""
    run = place / f"{tiny.short(model_id)}-resumed"
    names = set(merged(place, model_id, "resumed"))
    assert names == set(load_file(place / tiny.short(model_id) / "model.safetensors"))
    assert PEER.get(model_id, "model.layers.1.mlp.down_proj.weight") in names
    model = oracle.load(run / "merged")
    by_id = pairs_of(place, model_id)
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        scored = oracle.pairs_logps(model, [by_id[line["pair"]] for line in lines])
    policy = torch.tensor([[line["chosen"], line["rejected"]] for line in lines])
    torch.testing.assert_close(scored, policy, atol=1e-3, rtol=1e-6)
    reference = torch.tensor([[line["reference_chosen"], line["reference_rejected"]] for line in lines])
    assert (policy - reference).abs().max() > 0.05, "nothing was learnt: the comparison shows nothing"
    ours, theirs = (
        AutoConfig.from_pretrained(folder).to_dict() for folder in (run / "merged", place / tiny.short(model_id))
    )
    drop = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in drop} == {k: v for k, v in theirs.items() if k not in drop}


def template(model_id, place):
    """A pair's response ends with the model's end of turn, once, and begins where the prompt's template ends."""
    tokenizer = AutoTokenizer.from_pretrained(place / tiny.short(model_id))
    prompt, chosen, rejected = next(iter(pairs_of(place, model_id).values()))
    end = templates.end_of_turn(model_id)
    for response in (chosen, rejected):
        text = tokenizer.decode(response)
        assert text.endswith(end) and text.count(end) == 1
    if tokenizer.chat_template:
        opened = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\0"}], add_generation_prompt=True, tokenize=False
        ).partition("\0")[2]
        ids = tokenizer(opened, add_special_tokens=False)["input_ids"]
        assert list(prompt[-1:]) == ids[-1:]


CHECKS = [packed_scoring, two_ranks_zero3, lora_merge, resume, export, template]


@pytest.mark.parametrize("model_id", tiny.TWELVE, ids=tiny.short)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_twelve(model_id, check, place):
    check(model_id, place)


def test_the_page_shows_this_table():
    """No tick in docs/models.md without a test."""
    page = (launching.ROOT / "docs" / "models.md").read_text()
    rows = ["| model | " + " | ".join(check.__name__.replace("_", " ") for check in CHECKS) + " |"]
    rows += [f"| `{model_id}` |" + " ✓ |" * len(CHECKS) for model_id in tiny.TWELVE]
    for row in rows:
        assert row in page, row
