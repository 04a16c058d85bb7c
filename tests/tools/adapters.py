"""LoRA adapters as peft saves them after fine-tuning, made by code."""

from pathlib import Path

import oracle
import torch
from peft import LoraConfig, get_peft_model


def make(base: Path, folder: Path, seed: int = 0, **config) -> Path:
    """Saves an adapter of the model in `base`, whose B is not 0."""
    wanted = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    model = get_peft_model(oracle.load(base), LoraConfig(**wanted))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder
