"""Checks a user's DeepSpeed file: each mistake is reported in one line, before any weights load.

DeepSpeed's own checks are used wherever they run without an engine. The tables here cover what DeepSpeed would notice
only while it builds an engine or trains, and what dpo_ds decides itself.
"""

import contextlib
import difflib
import inspect
import io
import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from dpo_ds.errors import UserError, one_line
from dpo_ds.secrets import SECRET_KEYS

AUTO = "auto"

# The keys allowed at the top of a config. DeepSpeed ignores unknown ones there; in zero_optimization it checks them.
KNOWN = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 fp16 "
    "data_types optimizer scheduler zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer aio "
    "communication_data_type prescale_gradients gradient_predivide_factor steps_per_print wall_clock_breakdown "
    "memory_breakdown dump_state disable_allgather disable_python_gc dataloader_drop_last log_level "
    "activation_checkpointing comms_logger flops_profiler timers tensorboard wandb csv_monitor comet checkpoint "
    "compile".split()
)

SECTIONS = (
    "bf16", "fp16", "data_types", "optimizer", "optimizer.params", "scheduler", "zero_optimization", "aio",
    "activation_checkpointing", "comms_logger", "flops_profiler", "timers", "timers.throughput", "tensorboard", "wandb",
    "csv_monitor", "comet", "checkpoint", "checkpoint.parallel_write", "compile",
)  # fmt: skip

# Keys whose default in DeepSpeed does not show their type. Each may also be null.
TYPES = {
    "steps_per_print": int,
    "communication_data_type": str,
    "log_level": str,
    "activation_checkpointing.number_checkpoints": int,
    "flops_profiler.output_file": str,
    "checkpoint.load_universal": bool,
    "checkpoint.use_node_local_storage": bool,
    "data_types.grad_accum_dtype": str,
    "data_types.param_dtype": str,
    "data_types.buffer_dtype": str,
}

TYPE_WORDS = {
    bool: "true or false, without quotes",
    int: "a whole number, without quotes, point or exponent",
    float: "a number, without quotes",
    str: "a text in quotes",
}

# DeepSpeed divides by these values, or loops for ever if they are 0.
ABOVE_ZERO = (
    "steps_per_print", "gradient_predivide_factor", "zero_optimization.sub_group_size",
    "zero_optimization.allgather_bucket_size", "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_optimizer.buffer_count", "aio.block_size", "aio.queue_depth", "aio.intra_op_parallelism",
)  # fmt: skip

# zero_optimization's switches whose kernels exist for CUDA only.
QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
NEED_CUDA = (*QUANTISED, "offload_optimizer.super_offload")


def check_file(name: str, config: dict) -> None:
    """Raises UserError for what is wrong with any options. `config` is the content of the file, unchanged."""
    for key, value in leaves(config):
        if SECRET_KEYS.search(key) and value is not None:
            why = "DeepSpeed writes its config into each checkpoint; set COMET_API_KEY or the like in the environment"
            raise _wrong(name, key, value, why)
    for key in SECTIONS:
        section = at(config, key, {})
        if not isinstance(section, dict):
            raise _wrong(name, key, section, 'it must be an object, as in {"key": value}; correct it or remove it')
    _refuse_unknown_keys(name, config)
    _refuse_broken(name, config)
    _check_by_models(name, config)
    _check_types(name, config)
    for key in ABOVE_ZERO:
        value = at(config, key)
        if value not in (None, AUTO) and not value > 0:
            raise _wrong(name, key, value, "it must be above 0")
    eps, betas = at(config, "optimizer.params.eps", AUTO), at(config, "optimizer.params.betas", AUTO)
    if eps != AUTO and not (_is(eps, float) and eps > 0):
        raise _wrong(name, "optimizer.params.eps", eps, "it must be a number above 0, as in 1e-8")
    if betas != AUTO and not (
        isinstance(betas, list) and len(betas) == 2 and all(_is(beta, float) and 0 <= beta < 1 for beta in betas)
    ):
        raise _wrong(name, "optimizer.params.betas", betas, "write two numbers from 0 to below 1, as in [0.9, 0.999]")


def check_filled(name: str, config: dict, ranks: int, on_gpu: bool) -> None:
    """Raises UserError for what DeepSpeed would refuse, or fail on, while it builds engines with this config."""
    _check_optimizer(name, config, on_gpu)
    _check_dtypes(name, config)
    _check_monitors(name, config)
    zero = config["zero_optimization"]
    if zero["stage"] == 0 and "offload_optimizer" in zero:
        raise _wrong(name, "zero_optimization.stage", 0, "offload_optimizer needs stage 1, 2 or 3")
    for key in () if on_gpu else NEED_CUDA:
        if at(zero, key):
            raise _wrong(
                name, f"zero_optimization.{key}", True, "it needs a CUDA GPU, and this machine has none; remove it"
            )
    scatters = zero["stage"] >= 2 and zero.get("reduce_scatter", True)
    if scatters and (config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1) != 1):
        raise UserError(
            f"--ds_config {name}: DeepSpeed does not support prescale_gradients or gradient_predivide_factor with "
            "zero_optimization.reduce_scatter; remove them"
        )
    if zero["stage"] == 3 and zero.get("zero_quantized_gradients") and not scatters:
        raise _wrong(name, "zero_optimization.reduce_scatter", False, "zero_quantized_gradients needs it; remove it")
    group = min(zero.get("zero_hpz_partition_size", 1), ranks)
    if group > 1 and ranks % group:
        raise _wrong(name, "zero_optimization.zero_hpz_partition_size", group, f"it must divide the {ranks} ranks")
    _check_by_deepspeed(name, config)


def _check_by_deepspeed(name: str, config: dict) -> None:
    """Lets DeepSpeed parse the config: first the sections whose errors do not name their place, then the whole."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.utils.logging import get_log_level_from_string

    _judged(name, "aio", lambda: get_aio_config(config))
    _judged(name, "checkpoint", lambda: get_checkpoint_config(config))
    if config.get("log_level") is not None:
        _judged(name, "log_level", lambda: get_log_level_from_string(config["log_level"]))
    # Without train_batch_size, DeepSpeed computes it from its own number of ranks; a plan may be for another number.
    alone = {key: value for key, value in config.items() if key != "train_batch_size"}
    _judged(name, "", lambda: DeepSpeedConfig(alone))


def at(config: dict, path: str, default=None):
    """The value at a path such as "zero_optimization.offload_param.device"; `default` if there is none."""
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def leaves(config, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, config


def shown(value) -> str:
    """A value as JSON, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wrong(name: str, key: str, value, why: str) -> UserError:
    if SECRET_KEYS.search(key):
        return UserError(f"--ds_config {name}: {key} cannot be used: {why}")
    return UserError(f"--ds_config {name}: {key} is {shown(value)}: {why}")


def _did_you_mean(key: str, known) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _refuse_unknown_keys(name: str, config: dict) -> None:
    """Refuses keys that DeepSpeed has removed, renamed or never had. It would ignore some of them."""
    from deepspeed.runtime.config import _reject_removed_config_keys
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _judged(name, "", lambda: _reject_removed_config_keys(config), "remove it")
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        if at(config, f"zero_optimization.{key}") is None:
            continue
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):  # the plan reads only the new name
            raise UserError(
                f"--ds_config {name}: zero_optimization.{key} is DeepSpeed's former name of {extra['new_param']}: "
                "write that instead"
            )
        if field.alias not in (None, key):  # DeepSpeed takes it, but the plan and transformers do not look for it
            raise UserError(f"--ds_config {name}: write {field.alias} instead of zero_optimization.{key}")
    if unknown := sorted(set(config) - KNOWN):
        raise UserError(
            f"--ds_config {name} has a key that neither DeepSpeed nor dpo_ds uses: {unknown[0]}"
            f"{_did_you_mean(unknown[0], KNOWN)}; remove it"
        )


def _refuse_broken(name: str, config: dict) -> None:
    """Refuses what DeepSpeed 0.19 gets wrong, and what dpo_ds does not support or decides itself."""
    if at(config, "fp16.enabled") is True:
        raise UserError(f"--ds_config {name} asks for fp16, which dpo_ds does not support: use bf16 or fp32")
    if at(config, "bf16.bf16_master_weights_and_grads"):
        raise UserError(
            f"--ds_config {name}: bf16_master_weights_and_grads loses DPO's small updates to rounding; remove it"
        )
    if at(config, "bf16.check_grad_overflow") is False:
        raise UserError(
            f"--ds_config {name}: without bf16.check_grad_overflow a gradient that is not finite would be applied; "
            "remove it"
        )
    ratio = at(config, "zero_optimization.offload_optimizer.ratio")
    if _is(ratio, float) and ratio < 1:
        raise UserError(
            f"--ds_config {name}: with offload_optimizer.ratio below 1, DeepSpeed does not apply the learning rate "
            "schedule to all weights; remove it"
        )
    if at(config, "zero_optimization.legacy_stage1"):
        raise UserError(f"--ds_config {name}: DeepSpeed no longer has zero_optimization.legacy_stage1; remove it")
    if at(config, "zero_optimization.compute_grad_norm") is False:
        raise UserError(
            f"--ds_config {name}: zero_optimization.compute_grad_norm is false, but dpo_ds clips by the gradient norm "
            "and reports it; remove it"
        )
    zenflow = at(config, "zero_optimization.zenflow")
    # With any values, each micro-batch's gradient is applied at once to the columns that ZenFlow selects. On a CPU,
    # stage 2 gave NaN in its second step, and stage 3 a traceback.
    if zenflow is not None:
        why = "it updates weights after each micro-batch, but a step of dpo_ds is one update by all pairs; remove it"
        raise _wrong(name, "zero_optimization.zenflow", zenflow, why)
    writer = at(config, "checkpoint.writer")
    # With any writer, DeepSpeed loads by torch.load with weights_only, which refuses the objects in ZeRO's files. A
    # writer also needs variables of DeepSpeed's launcher, and below stage 3 several ranks would write the same file.
    if writer is not None:
        why = "with a writer, DeepSpeed 0.19 cannot load ZeRO's checkpoints again, so no run could resume; remove it"
        raise _wrong(name, "checkpoint.writer", writer, why)
    optimizer = at(config, "optimizer.type", "AdamW")
    if optimizer not in ("AdamW", "Adam"):
        raise UserError(f"--ds_config {name}: optimizer.type must be AdamW, not {shown(optimizer)}")
    if any(value != AUTO for _, value in leaves(at(config, "scheduler.params", {}))):
        raise UserError(
            f"--ds_config {name} has a scheduler: remove it; --lr_scheduler and --warmup_ratio set the learning rate"
        )


DEEPSPEED_REFUSES = (ValueError, AssertionError, TypeError, AttributeError, KeyError, RuntimeError)


def _judged(name: str, section: str, call: Callable, remedy: str = "correct it or remove it"):
    """Calls code of DeepSpeed or torch. If that code raises, its reason becomes a one-line UserError.

    `call` must run nothing but their code: an error of ours would be reported as the user's.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        return call()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (section, *first["loc"]))).strip(".")
        if first["type"] == "extra_forbidden":
            raise _wrong(name, key, first["input"], "DeepSpeed has no such key; remove it") from None
        why = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        why = "it must be an object" if first["type"] == "model_type" else why.replace("Input ", "it ", 1)
        if not first["loc"]:  # a rule about several keys
            raise UserError(f"--ds_config {name}: {key}: {why}; correct it") from None
        raise _wrong(name, key, first["input"], f"{why}; {remedy}") from None
    except (DeepSpeedConfigError, *DEEPSPEED_REFUSES) as error:
        where = f"{section}: " if section else ""
        raise UserError(f"--ds_config {name}: {where}{one_line(error).rstrip('. ')}; {remedy}") from None


def _check_by_models(name: str, config: dict) -> None:
    """Checks keys, types and ranges of the sections for which DeepSpeed has pydantic models."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
    }
    for section, model in models.items():
        given = at(config, section, {})
        found = _judged(name, section, lambda model=model, given=given: model(**given))
        _refuse_conversions(name, section, given, found)


def _refuse_conversions(name: str, section: str, given: dict, found) -> None:
    """Refuses values that DeepSpeed's models convert ("3" to 3, true to 1), because dpo_ds and transformers do not."""
    from pydantic import BaseModel

    for field, info in type(found).model_fields.items():
        value, meant = given.get(info.alias or field, AUTO), getattr(found, field)
        key = f"{section}.{info.alias or field}"
        if isinstance(meant, BaseModel) and isinstance(value, dict):
            _refuse_conversions(name, key, value, meant)
        elif value != AUTO and isinstance(value, (str, bool)) and isinstance(meant, (int, float)):
            if type(value) is not type(meant):
                raise _wrong(name, key, value, f"it must be {TYPE_WORDS[bool if isinstance(meant, bool) else float]}")


def _check_types(name: str, config: dict) -> None:
    """Checks the types of the keys for which DeepSpeed has no pydantic models, by the types of its defaults."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    empty = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    defaults = {
        "": {key: getattr(empty, key, None) for key in KNOWN},
        "aio.": AIO_DEFAULT_DICT,
        "activation_checkpointing.": vars(empty.activation_checkpointing_config),
        "flops_profiler.": vars(empty.flops_profiler_config),
        "checkpoint.": get_checkpoint_config({"checkpoint": {}}),
    }
    types = {
        section + key: type(value)
        for section, keys in defaults.items()
        for key, value in keys.items()
        if type(value) in TYPE_WORDS
    }
    for key, kind in {**types, **TYPES}.items():
        value = at(config, key, AUTO)
        if value != AUTO and not _is(value, kind) and not (value is None and key in TYPES):
            raise _wrong(name, key, value, f"it must be {TYPE_WORDS[kind]}")


def _is(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind


def _check_optimizer(name: str, config: dict, on_gpu: bool) -> None:
    """Checks the optimizer's parameters as DeepSpeed's engine passes them to its Adam (_configure_basic_optimizer)."""
    import torch
    from deepspeed.runtime.config import ADAM_W_MODE, ADAM_W_MODE_DEFAULT, TORCH_ADAM_PARAM
    from deepspeed.runtime.engine import DeepSpeedEngine

    params, zero = dict(config["optimizer"]["params"]), config["zero_optimization"]
    for key in (TORCH_ADAM_PARAM, ADAM_W_MODE, "fp32_optimizer_states", "foreach", "fused"):
        if key in params and not _is(params[key], bool):
            raise _wrong(name, f"optimizer.params.{key}", params[key], f"it must be {TYPE_WORDS[bool]}")
    decoupled = params.pop(ADAM_W_MODE, ADAM_W_MODE_DEFAULT) or config["optimizer"]["type"] == "AdamW"
    engine = SimpleNamespace(  # the attributes of the engine that the method below reads
        zero_use_cpu_optimizer=lambda: "offload_optimizer" in zero,
        bf16_optimizer_states=lambda: False,
        zenflow=False,
    )
    adam, added = DeepSpeedEngine.get_optimizer_configuration(engine, params, decoupled)  # pops DeepSpeed's own keys
    takes = dict(list(inspect.signature(adam).parameters.items())[1:])  # the first parameter is the weights
    for key, value in params.items():
        if key not in takes or key in added:
            known = sorted(set(takes) - set(added))
            why = f"{adam.__name__} takes no such parameter{_did_you_mean(key, known)}; remove it"
            raise _wrong(name, f"optimizer.params.{key}", value, why)
        if isinstance(takes[key].default, bool) and not _is(value, bool):
            raise _wrong(name, f"optimizer.params.{key}", value, f"it must be {TYPE_WORDS[bool]}")
        if isinstance(takes[key].default, float) and not _is(value, float):
            raise _wrong(name, f"optimizer.params.{key}", value, f"it must be {TYPE_WORDS[float]}")
    if adam.__module__.startswith("deepspeed"):
        if params.get("amsgrad"):
            raise _wrong(name, "optimizer.params.amsgrad", True, f"{adam.__name__} does not support AMSGrad; remove it")
        return  # trying it would compile it
    if on_gpu:
        params.pop("capturable", None)  # for CUDA only: the trial below runs on the CPU
    on = [key for key, value in params.items() if value is True]

    def trial() -> None:
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.zeros(1)
        adam([weight], **params, **added).step()

    _judged(name, f"optimizer.params{' with ' * bool(on)}{', '.join(on)}", trial)


def _check_dtypes(name: str, config: dict) -> None:
    """Checks data_types: the names of dtypes, and that they agree with the precision."""
    import torch
    from deepspeed.runtime.config import DtypeEnum

    section = config.get("data_types", {})
    model = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        if section.get(key) is None:
            continue
        why = "write fp32 or bf16"
        try:
            dtype = DtypeEnum(section[key]).value
        except ValueError:
            raise _wrong(name, f"data_types.{key}", section[key], why) from None
        if not dtype.is_floating_point:
            raise _wrong(name, f"data_types.{key}", section[key], why)
        fixed = key == "param_dtype" or (key == "grad_accum_dtype" and config["zero_optimization"]["stage"] == 0)
        if fixed and dtype != model:
            at_stage = " at ZeRO stage 0" if key == "grad_accum_dtype" else ""
            why = f"the run computes in {str(model).removeprefix('torch.')}, and{at_stage} this must agree; remove it"
            raise _wrong(name, f"data_types.{key}", section[key], why)


def _check_monitors(name: str, config: dict) -> None:
    """Checks that the package of each monitor that is on is installed."""
    from deepspeed.monitor import utils

    packages = {
        "tensorboard": (utils.check_tb_availability, "tensorboard"),
        "wandb": (utils.check_wandb_availability, "wandb"),
        "comet": (utils.check_comet_availability, "'comet_ml>=3.41.0'"),
    }
    for section, (check, package) in packages.items():
        if at(config, f"{section}.enabled"):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    check()
            except ImportError:
                why = f"its package cannot be imported; pip install {package}, or remove {section}"
                raise _wrong(name, f"{section}.enabled", True, why) from None
