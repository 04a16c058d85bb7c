"""Counts the floating-point operations of DPO, from which the share of a GPU's peak (MFU) follows.

The count follows PaLM's report (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). The body's matrix products count
once for every packed token, so a shared prompt counts once; the output head's count for response tokens only; attention
counts the pairs of tokens that see each other. Recomputation in backward does not count.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dpo_ds.config import Options
from dpo_ds.models.lora import is_target
from dpo_ds.models.lora import targets as lora_targets
from dpo_ds.models.model import Model

# FLOP/s of dense bf16 products, from NVIDIA's data sheets, by a word in the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "A40": 150e12}
H100_PCIE = 756e12


def peak_of(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name and "H100" in name:
        return H100_PCIE
    return next((peak for word, peak in PEAKS.items() if word in name), None)


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass: products with the body's weights and with the output head's, attention, adapters."""

    body: float
    head: float
    attention: float
    adapters: float


class Flops:
    """Counts a model's FLOPs on groups of given lengths."""

    def __init__(self, model: Model, options: Options):
        text = model.config.get_text_config()
        skeleton = model.skeleton
        head = skeleton.get_output_embeddings()
        self.head = head.weight.numel()
        adapted = lora_targets(skeleton, options.lora_targets) if options.lora else []
        top_k = getattr(text, "num_experts_per_tok", None) or 1
        self.body = self.adapters = 0
        for name, module in skeleton.named_modules():
            if module is head or isinstance(module, torch.nn.Embedding):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 2:
                    self.body += parameter.numel()
                elif parameter.dim() == 3:  # fused experts: a token goes through top_k of them
                    self.body += top_k * parameter.numel() // len(parameter)
            if is_target(name, adapted):
                self.adapters += options.lora_r * sum(module.weight.shape)
        self.lora = options.lora
        # Backward repeats the forward's products once for the activations' gradients and once for the weights' (LoRA's
        # frozen weights have none). The reference's forward counts if it runs within the step.
        self.backward = 1 if options.lora else 2
        self.reference = options.reference in ("live", "base")
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.attention_width = heads * width
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        kinds = (list(kinds) * text.num_hidden_layers)[: text.num_hidden_layers]
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]

    def step(self, prompts: np.ndarray, answers: np.ndarray, groups: np.ndarray) -> float:
        """FLOPs of a step on packed groups. prompts: tokens of each prompt, [G]; answers: tokens of each answer, [A];
        groups: the prompt of each answer, int [A]."""
        once = self.forward(prompts, answers, groups)
        policy = (1 + self.backward) * (once.body + once.head) + 3 * (once.attention + once.adapters)
        return policy + (once.body + once.head + once.attention if self.reference else 0.0)

    def forward(self, prompts: np.ndarray, answers: np.ndarray, groups: np.ndarray) -> "Forward":
        """FLOPs of a forward pass on packed groups, described as in `step`."""
        prompts, answers = np.asarray(prompts, dtype=np.int64), np.asarray(answers, dtype=np.int64)
        tokens, responses = prompts.sum() + answers.sum(), answers.sum()
        return Forward(
            2.0 * self.body * tokens,
            2.0 * self.head * responses,
            self._attention(prompts, prompts[groups], answers),
            2.0 * self.adapters * tokens,
        )

    def _attention(self, prompts: np.ndarray, own_prompts: np.ndarray, answers: np.ndarray) -> float:
        """FLOPs of a forward: for each visible key, a product of query and key and one of weight and value."""
        return sum(
            4.0
            * self.attention_width
            * (
                _seen(prompts, window).sum(dtype=np.float64)
                + (_seen(own_prompts + answers, window) - _seen(own_prompts, window)).sum(dtype=np.float64)
            )
            for window in self.windows
        )


def _seen(rows: np.ndarray, window: int | None) -> np.ndarray:
    """Number of keys that each of the first `rows` rows of a causal sequence sees, summed over the rows."""
    inside = rows if window is None else np.minimum(rows, window)
    return inside * (inside + 1) / 2 + (rows - inside) * (window or 0)
