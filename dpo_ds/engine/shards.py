"""Reads single tensors from a DeepSpeed checkpoint, without starting ranks and without loading the whole.

Files are memory-mapped, so a tensor takes only its own bytes. Stages 0 to 2 keep the whole model in one file. Stage 3
keeps a slice of every parameter in each rank's files: ceil(n / ranks) elements, padded on the last rank.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dpo_ds.errors import UserError, one_line

TAG = "deepspeed"  # the folder of DeepSpeed's files within a checkpoint


class CheckpointWeights:
    """Tensors by their name in the engine's module. At stage 3, trained ones are the optimizer's fp32 masters."""

    def __init__(self, folder: Path, stage: int, ranks: int):
        self.stage, self.ranks = stage, ranks
        if stage < 3:
            self.module = load_pickled(folder / "mp_rank_00_model_states.pt", mmap=True)["module"]
            return
        models = [
            load_pickled(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", mmap=True) for rank in range(ranks)
        ]
        self.module = {n: models[0]["module"][n] for n in models[0]["buffer_names"] if n in models[0]["module"]}
        self.frozen = [model["frozen_param_fragments"] or {} for model in models]
        self.shapes = dict(models[0]["frozen_param_shapes"] or {})
        self.groups, self.offsets, start = [], {}, 0
        for rank in range(ranks):
            groups = optimizer_state(folder, rank)["optimizer_state_dict"]["fp32_flat_groups"]
            swapped = folder / "offloaded_tensors" / f"rank{rank:02d}"
            self.groups.append(
                [
                    group if len(group) else _swap_file(swapped / f"{group.ds_id}.tensor.swp", shapes, ranks)
                    for group, shapes in zip(groups, models[0]["param_shapes"], strict=True)
                ]
            )
        for group in models[0]["param_shapes"]:
            for name, shape in group.items():
                self.shapes[name], self.offsets[name] = shape, start
                start += math.ceil(shape.numel() / ranks)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.module:
            return self.module[name]
        shape = self.shapes[name]
        if name in self.offsets:
            length = math.ceil(shape.numel() / self.ranks)
            slices = [_slice(groups, self.offsets[name], length) for groups in self.groups]
        else:
            slices = [fragments[name] for fragments in self.frozen]
        return torch.cat(slices)[: shape.numel()].view(shape)


def _swap_file(path: Path, shapes: dict[str, torch.Size], ranks: int) -> torch.Tensor:
    """A group of the optimizer from its swap file, which is padded at the end."""
    length = sum(math.ceil(shape.numel() / ranks) for shape in shapes.values())
    return torch.from_file(str(path), size=length, dtype=torch.float32)


def optimizer_state(folder: Path, rank: int) -> dict:
    """A stage 3 rank's optimizer file, memory-mapped."""
    prefix = "" if (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").is_file() else "bf16_"
    return load_pickled(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", mmap=True)


def _slice(groups: list[torch.Tensor], start: int, length: int) -> torch.Tensor:
    """Elements start … start + length of the concatenated groups."""
    parts = []
    for group in groups:
        if start < len(group) and length > 0:
            parts.append(group[start : start + length])
            length -= len(parts[-1])
        start = max(0, start - len(group))
    return torch.cat(parts)


def load_pickled(path: Path | str, mmap: bool, map_location: Any = "cpu") -> dict:
    """Loads one of DeepSpeed's files. Only tensors, plain values and the three types below are unpickled.

    Raises UserError if the file is damaged, or holds anything else, such as code that would run.
    """
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): take another checkpoint") from None
