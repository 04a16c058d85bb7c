"""Builds the policy's and the reference's engines: the only file that calls deepspeed.initialize.

Under ZeRO-3, models load partitioned, never whole on every rank (transformers does this while an HfDeepSpeedConfig is
alive). Dropout is off: policy and reference must be the same function of the tokens.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dpo_ds.config import Planned
from dpo_ds.engine import gradients
from dpo_ds.engine.engine import Engine
from dpo_ds.engine.memory import clear_swap_folders
from dpo_ds.engine.tiers import reference_config, swap_folders
from dpo_ds.errors import RunStopped
from dpo_ds.models.adapter import Adapter, load_adapter
from dpo_ds.models.lora import LanguageModel, add_lora
from dpo_ds.models.model import torch_dtype
from dpo_ds.models.recompute import recompute
from dpo_ds.ranks import world
from dpo_ds.scoring import attention
from dpo_ds.scoring.rotary import fix_frequencies
from dpo_ds.scoring.scorer import Scorer

FIRST_PARAMETER_ID = 1_000_000  # far above those of a reference, whose engine may exist at the same time


def policy_engine(
    folder: Path, config: dict, options: Planned, kernel: str, total_steps: int, adapter: Adapter | None = None
) -> Engine:
    """The engine to train: all weights, or LoRA adapters on frozen ones, new or from `adapter`. `kernel` is the
    attention kernel."""
    clear_swap_folders(swap_folders(config))
    # These numbers name the swap files. The policy's must be the same after a resume, whether or not a reference
    # engine was built before it.
    deepspeed.zero.Init.param_id = FIRST_PARAMETER_ID
    plain = _load(folder, config, options, kernel)
    model: LanguageModel = _adapted(plain, options, adapter) if options.lora else plain
    recompute(model, options.recomputed_layers)
    model.train()
    per_token, balance = options.ld_alpha is not None, float(options.router_aux_loss_coef) > 0
    scorer = Scorer(model, per_token, options.wpo, balance, fused=options.fuse == "on")
    with gradients.kept(options.gradients, config):
        engine = _initialize(
            model=scorer,
            model_parameters=_parameter_groups(scorer, options.weight_decay),
            config=config,
            lr_scheduler=lambda optimizer: get_scheduler(
                {"constant": "constant_with_warmup"}.get(options.lr_scheduler, options.lr_scheduler),
                optimizer,
                num_warmup_steps=round(options.warmup_ratio * total_steps),
                num_training_steps=total_steps,
            ),
        )
    if config["zero_optimization"]["stage"] == 0:
        if options.precision == "bf16":
            _forget_first_step(engine.basic_optimizer)
        # A single rank has no gradients to average, but DeepSpeed would still flatten them and copy them back.
        engine.enable_backward_allreduce = world.from_environment().size > 1
    return Engine(engine, config)


def _initialize(**arguments):
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables while it builds engines
        engine, *_ = deepspeed.initialize(**arguments)
    return engine


def _forget_first_step(optimizer) -> None:
    """DeepSpeed's bf16 optimizer at stage 0 allocates Adam's state by a step with zero gradients, and counts that step:
    the first real update would have only 0.74 of its size."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # FusedAdam's step count


def reference_engine(
    folder: Path, config: dict, options: Planned, kernel: str, adapter: Adapter | None = None
) -> Engine:
    """The engine of the frozen reference, without an optimizer. `config` is the policy's."""
    config = reference_config(config)
    clear_swap_folders(swap_folders(config))
    plain = _load(folder, config, options, kernel)
    model: LanguageModel = plain if adapter is None else _adapted(plain, options, adapter)
    model.requires_grad_(False)
    scorer = Scorer(model, tokens=options.ld_alpha is not None, fused=options.fuse == "on")
    return Engine(_initialize(model=scorer, config=config), config)


def _adapted(model: PreTrainedModel, options: Planned, adapter: Adapter | None) -> LanguageModel:
    """The model with new LoRA adapters, or with the weights of `adapter`."""
    if adapter is None:
        return add_lora(model, options)
    shape = {"lora_r": adapter.r, "lora_alpha": adapter.alpha, "lora_targets": adapter.targets}
    adapted = add_lora(model, options.replace(**shape))
    load_adapter(adapted, adapter.folder)
    return adapted


def _load(folder: Path, config: dict, options: Planned, kernel: str) -> PreTrainedModel:
    # transformers looks for this object while it loads, and partitions under stage 3. It keeps only a weak reference.
    alive = HfDeepSpeedConfig(config)
    if config["zero_optimization"]["stage"] != 3:
        unset_hf_deepspeed_config()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch_dtype(options.precision),
        attn_implementation=attention.implementation(kernel),
        trust_remote_code=options.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, found = loaded  # transformers declares the model alone
    del alive
    unset_hf_deepspeed_config()
    unfit = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if unfit:  # transformers has filled these with random values
        raise RunStopped(
            f"{folder}: {len(unfit)} tensors that its config.json describes are missing from its weights or have "
            f"another shape, for example {unfit[0]}: take config and weights from the same model"
        )
    fix_frequencies(model, options.max_length)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _parameter_groups(scorer: Scorer, weight_decay: float) -> list[dict]:
    """The trained parameters. With weight decay, biases and norms (one dimension) form a group without it."""
    trained = [p for p in scorer.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trained}]
    # Under ZeRO-3 a parameter is an empty placeholder: its real shape is in ds_shape.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
