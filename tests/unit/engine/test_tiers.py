"""The tiers of ds_configs/: each loads in DeepSpeed as filled, for every model; what users' own files may hold."""

import json
import re

import launching
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dpo_ds.config import parse_options
from dpo_ds.engine.tiers import AUTO, fill_tier, load_tier, reference_config, swap_folders
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_model, table
from dpo_ds.resources import tier_files

TIERS = sorted(tier_files())


def options(*more: str):
    return parse_options(["--model", "gpt2", "--precision", "bf16", "--learning_rate", "5e-7", *more])


def leaves(config, path=()):
    if not isinstance(config, dict):
        return [(path, config)]
    return [leaf for key, value in config.items() for leaf in leaves(value, (*path, key))]


def test_the_tiers_are_those_of_the_report():
    assert TIERS == [
        "zero0_debug", "zero2_small", "zero3_lora_large", "zero3_nvme_large", "zero3_offload_large",
        "zero3_offload_moe", "zero3_offload_specialised", "zero3_standard",
    ]  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
def test_deepspeed_takes_each_tier_as_it_is_filled(tier):
    for model_id in table():
        filled = fill_tier(tier, options("--nvme_path", "/nvme"), known_model(model_id), ranks=1, on_gpu=True)
        assert AUTO not in [value for _, value in leaves(filled)]
        found = DeepSpeedConfig(filled)
        assert found.zero_optimization_stage == int(tier[4]) and found.gradient_clipping == 1.0
        assert DeepSpeedConfig(reference_config(filled)).zero_optimization_stage in (0, 3)


@pytest.mark.parametrize("tier", TIERS)
def test_each_key_is_justified(tier):
    """ds_configs/README.md has a row for every key of every tier."""
    rows = [line.split("|")[1] for line in (launching.ROOT / "ds_configs" / "README.md").read_text().splitlines()
            if line.startswith("| `")]  # fmt: skip
    words = {word for row in rows for word in re.findall(r"[a-z0-9_]+", row)}
    for path, _ in leaves(load_tier(tier)):
        assert words & set(path), path


def test_sizes_follow_the_model():
    llama = fill_tier("zero3_standard", options(), known_model("meta-llama/Meta-Llama-3-70B-Instruct"), 8, True)
    zero = llama["zero_optimization"]
    assert zero["reduce_bucket_size"] == 8192**2 and zero["stage3_param_persistence_threshold"] == 81_920
    assert zero["stage3_max_live_parameters"] == 10**9
    small = fill_tier("zero3_standard", options(), known_model("gpt2"), 8, True)["zero_optimization"]
    assert small["reduce_bucket_size"] == 768**2


def test_a_file_as_transformers_users_have_it(tmp_path):
    """Every "auto" that transformers' Trainer fills, fp16 and scheduler among them."""
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"},
            "overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_gather_16bit_weights_on_model_save": "auto",
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }))  # fmt: skip
    filled = fill_tier(str(file), options(), known_model("gpt2"), ranks=1, on_gpu=True)
    assert DeepSpeedConfig(filled).zero_config.offload_optimizer.device == "cpu"
    assert filled["optimizer"]["params"] == {"lr": 5e-7, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


REFUSED = {
    "a removed key": ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
    "a removed zero key": ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "MiCS"),
    "a misspelt key": ({"gradient_cliping": 1.0}, "did you mean gradient_clipping"),
    "a key of nobody's": ({"zzz": 1}, "does not use: zzz; remove it"),
    "a former word": ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "former word for offload_optimizer"),
    "twin flow": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio"),
    "bf16 masters": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "loses DPO's small updates"),
    "nvme without a folder": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "--nvme_path"),
    "nvme at stage 2": ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "stage 3"),
    "parameters alone on nvme": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "the optimizer elsewhere"),
    "experts not whole": (
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["some.Block"]}}}, "wait for each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case, tmp_path):
    config, words = REFUSED[case]
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        fill_tier(str(file), options(), known_model("mistralai/Mixtral-8x7B-Instruct-v0.1"), ranks=8, on_gpu=True)
    assert words in str(error.value) and "\n" not in str(error.value) and "--ds_config" in str(error.value)


def test_each_run_has_its_own_swap_folder():
    model = known_model("gpt2")
    folders = []
    for run in ("a", "b"):
        chosen = options("--nvme_path", "/nvme", "--output_dir", run)
        policy = fill_tier("zero3_nvme_large", chosen, model, ranks=2, on_gpu=True)
        folders += swap_folders(policy) + swap_folders(reference_config(policy))
    assert len(set(folders)) == 4 and all(str(folder).startswith("/nvme/dpo_ds-") for folder in folders)
