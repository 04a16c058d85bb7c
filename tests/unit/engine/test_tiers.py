"""DeepSpeed takes each tier of ds_configs/, filled for every model. Mistakes in users' own files are reported."""

import json
import re
import sys

import launching
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dpo_ds.config import parse_options
from dpo_ds.engine.requirements import require_compiler
from dpo_ds.engine.tiers import AUTO, fill_tier, load_tier, reference_config, swap_folders
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_model, known_models
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
    for model_id in known_models():
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
    """It has every "auto" that transformers' Trainer fills, also in fp16 and scheduler."""
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
    "a key that nobody uses": ({"zzz": 1}, "nor dpo_ds uses: zzz; remove it"),
    "a former name": ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "former name of offload_optimizer"),
    "twin flow": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio"),
    "bf16 masters": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "loses DPO's small updates"),
    "unchecked gradients": (
        {"bf16": {"enabled": True, "check_grad_overflow": False}}, "that is not finite would be applied"),
    "zenflow": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1}}},
        "updates weights after each micro-batch"),
    "a writer of DeepSpeed's": ({"checkpoint": {"writer": {"type": "fast"}}}, "cannot load ZeRO's checkpoints again"),
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


def zero(**section):
    return {"zero_optimization": section}


def params(**section):
    return {"optimizer": {"type": "AdamW", "params": section}}


OFFLOAD = {"device": "cpu"}

# Files with one mistake each, and what the one line must say. Without the check, each would end in a traceback, most of
# them after the weights have loaded.
MISTAKES = [
    # sections that are no objects
    ({"zero_optimization": True}, "zero_optimization is true: it must be an object"),
    ({"zero_optimization": []}, "zero_optimization is []"),
    ({"zero_optimization": None}, "zero_optimization is null"),
    ({"optimizer": "AdamW"}, 'optimizer is "AdamW"'),
    ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params is null"),
    ({"optimizer": {"type": ["AdamW"]}}, 'optimizer.type must be AdamW, not ["AdamW"]'),
    ({"optimizer": {"type": "Lamb"}}, 'optimizer.type must be AdamW, not "Lamb"'),
    ({"bf16": True}, "bf16 is true"),
    ({"fp16": 1}, "fp16 is 1"),
    ({"scheduler": "WarmupLR"}, "scheduler is"),
    ({"data_types": "fp32"}, "data_types is"),
    ({"activation_checkpointing": 5}, "activation_checkpointing is 5"),
    ({"aio": []}, "aio is []"),
    ({"checkpoint": None}, "checkpoint is null"),
    ({"checkpoint": {"writer": "fast"}}, "checkpoint.writer is"),
    ({"timers": {"throughput": True}}, "timers.throughput is true"),
    ({"tensorboard": True}, "tensorboard is true"),
    ({"comms_logger": 1}, "comms_logger is 1"),
    # zero_optimization
    (zero(stage="3"), 'zero_optimization.stage is "3": it must be a number'),
    (zero(stage=True), "zero_optimization.stage is true"),
    (zero(stage=None), "zero_optimization.stage is null"),
    (zero(stage=3, offload_param="cpu"), 'zero_optimization.offload_param is "cpu": it must be an object'),
    (zero(stage=3, offload_optimizer=True), "zero_optimization.offload_optimizer is true"),
    (zero(stage=3, offload_optimizer={"device": "disk"}), 'zero_optimization.offload_optimizer.device is "disk"'),
    (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": "half"}), "zero_optimization.offload_optimizer.ratio"),
    (zero(stage=3, offload_param={"device": "cpu", "bufer": 1}), "zero_optimization.offload_param.bufer is 1"),
    (zero(stage=0, offload_optimizer=OFFLOAD), "zero_optimization.stage is 0: offload_optimizer needs"),
    (zero(stage=2, reduce_bucket_size=-5), "zero_optimization.reduce_bucket_size is -5"),
    (zero(stage=2, reduce_bucket_size="5e8"), 'zero_optimization.reduce_bucket_size is "5e8"'),
    (zero(stage=2, reduce_bucket_size="500000000"), 'zero_optimization.reduce_bucket_size is "500000000"'),
    (zero(stage=2, allgather_bucket_size=0), "zero_optimization.allgather_bucket_size is 0"),
    (zero(stage=2, overlap_comm="true"), 'zero_optimization.overlap_comm is "true": it must be true or false'),
    (zero(stage=3, sub_group_size=0), "zero_optimization.sub_group_size is 0: it must be above 0"),
    (zero(stage=3, leaf_module=5), "zero_optimization: leaf_module configuration must be a mapping"),
    (zero(stage=3, leaf_module={"classes": 5}), "zero_optimization.leaf_module.classes is 5"),
    (zero(stage=3, zero_hpz_partition_size=3), "zero_optimization.zero_hpz_partition_size is 3"),
    (zero(stage=2, offload_optimizer=OFFLOAD, zenflow={}), "zero_optimization.zenflow is {}"),
    (zero(stage=3, prefetch_bucket_size="5"), "write stage3_prefetch_bucket_size instead of"),
    (zero(stage=1, legacy_stage1=True), "zero_optimization.legacy_stage1"),
    (zero(stage=2, compute_grad_norm=False), "zero_optimization.compute_grad_norm"),
    (zero(stage=3, zero_quantized_weights=True), "zero_optimization.zero_quantized_weights is true"),
    (zero(stage=3, zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients is true"),
    (zero(stage=3, offload_optimizer={"device": "cpu", "super_offload": True}), "offload_optimizer.super_offload"),
    # the optimizer's parameters
    (params(lr="fast"), 'lr to "fast", but --learning_rate says'),
    (params(weight_decay=-1), "weight_decay to -1, but --weight_decay says"),
    (params(weight_decay="0.0"), 'weight_decay to "0.0"'),
    (params(betas=0.9), "optimizer.params.betas is 0.9: write two numbers"),
    (params(betas=[0.9]), "optimizer.params.betas is [0.9]"),
    (params(betas=[0.9, 1.0]), "optimizer.params.betas is [0.9, 1.0]"),
    (params(betas=[-0.1, 0.9]), "optimizer.params.betas is [-0.1, 0.9]"),
    (params(betas=["0.9", "0.99"]), "optimizer.params.betas is"),
    (params(betas=None), "optimizer.params.betas is null"),
    (params(eps=0), "optimizer.params.eps is 0"),
    (params(eps="tiny"), 'optimizer.params.eps is "tiny"'),
    (params(epsilon=1e-8), "optimizer.params.epsilon is 1e-08: AdamW takes no such parameter (did you mean eps?)"),
    (params(max_grad_norm=1.0), "optimizer.params.max_grad_norm is 1.0"),
    (params(params=[]), "optimizer.params.params is []"),
    (params(torch_adam="yes"), 'optimizer.params.torch_adam is "yes"'),
    (params(fused="yes"), 'optimizer.params.fused is "yes"'),
    (params(amsgrad="yes"), 'optimizer.params.amsgrad is "yes"'),
    (params(fused=True, foreach=True), "optimizer.params with fused: "),
    (params(differentiable=True), "optimizer.params with differentiable: "),
    ({**params(bias_corection=True), **zero(stage=3, offload_optimizer=OFFLOAD)}, "did you mean bias_correction"),
    ({**params(adamw_mode=True), **zero(stage=3, offload_optimizer=OFFLOAD)}, "optimizer.params.adamw_mode is true"),
    ({**params(amsgrad=True), **zero(stage=3, offload_optimizer=OFFLOAD)}, "optimizer.params.amsgrad is true"),
    # the rest
    ({"bf16": {"enabled": False, "check_overflow": True}}, "bf16.check_overflow is true: DeepSpeed has no such key"),
    ({"bf16": {"check_grad_overflow": "maybe"}}, 'bf16.check_grad_overflow is "maybe"'),
    ({"gradient_clipping": "much"}, 'gradient_clipping is "much": it must be a number'),
    ({"train_batch_size": [8]}, "train_batch_size"),
    ({"steps_per_print": 0}, "steps_per_print is 0: it must be above 0"),
    ({"steps_per_print": "ten"}, 'steps_per_print is "ten": it must be a whole number'),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0"),
    ({"gradient_predivide_factor": 2, **zero(stage=2)}, "gradient_predivide_factor with zero_optimization"),
    ({"prescale_gradients": True, **zero(stage=3)}, "prescale_gradients or"),
    ({"wall_clock_breakdown": "no"}, 'wall_clock_breakdown is "no"'),
    ({"communication_data_type": "fp8"}, "communication_data_type"),
    ({"communication_data_type": 16}, "communication_data_type is 16"),
    ({"log_level": "loud"}, "log_level: loud is not one of"),
    ({"data_types": {"grad_accum_dtype": "fp33"}}, 'data_types.grad_accum_dtype is "fp33"'),
    ({"data_types": {"grad_accum_dtype": "int8"}}, 'data_types.grad_accum_dtype is "int8"'),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "at ZeRO stage 0"),
    ({"data_types": {"param_dtype": "bf16"}}, 'data_types.param_dtype is "bf16"'),
    ({"data_types": {"buffer_dtype": ["fp32"]}}, "data_types.buffer_dtype is"),
    ({"data_types": {"keep_in_fp32_modules": 3}}, "data_types.keep_in_fp32_modules"),
    ({"aio": {"block_size": "1M"}}, 'aio.block_size is "1M": it must be a whole number'),
    ({"aio": {"queue_depth": 0}}, "aio.queue_depth is 0"),
    ({"aio": {"single_submit": "false"}}, 'aio.single_submit is "false"'),
    ({"aio": {"use_gds": True}}, "aio: GDS currently only"),
    ({"activation_checkpointing": {"number_checkpoints": "all"}}, "activation_checkpointing.number_checkpoints is"),
    ({"flops_profiler": {"enabled": "yes"}}, 'flops_profiler.enabled is "yes"'),
    ({"comms_logger": {"prof_ops": "all"}}, 'comms_logger.prof_ops is "all"'),
    ({"compile": {"deepcompile": "x"}}, 'compile.deepcompile is "x"'),
    ({"csv_monitor": {"enabled": True, "output_path": 5}}, "csv_monitor.output_path is 5"),
    ({"checkpoint": {"writer": {"type": "nope"}}}, 'checkpoint.writer is {"type": "nope"}'),
    ({"checkpoint": {"writer": {"type": "python"}}}, 'checkpoint.writer is {"type": "python"}'),
    ({"checkpoint": {"tag_validation": "perhaps"}}, "tag_validation"),
    ({"checkpoint": {"parallel_write": {"pipeline_stage": "maybe"}}}, "pipeline_stage"),
]  # fmt: skip


def fill(config: dict, tmp_path, ranks: int = 8, on_gpu: bool = False, precision: str = "fp32") -> dict:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config))
    return fill_tier(str(file), options("--precision", precision), known_model("gpt2"), ranks=ranks, on_gpu=on_gpu)


@pytest.mark.parametrize("config, words", MISTAKES, ids=lambda value: json.dumps(value) if value else "")
def test_a_mistake_is_one_line_that_names_the_key(config, words, tmp_path):
    with pytest.raises(UserError) as error:
        fill(config, tmp_path)
    line = str(error.value)
    assert words in line and "\n" not in line and line.startswith(f"--ds_config {tmp_path}/ds_config.json"), line


@pytest.mark.parametrize(
    "monitor, package", [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_monitor_needs_its_package(monitor, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"{monitor}.enabled is true: .*pip install '?{package}"):
        fill({monitor: {"enabled": True}}, tmp_path)
    fill({monitor: {"enabled": False}}, tmp_path)


ACCEPTED = [
    {},
    {"csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "a"}},
    {"steps_per_print": None, "communication_data_type": "fp32", "log_level": "warning", "wall_clock_breakdown": True},
    {"checkpoint": {"tag_validation": "Ignore", "writer": None, "parallel_write": {"pipeline_stage": True}}},
    {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
    {"aio": {"block_size": 4096, "thread_count": 1, "single_submit": False}},
    {"flops_profiler": {"enabled": False, "recompute_fwd_factor": 0, "output_file": None}},
    {"optimizer": {"params": {"betas": [0, 0.95], "foreach": True}}},
    params(torch_adam=True, adam_w_mode=False, amsgrad=True, maximize=False),
    zero(stage=3, offload_optimizer=None, offload_param={}, sub_group_size=1e8, leaf_module=None),
    {**params(bias_correction=True, fp32_optimizer_states=True), **zero(stage=2, offload_optimizer=OFFLOAD)},
    {**zero(stage=2), "data_types": {"grad_accum_dtype": "bf16", "param_dtype": "float32", "buffer_dtype": None}},
]


@pytest.mark.parametrize("config", ACCEPTED, ids=json.dumps)
def test_what_deepspeed_takes_passes(config, tmp_path):
    filled = fill(config, tmp_path)
    assert filled["optimizer"]["type"] == "AdamW", "DeepSpeed makes no optimizer without a type"
    assert all(filled["zero_optimization"].get(section, True) for section in ("offload_optimizer", "offload_param"))


def test_quantised_weights_are_for_gpus(tmp_path):
    assert fill(zero(stage=3, zero_quantized_weights=True), tmp_path, on_gpu=True, precision="bf16")


def test_each_run_has_its_own_swap_folder():
    model = known_model("gpt2")
    folders = []
    for run in ("a", "b"):
        chosen = options("--nvme_path", "/nvme", "--output_dir", run)
        policy = fill_tier("zero3_nvme_large", chosen, model, ranks=2, on_gpu=True)
        folders += swap_folders(policy) + swap_folders(reference_config(policy))
    assert len(set(folders)) == 4 and all(str(folder).startswith("/nvme/dpo_ds-") for folder in folders)


@pytest.mark.parametrize(
    "config, key",
    [(params(torch_adam=False), "torch_adam"), (zero(stage=3, zero_quantized_weights=True), "zero_quantized_weights")],
)
def test_what_is_compiled_for_a_gpu_needs_nvcc(config, key, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    filled = fill(config, tmp_path, on_gpu=True, precision="bf16")
    with pytest.raises(UserError, match=f"nvcc, which is not installed: remove {key}"):
        require_compiler("ds_config.json", filled, on_gpu=True)
