"""Fixes the frequencies of rotary positions that depend on the sequence's length: they become those of max_length.

LongRoPE (Phi-3-128k; arXiv 2402.13753) uses other frequencies once a sequence is longer than the original context, and
dynamic NTK changes them with the length. In transformers the largest position of the whole row decides, so a short
pair's scores would depend on the pairs in its row. Here every sequence gets the frequencies of max_length tokens.
"""

from typing import Any

import torch

FIXED = "default"  # a kind whose frequencies transformers does not change in forward


def fix_frequencies(model: torch.nn.Module, max_length: int) -> None:
    """Gives the model's rotary embeddings the frequencies of a sequence of max_length tokens, permanently."""
    module: Any  # its attributes are no tensors here
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _changes(kinds):
            _compute(module, max_length)
            module.rope_type = FIXED
        elif isinstance(kinds, dict):  # a kind for each type of layer
            for layer_type in [name for name, kind in kinds.items() if _changes(kind)]:
                _compute(module, max_length, layer_type=layer_type)
                kinds[layer_type] = FIXED


def depends_on_length(config: Any) -> bool:
    """Whether a model of this config (transformers') has frequencies that depend on max_length."""
    return _names_one(config.to_dict())


def _names_one(value: Any) -> bool:
    if isinstance(value, dict):
        kinds = [value.get("rope_type"), value.get("type")]
        return any(isinstance(kind, str) and _changes(kind) for kind in kinds) or any(map(_names_one, value.values()))
    return False


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _compute(module: torch.nn.Module, max_length: int, **layer: str) -> None:
    """Calls the module's forward with the last position, for which transformers then computes the frequencies."""
    device = next(module.buffers()).device
    if device.type == "meta":  # only sizes matter there
        return
    last = torch.tensor([[max_length - 1]], device=device)
    module(torch.zeros(1, device=device), last, **layer)
