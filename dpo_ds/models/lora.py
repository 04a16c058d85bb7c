"""LoRA (arXiv 2106.09685) with peft: which modules get adapters."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dpo_ds.config import Options
from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LanguageModel: TypeAlias = "PreTrainedModel | PeftModel"  # without adapters or with them

ALL = "all-linear"
HEAD = "lm_head"


def linear_modules(model: torch.nn.Module) -> set[str]:
    """Names (their last part) of the model's linear modules, without the output head, like peft's all-linear."""
    kinds = ("Linear", "Conv1D")  # GPT-2 has the latter
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ in kinds}
    return names - {HEAD}


def targets(model: "PreTrainedModel", wanted: str) -> list[str]:
    """The names of the modules that get adapters. Fused experts are parameters, not modules, and get none.

    Raises UserError if a wanted name is no linear module of the model, or an output head that is tied to the embedding.
    """
    linear = linear_modules(model)
    if wanted == ALL:
        return sorted(linear)
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        module = name.rpartition(".")[2]
        if module == HEAD and model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                f"--lora_targets {name}: this model's output head shares its weight with the embedding, so it cannot "
                "have an adapter of its own: leave it out"
            )
        if module not in linear | {HEAD}:
            raise UserError(
                f"--lora_targets {name}: the model has no such linear module; it has {', '.join(sorted(linear))}"
            )
    return names


def is_target(name: str, names: list[str]) -> bool:
    """Whether the module at this path gets an adapter, by peft's rule: a target is the whole path or its end."""
    return any(name == target or name.endswith(f".{target}") for target in names)


def plain_model(model: LanguageModel) -> "PreTrainedModel":
    """The transformers model itself: what peft's wrapper holds, where there is one."""
    found: Any = model
    return found.get_base_model() if hasattr(found, "get_base_model") else found


def add_lora(model: "PreTrainedModel", options: Options) -> "PeftModel":
    """Wraps a causal LM with adapters; its own weights are frozen. At the start, the adapters change nothing (B = 0).

    Raises UserError as `targets` does.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # peft only divides it by r
        lora_dropout=options.lora_dropout,
        target_modules=targets(model, options.lora_targets),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2
    )
    torch.manual_seed(options.seed)  # the same first adapters on every rank, and in every run of this seed
    return get_peft_model(model, config, autocast_adapter_dtype=False)
