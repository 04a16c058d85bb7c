"""Whether a model's weights are those that its config describes, known from the heads of its safetensors files.

transformers fills what is missing with random values, and leaves out what it has no place for.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dpo_ds.errors import UserError, one_line
from dpo_ds.models.model import Model

# Types that a trained weight has. Others are of quantised weights, which cannot be trained as they are.
TRAINED = {"F64", "F32", "F16", "BF16"}


def require_fit(model: Model, files: list[Path]) -> None:
    """Raises UserError if tensors are missing or quantised, have another shape, or are of layers that the config does
    not have. Reads no weights."""
    folder = files[0].parent
    tensors = _described(files)
    found = _loaded_without_content(model, tensors, folder)
    plain = model.skeleton.state_dict()
    if unfit := sorted(found["missing_keys"]):
        raise UserError(
            f"{folder}: {len(unfit)} of {len(plain)} tensors that its config.json describes are missing from its "
            f"weights, the first of them {unfit[0]}: take config and weights from the same model"
        )
    if other := sorted(found["mismatched_keys"]):
        name, there, wanted = other[0]
        raise UserError(
            f"{folder}: {name} has the shape {list(there)}, but {list(wanted)} by its config.json ({len(other)} such "
            "tensors): take config and weights from the same model"
        )
    if more := sorted(name for name in found["unexpected_keys"] if _of_a_further_layer(name, plain)):
        raise UserError(
            f"{folder}: its weights have {len(more)} tensors of layers that its config.json does not describe, the "
            f"first of them {more[0]}: take config and weights from the same model"
        )


def _described(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors as the files' heads describe them: names and shapes, without content."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                described = opened.get_slice(name)
                if "weight" in name and (dtype := described.get_dtype()) not in TRAINED:
                    raise UserError(
                        f"{file}: {name} is of type {dtype}, so the weights are quantised, and those cannot be "
                        "trained: take the model that they were made of"
                    )
                tensors[name] = torch.empty(described.get_shape(), dtype=torch.float32, device="meta")
    return tensors


def _loaded_without_content(model: Model, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """What transformers reports of loading the tensors. Its own rules apply: prefixes, fused experts, tied weights."""
    architecture: Any = type(model.skeleton)
    try:
        _, found = architecture.from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:  # tensors that transformers cannot fuse, such as experts of which one is missing
        raise UserError(
            f"{folder}: its weights are not those that its config.json describes ({one_line(error)}): take config and "
            "weights from the same model"
        ) from None
    return found


def _of_a_further_layer(name: str, plain: dict[str, Any]) -> bool:
    """Whether the model has the same tensor in its first layer: then this one is of a layer beyond its last."""
    return re.sub(r"\.\d+\.", ".0.", name, count=1) in plain
