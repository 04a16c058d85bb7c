"""Picks a DeepSpeed config (a tier of ds_configs/, or the user's own file) and fills in what it leaves "auto".

A filled config is what deepspeed.initialize takes: no "auto" is left, batch sizes are ours (a step is a set of pairs,
see data/steps.py), and nothing in it contradicts the options.
"""

import copy
import json
from pathlib import Path

from dpo_ds.config import Options
from dpo_ds.models import Model
from dpo_ds.resources import tier_files

AUTO = "auto"
# DeepSpeed never sees a step's pairs: dpo_ds sets the boundaries itself.
BATCH_SIZES_ARE_OURS = (
    ': remove it or make it "auto"; a step is --global_batch_pairs pairs, and --micro_batch_tokens says how much of it '
    "a GPU takes at a time"
)


def choose_tier(options: Options, model: Model) -> str:
    """The tier or file that the run uses: --ds_config, or by the model's class."""
    if options.ds_config != AUTO:
        return options.ds_config
    if options.lora and model.tier.startswith("zero3"):
        return "zero3_lora_large"
    return model.tier


def load_tier(name: str) -> dict:
    """The JSON of a tier or file as it stands. Raises ValueError if there is none of that name, or it is not JSON."""
    tiers = tier_files()
    path = tiers.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ValueError(f"--ds_config {name} is neither a file nor a tier; the tiers are {', '.join(sorted(tiers))}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--ds_config {path} must hold one JSON object, as DeepSpeed's config does")
    return config


def fill_tier(name: str, options: Options, *, learning_rate: float, hidden_size: int, ranks: int, on_gpu: bool) -> dict:
    """The config for deepspeed.initialize: every "auto" filled, batch sizes ours.

    `options.precision` must be decided (not auto). Raises ValueError where the file contradicts an option or asks for
    what DeepSpeed is known to get wrong.
    """
    config = copy.deepcopy(load_tier(name))
    _refuse_broken(name, config)

    def settle(section: dict, key: str, value, flag: str | None = None) -> None:
        """Fills an "auto" or missing key, and refuses another value than the option's (or, without one, than ours)."""
        if section.get(key, AUTO) not in (AUTO, value):
            remedy = f", but {flag} says {value}: make them agree" if flag else BATCH_SIZES_ARE_OURS
            raise ValueError(f"--ds_config {name} sets {key} to {section[key]}{remedy}")
        section[key] = value

    settle(config, "train_micro_batch_size_per_gpu", 1)
    settle(config, "gradient_accumulation_steps", 1)
    settle(config, "train_batch_size", ranks)
    settle(config, "gradient_clipping", options.max_grad_norm, "--max_grad_norm")
    settle(config.setdefault("bf16", {}), "enabled", options.precision == "bf16", f"--precision {options.precision}")

    optimizer = config.setdefault("optimizer", {"type": "AdamW"})
    params = optimizer.setdefault("params", {})
    settle(params, "lr", learning_rate, "--learning_rate")
    settle(params, "weight_decay", options.weight_decay, "--weight_decay")
    for key, default in (("betas", [0.9, 0.999]), ("eps", 1e-8)):
        if params.get(key, AUTO) == AUTO:
            params[key] = default

    zero = config.setdefault("zero_optimization", {"stage": 0})
    zero.setdefault("stage", 0)
    _fill_buckets(zero, hidden_size)
    if zero["stage"] == 3:
        # An invalidated trace costs all prefetching: whoever runs into one should read of it.
        zero.setdefault("log_trace_cache_warnings", True)
    if not on_gpu and "offload_optimizer" not in zero:
        params.setdefault("torch_adam", True)  # torch's own AdamW: FusedAdam would have to be compiled first
    left = [path for path, value in _leaves(config) if value == AUTO]
    if left:
        raise ValueError(f'--ds_config {name}: no rule fills "auto" for {left[0]}; give it a value')
    _require_deepspeeds(name, zero)
    return config


def _require_deepspeeds(name: str, zero: dict) -> None:
    """Raises ValueError for what DeepSpeed would refuse in zero_optimization, with its own reason."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ValueError(f"--ds_config {name}: {key} is {first['input']}: {first['msg']}") from None


def _fill_buckets(zero: dict, hidden_size: int) -> None:
    """Bucket sizes by transformers' rules (integrations/deepspeed.py): a layer's square matrix, 0.9 of it, ten rows."""
    rules = {
        "reduce_bucket_size": hidden_size**2,
        "allgather_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": int(1e9),
        "stage3_max_reuse_distance": int(1e9),
        "stage3_gather_16bit_weights_on_model_save": False,
        "sub_group_size": int(1e9),
    }
    for key, value in rules.items():
        if zero.get(key) == AUTO:
            zero[key] = value


def _leaves(config, path: str = ""):
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, config


def _refuse_broken(name: str, config: dict) -> None:
    """What DeepSpeed 0.19 gets wrong, no longer knows, or what dpo_ds decides itself."""
    zero = config.get("zero_optimization", {})
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError(f"--ds_config {name} asks for fp16, which DPO runs here do not support: use bf16 or fp32")
    config.pop("fp16", None)  # transformers-style files carry it as "auto" or off
    if config.get("bf16", {}).get("bf16_master_weights_and_grads"):
        raise ValueError(
            f"--ds_config {name}: bf16_master_weights_and_grads loses DPO's small updates to rounding; remove it"
        )
    if (zero.get("offload_optimizer") or {}).get("ratio", 1.0) < 1.0:
        raise ValueError(
            f"--ds_config {name}: offload_optimizer.ratio below 1 does not follow the learning rate schedule in "
            "DeepSpeed; remove it"
        )
    if config.get("optimizer", {}).get("type", "AdamW") not in ("AdamW", "Adam"):
        raise ValueError(f"--ds_config {name}: the optimizer must be AdamW, not {config['optimizer']['type']}")
    scheduler = config.pop("scheduler", None)
    if scheduler and any(value != AUTO for _, value in _leaves(scheduler.get("params", {}))):
        raise ValueError(
            f"--ds_config {name} has a scheduler: remove it; --lr_scheduler and --warmup_ratio set the learning rate"
        )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "none":
            zero.pop(section)


def reference_config(config: dict) -> dict:
    """The config of the frozen reference's engine: no optimizer; stage 3 where the policy has it, stage 0 otherwise."""
    reference = copy.deepcopy(config)
    for key in ("optimizer", "data_types"):
        reference.pop(key, None)
    zero = reference["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        reference["zero_optimization"] = {"stage": 0}
    return reference
