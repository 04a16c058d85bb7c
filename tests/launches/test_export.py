"""Merged checkpoints: a plain Hugging Face folder that scores as the policy did, streamed in small shards."""

import json
import shutil

import launching
import oracle
import pytest
import tiny
import torch
from checkpoints import seal_again
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.errors import UserError
from dpo_ds.runs.folders import describe

# A file as models on the hub have it, which transformers reads and refuses to write; the model's tokens end with 2.
INVALID = """{
    "do_sample": false, "temperature": 0.9,
    "eos_token_id": 2
}"""
SHARD = 40_000  # bytes: several shards even of a tiny model

# name: (ranks, model, stage, further options)
CASES = {
    "gpt2-stage0-bf16": (1, "gpt2", 0, {"precision": "bf16"}),
    "llama-stage0-lora": (1, "llama", 0, {"lora": "true"}),
    "gpt2-stage0-lora": (1, "gpt2", 0, {"lora": "true", "reference": "base"}),
    "llama-stage3": (2, "llama", 3, {}),
    "llama-tied-stage3-bf16": (2, "llama-tied", 3, {"precision": "bf16"}),
    "gpt2-stage3-lora": (2, "gpt2", 3, {"lora": "true"}),
    "llama-stage3-lora-base": (2, "llama", 3, {"lora": "true", "reference": "base"}),
    "llama-stage2-lora": (2, "llama", 2, {"lora": "true", "lora_targets": "q_proj, v_proj"}),
    "llama-stage3-lora-head": (2, "llama", 3, {"lora": "true", "lora_targets": "q_proj, lm_head"}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    for name in {model for _, model, _, _ in CASES.values()}:
        tiny.make(name, place / name)
    (place / "llama" / "generation_config.json").write_text(INVALID)
    scenarios: dict[int, list] = {1: [], 2: []}
    for case, (ranks, model, stage, extra) in CASES.items():
        (place / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        options = {
            "model": place / model,
            "dataset": "sample",
            "ds_config": place / f"stage{stage}.json",
            "output_dir": place / case,
            "cache_dir": place / f"cache-{ranks}",
            "max_steps": 3,
            "global_batch_pairs": 8,
            "learning_rate": 5e-3,
            "max_length": 96,
            "eval_pairs": 6,
            "precision": "fp32",
            "generations": 1 if case == "llama-stage3" else 0,
            **extra,
        }
        argv = [f"--{key}={value}" for key, value in options.items()]
        scenarios[ranks].append({"argv": argv, "shard_bytes": SHARD})
    for ranks, runs in scenarios.items():
        launching.run_scenarios(ranks, runs, place / f"{ranks}.json")
    return place


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_scores_in_plain_transformers_as_the_policy_did(case, place):
    """The last evaluation's log-probabilities, scored again by two plain forwards from the merged folder."""
    from dpo_ds.data.pairs import PairSet

    bf16 = "bf16" in case
    model = oracle.load(place / case / "merged", torch.bfloat16 if bf16 else torch.float32)
    by_id = {}
    for manifest in (place / f"cache-{CASES[case][0]}" / "tokens").glob("*/manifest.json"):
        pairs = PairSet.open(manifest.parent)
        by_id |= {pairs.pair_id(i): pairs.pair(i) for i in range(len(pairs))}
    lines = [json.loads(line) for line in (place / case / "evaluation.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    with torch.no_grad():
        scored = oracle.pairs_logps(model, [by_id[line["pair"]] for line in lines])
    policy = torch.tensor([[line["chosen"], line["rejected"]] for line in lines])
    reference = torch.tensor([[line["reference_chosen"], line["reference_rejected"]] for line in lines])
    torch.testing.assert_close(scored, policy, atol=0.7 if bf16 else 2e-3, rtol=0)
    assert (policy - reference).abs().max() > 0.01, "nothing was learnt: the comparison shows nothing"


@pytest.mark.parametrize("case", CASES)
def test_layout_is_the_hubs(case, place):
    """The same tensor names as the model that went in, the same dtype throughout, shards with an index, no strays."""
    merged, model = place / case / "merged", CASES[case][1]
    assert set(weights(merged)) == set(weights(place / model))
    assert {t.dtype for t in weights(merged).values()} == {torch.bfloat16 if "bf16" in case else torch.float32}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(merged))
    shards = sorted(set(index["weight_map"].values()))
    assert (
        shards == [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        and len(shards) > 1
    )
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names <= {path.name for path in merged.iterdir()}
    assert not list((place / case).glob("*.partial"))
    AutoTokenizer.from_pretrained(merged)


@pytest.mark.parametrize("case", CASES)
def test_export_from_the_checkpoint_is_the_same_folder(case, place):
    """One CPU process without DeepSpeed ranks writes what the live engine wrote, bit for bit."""
    from dpo_ds import export

    (checkpoint,) = (place / case / "checkpoints").iterdir()
    folder = export.export_checkpoint(checkpoint, place / f"{case}-again")
    live, again = weights(place / case / "merged"), weights(folder)
    assert set(live) == set(again)
    for name in live:
        assert torch.equal(live[name], again[name]), name
    with pytest.raises(UserError, match="is there already"):
        export.export_checkpoint(checkpoint, folder)


@pytest.mark.parametrize(("case", "name"), [("gpt2-stage0-lora", "lora_A"), ("llama-stage3", "up_proj")])
def test_what_was_trained_and_is_missing_is_no_frozen_weight(case, name, place, tmp_path):
    """A checkpoint without it would be exported with the base's weight, or a new adapter's."""
    from dpo_ds import export

    (whole,) = (place / case / "checkpoints").iterdir()
    shutil.copytree(whole, checkpoint := tmp_path / whole.name)
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        save_file({key: value for key, value in tensors.items() if name not in key}, file, metadata)
    seal_again(checkpoint)
    with pytest.raises(UserError, match=rf"does not hold weight/model\..*{name}"):
        export.export_checkpoint(checkpoint, tmp_path / "merged")


@pytest.mark.parametrize("case", [case for case in CASES if "lora" in case])
def test_lora_is_merged_as_peft_merges_it(case, place):
    from dpo_ds.config import Options
    from dpo_ds.engine.slices import SliceReader
    from dpo_ds.models.lora import add_lora

    (folder,) = (place / case / "checkpoints").iterdir()
    facts = describe(folder)
    base = AutoModelForCausalLM.from_pretrained(place / CASES[case][1], dtype=torch.float32)
    model = add_lora(base, Options(**facts["options"]))
    stored = SliceReader(folder, "state")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(stored.whole(f"weight/model.{name}"))
            else:
                assert f"weight/model.{name}" not in stored, "a frozen weight is that of the model's files"
    merged = AutoModelForCausalLM.from_pretrained(place / case / "merged", dtype=torch.float32)
    theirs = model.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
        changed += not torch.equal(tensor, base.state_dict()[name]) if name in base.state_dict() else 0
    assert len(weights(place / case / "merged")) == len(weights(place / CASES[case][1]))


def test_lora_starts_at_ln_2_and_learns_the_same_on_any_stage(place):
    import math

    curves = {case: launching.curve(place / case) for case in CASES if "lora" in case}
    assert all(abs(curve[0] - math.log(2)) < 1e-5 for curve in curves.values())
    assert max(abs(a - b) for a, b in zip(curves["gpt2-stage0-lora"], curves["gpt2-stage3-lora"], strict=True)) < 1e-5
    one, two = curves["llama-stage0-lora"], curves["llama-stage3-lora-base"]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    assert abs(one[-1] - one[0]) > 1e-3


def test_bf16_starts_at_ln_2(place):
    for case in ("gpt2-stage0-bf16", "llama-tied-stage3-bf16"):
        assert abs(launching.curve(place / case)[0] - 0.693147) < 1e-3


def test_the_bases_generation_config_is_kept_but_for_the_token_that_ends_answers(place):
    """By the run and by the command alike. Answers are trained to end with EOS, 0 here."""
    (checkpoint,) = (place / "llama-stage3" / "checkpoints").iterdir()
    again = place / "llama-stage3-again"
    if not again.exists():
        from dpo_ds import export

        export.export_checkpoint(checkpoint, again)
    for folder in (place / "llama-stage3" / "merged", again):
        assert (folder / "generation_config.json").read_text() == INVALID.replace("2\n", "[2, 0]\n")
    assert not list((place / "llama-stage3").glob("*rehearsal*")), "the rehearsal's folder is gone"


def test_generations_are_shown(place):
    text = (place / "llama-stage3" / "generations.md").read_text()
    assert "**Before**" in text and "**After**" in text
