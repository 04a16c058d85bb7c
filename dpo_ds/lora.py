"""LoRA (arXiv 2106.09685) through peft: which adapters a run trains."""

import torch

from dpo_ds.config import Options

ALL = "all-linear"


def _names(targets: str) -> list[str]:
    return [name.strip() for name in targets.split(",")]


def require_targets(model, targets: str) -> None:
    """Raises ValueError if a name in `targets` is no linear module of the model, or its output head."""
    if targets == ALL:
        return
    kinds = ("Linear", "Conv1D")
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ in kinds}
    for target in _names(targets):
        module = target.rpartition(".")[2]
        if module == "lm_head":
            raise ValueError(
                "--lora_targets: the output head is fused with the loss and takes no adapter: leave it out"
            )
        if module not in linear:
            names = ", ".join(sorted(linear - {"lm_head"}))
            raise ValueError(f"--lora_targets {target}: the model has no such linear module; it has {names}")


def add_lora(model, options: Options):
    """Wraps a causal LM with adapters; its own weights are frozen. The adapters begin as the identity (B = 0)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=ALL if options.lora_targets == ALL else _names(options.lora_targets),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2
    )
    torch.manual_seed(options.seed)  # the same first adapters on every rank, and in every run of this seed
    return get_peft_model(model, config, autocast_adapter_dtype=False)
