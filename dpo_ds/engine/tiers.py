"""Loads a DeepSpeed config (a tier of ds_configs/, or the user's own file) and fills in what it leaves "auto".

deepspeed.initialize takes a filled config: no "auto" is left, dpo_ds sets the batch sizes (a step is a set of pairs:
data/steps.py), and nothing contradicts the options.
"""

import copy
import hashlib
import json
from pathlib import Path

from dpo_ds.config import Options
from dpo_ds.engine import forms
from dpo_ds.engine.check_config import AUTO, check_file, check_filled, leaves, shown
from dpo_ds.errors import UserError
from dpo_ds.models.model import Model
from dpo_ds.resources import tier_files

GRAD_SUMS = "grad_accum_dtype"
# DeepSpeed does not know which pairs a step has: dpo_ds marks the end of a step itself.
BATCH_SIZES_ARE_OURS = (
    ': remove it or make it "auto"; a step is --global_batch_pairs pairs, and --micro_batch_tokens limits what a GPU '
    "takes at a time"
)


def load_tier(name: str) -> dict:
    """The JSON of a tier or file, unchanged. Raises UserError if there is no such file, or if it is not JSON."""
    tiers = tier_files()
    path = tiers.get(name, Path(name).expanduser())
    if not path.is_file():
        raise UserError(f"--ds_config {name} is neither a file nor a tier; the tiers are {', '.join(sorted(tiers))}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path} must hold one JSON object, as DeepSpeed's config does")
    return config


def fill_tier(name: str, options: Options, model: Model, ranks: int, on_gpu: bool) -> dict:
    """The config for deepspeed.initialize, with every "auto" filled and with dpo_ds's batch sizes.

    `options.precision` and `learning_rate` must be decided. Raises UserError if the file contradicts an option, or
    turns on something that DeepSpeed is known to get wrong.
    """
    config = copy.deepcopy(load_tier(name))
    check_file(name, config)
    _drop_what_is_off(config)

    def settle(section: dict, key: str, value, flag: str | None = None) -> None:
        """Fills a key that is "auto" or missing. Refuses any value but the option's (dpo_ds's own, without a flag)."""
        if section.get(key, AUTO) not in (AUTO, value):
            remedy = f", but {flag} says {value}: make them agree" if flag else BATCH_SIZES_ARE_OURS
            raise UserError(f"--ds_config {name} sets {key} to {shown(section[key])}{remedy}")
        section[key] = value

    settle(config, "train_micro_batch_size_per_gpu", 1)
    settle(config, "gradient_accumulation_steps", 1)
    settle(config, "train_batch_size", ranks)
    settle(config, "gradient_clipping", options.max_grad_norm, "--max_grad_norm")
    settle(config.setdefault("bf16", {}), "enabled", options.precision == "bf16", f"--precision {options.precision}")

    optimizer = config.setdefault("optimizer", {})
    optimizer.setdefault("type", "AdamW")  # without a type, DeepSpeed would make no optimizer
    params = optimizer.setdefault("params", {})
    settle(params, "lr", options.learning_rate, "--learning_rate")
    settle(params, "weight_decay", options.weight_decay, "--weight_decay")
    for key, default in (("betas", [0.9, 0.999]), ("eps", 1e-8)):
        if params.get(key, AUTO) == AUTO:
            params[key] = default
    params["betas"] = [float(beta) for beta in params["betas"]]  # torch refuses 0 for 0.0

    zero = config.setdefault("zero_optimization", {"stage": 0})
    zero.setdefault("stage", 0)
    sums = config.get("data_types") or {}
    if options.gradients == forms.GPU_BF16 and forms.on_host(config):
        config["data_types"] = sums  # DeepSpeed sums in the model's dtype by default
        settle(sums, GRAD_SUMS, "bf16", f"--gradients {forms.GPU_BF16}")
    elif sums.get(GRAD_SUMS) == AUTO:
        sums[GRAD_SUMS] = "fp32"
    if uses_nvme(config):
        _fill_nvme(name, zero, options, max(p.numel() for p in model.skeleton.parameters()), ranks)
    _fill_sizes(zero, model)
    if zero["stage"] == 3:
        # An invalidated trace stops all prefetching, so the user should see the warning.
        zero.setdefault("log_trace_cache_warnings", True)
        _fill_leaf_modules(name, zero, model)
    if "offload_optimizer" not in zero:
        params.setdefault("torch_adam", True)  # torch's own AdamW: DeepSpeed's FusedAdam has to be compiled first
        if params["torch_adam"] and not (params.get("foreach") or params.get("differentiable")):
            params.setdefault("fused", True)  # one pass over the weights, without temporaries
    left = [path for path, value in leaves(config) if value == AUTO]
    if left:
        raise UserError(f'--ds_config {name}: no rule fills "auto" for {left[0]}; give it a value')
    check_filled(name, config, ranks, on_gpu)
    return config


def _drop_what_is_off(config: dict) -> None:
    """Removes sections that are off, so that each remaining section is on."""
    config.pop("fp16", None)  # in files for transformers it is "auto" or off
    config.pop("scheduler", None)  # likewise, with nothing but "auto" in it
    zero = config.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        if section in zero and (zero[section] or {}).get("device", "none") == "none":
            zero.pop(section)


def _fill_sizes(zero: dict, model: Model) -> None:
    """Fills bucket sizes by transformers' rules (integrations/deepspeed.py): a layer's square matrix, 0.9 of it, ten
    rows. For live parameters it takes DeepSpeed's default, or two blocks of experts if those are larger."""
    hidden = model.hidden_size
    live = max(10**9, 2 * model.largest_block)
    rules = {
        "reduce_bucket_size": hidden**2,
        "allgather_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden**2),
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_gather_16bit_weights_on_model_save": False,
        # With the optimizer on the host, a sub-group's gradients pass through a block there.
        "sub_group_size": 10**8 if (zero.get("offload_optimizer") or {}).get("device") == "cpu" else 10**9,
    }
    for key, value in rules.items():
        if zero.get(key) == AUTO:
            zero[key] = value


def _fill_leaf_modules(name: str, zero: dict, model: Model) -> None:
    """Has ZeRO-3 gather blocks of experts whole, also those missing from DeepSpeed's default list."""
    leaf = dict(zero.get("leaf_module") or {})
    if isinstance(leaf.get("classes"), str) and leaf["classes"] != AUTO:
        leaf["classes"] = [leaf["classes"]]  # as DeepSpeed reads it
    if leaf.get("classes", AUTO) == AUTO and (model.moe_blocks or leaf):
        zero["leaf_module"] = {**leaf, "classes": model.moe_blocks}
    elif missing := set(model.moe_blocks) - set(leaf.get("classes", model.moe_blocks)):
        raise UserError(
            f"--ds_config {name}: {missing.pop()} is missing from leaf_module.classes: ranks whose tokens go to "
            'different experts would wait for each other for ever; add it, or make classes "auto"'
        )


def uses_nvme(config: dict) -> bool:
    zero = config.get("zero_optimization", {})
    return any((zero.get(section) or {}).get("device") == "nvme" for section in ("offload_optimizer", "offload_param"))


def swap_folders(config: dict) -> list[Path]:
    """The folders where the engine of this config keeps its swap files; nothing else writes there."""
    zero = config.get("zero_optimization", {})
    sections = [zero.get(section) or {} for section in ("offload_optimizer", "offload_param")]
    return sorted({Path(section["nvme_path"]) for section in sections if section.get("device") == "nvme"})


def _fill_nvme(name: str, zero: dict, options: Options, largest_parameter: int, ranks: int) -> None:
    """Fills offload to NVMe: a folder per engine, buffers by the model's size. Refuses what DeepSpeed gets wrong."""
    optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    if zero["stage"] != 3:
        raise UserError(f"--ds_config {name}: device nvme needs ZeRO stage 3, not {zero['stage']}")
    if parameters.get("device") == "nvme":
        if optimizer.get("device") != "nvme":
            raise UserError(
                f"--ds_config {name}: DeepSpeed cannot load a checkpoint with parameters on nvme and the optimizer "
                "elsewhere; set offload_optimizer.device to nvme as well, or offload_param.device to cpu"
            )
        if options.lora:
            raise UserError(
                f"--ds_config {name}: DeepSpeed leaves frozen parameters on nvme out of its checkpoints; with --lora, "
                "set offload_param.device to cpu"
            )
        # DeepSpeed's prefetch from NVMe requests a parameter twice if its next two uses follow one another (the last
        # layer of forward is the first of backward), and then fails. A parameter kept for reuse keeps its buffer.
        for key in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance"):
            if zero.get(key, AUTO) not in (AUTO, 0):
                raise UserError(f"--ds_config {name}: with parameters on nvme, {key} must be 0, not {zero[key]}")
            zero[key] = 0
        if parameters.get("buffer_size", AUTO) == AUTO:
            parameters["buffer_size"] = -(-largest_parameter // ranks)
        if parameters.get("max_in_cpu", AUTO) == AUTO:
            parameters["max_in_cpu"] = 0
    for section in (optimizer, parameters):
        if section.get("device") == "nvme":
            path = options.nvme_path if section.get("nvme_path", AUTO) == AUTO else section["nvme_path"]
            if path is None:
                raise UserError(f"--ds_config {name} offloads to nvme: name a folder on a local drive with --nvme_path")
            # DeepSpeed empties the folder that it is given, even if another process uses it.
            run = hashlib.sha256(str(Path(options.output_dir or "").resolve()).encode()).hexdigest()[:12]
            section["nvme_path"] = str(Path(path).expanduser() / f"dpo_ds-{run}" / "policy")


def reference_config(config: dict) -> dict:
    """The config of the frozen reference's engine: no optimizer; stage 3 where the policy has it, stage 0 otherwise."""
    reference = copy.deepcopy(config)
    for key in ("optimizer", "data_types"):
        reference.pop(key, None)
    zero = reference["zero_optimization"]
    zero.pop("offload_optimizer", None)
    parameters = zero.get("offload_param") or {}
    if parameters.get("device") == "nvme":
        parameters["nvme_path"] = str(Path(parameters["nvme_path"]).with_name("reference"))
    if zero["stage"] != 3:
        reference["zero_optimization"] = {"stage": 0}
    return reference
