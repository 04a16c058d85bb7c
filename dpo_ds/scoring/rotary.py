"""Rotary positions whose frequencies look at the longest sequence: fixed once, for the run's own max_length.

LongRoPE (Phi-3-128k; arXiv 2402.13753) takes other frequencies once a sequence passes the original context, and dynamic
NTK stretches them with its length. In transformers the largest position of the whole row decides, so a short pair's
scores would depend on which pairs share its row. Here every sequence takes what one of max_length tokens takes.
"""

from typing import Any

import torch

FIXED = "default"  # a kind that transformers leaves alone in forward


def fix_frequencies(model: torch.nn.Module, max_length: int) -> None:
    """Gives the model's rotary embeddings the frequencies of a sequence of max_length tokens, for good."""
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


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _compute(module: torch.nn.Module, max_length: int, **layer: str) -> None:
    """Lets transformers compute them: its forward does so for the positions that it is given."""
    device = next(module.buffers()).device
    if device.type == "meta":  # sizes are all that counts there
        return
    last = torch.tensor([[max_length - 1]], device=device)
    module(torch.zeros(1, device=device), last, **layer)
