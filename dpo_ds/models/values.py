"""Whether weights are numbers at all: a NaN or an infinity in one would spoil every log-probability."""

from pathlib import Path

import torch
from safetensors import safe_open

from dpo_ds.errors import UserError
from dpo_ds.files import remembered

AT_ONCE = 2**26  # numbers that are in memory at a time


def require_finite(file: Path, memory: Path) -> None:
    """Raises UserError if a weight in a safetensors file is NaN or infinite.

    The file is read at about 3 GB/s, four times as fast as it is hashed, and what was found is kept in the folder
    `memory`.
    """
    if name := remembered("not_finite", file, memory, lambda: _first_not_finite(file)):
        raise UserError(
            f"{file}: {name} has values that are NaN or infinite, so nothing can be computed with these weights: copy "
            "the file again, or take an earlier checkpoint"
        )


def _first_not_finite(file: Path) -> str:
    """The name of the first tensor with such values; empty if there is none."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():
            described = opened.get_slice(name)
            shape = described.get_shape()
            if not shape:
                whole = opened.get_tensor(name)
                pieces = iter([whole] if whole.is_floating_point() else [])
            else:
                rows = max(1, AT_ONCE * shape[0] // max(1, torch.Size(shape).numel()))
                pieces = (described[start : start + rows] for start in range(0, shape[0], rows))
            if not all(_finite(piece) for piece in pieces):
                return name
    return ""


def _finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point() or not values.numel():
        return True
    least, most = torch.aminmax(values)  # a NaN becomes both; ten times as fast as isfinite
    return bool(torch.isfinite(least) and torch.isfinite(most))
