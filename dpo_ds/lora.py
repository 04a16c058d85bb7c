"""LoRA (arXiv 2106.09685) through peft: which adapters a run trains."""

import torch

from dpo_ds.config import Options


def add_lora(model, options: Options):
    """Wraps a causal LM with adapters; its own weights are frozen. The adapters begin as the identity (B = 0)."""
    from peft import LoraConfig, get_peft_model

    targets = options.lora_targets
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2
    )
    torch.manual_seed(options.seed)  # the same first adapters on every rank, and in every run of this seed
    return get_peft_model(model, config, autocast_adapter_dtype=False)
