"""Writes and loads DeepSpeed's files of a checkpoint, and restores what DeepSpeed's own loading leaves out."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from dpo_ds.engine.shards import TAG, load_pickled, optimizer_state
from dpo_ds.errors import one_line
from dpo_ds.ranks import collectives

FULL = 1 << 20  # bytes: a disk on which a file could not be written, and that has fewer left, is full


class SafeFiles(TorchCheckpointEngine):
    """What DeepSpeed reads and writes its files with, in place of its own, which unpickles whatever it finds.

    A file that cannot be written is remembered: an error would end this rank within DeepSpeed's save, and the others
    would wait for it.
    """

    def __init__(self, plain: TorchCheckpointEngine):
        super().__init__()
        self.zipfile_serialization = plain.zipfile_serialization
        self.failed: OSError | None = None

    def save(self, state_dict: dict, path: str) -> None:
        try:
            super().save(state_dict, path)
        except OSError as error:
            self.failed = error
        except RuntimeError as error:  # torch's own, which does not name a full disk as the cause
            full = shutil.disk_usage(Path(path).parent).free < FULL
            self.failed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(one_line(error))

    def load(self, path: str, map_location: Any = None) -> dict:
        return load_pickled(path, mmap=False, map_location=map_location)


@contextlib.contextmanager
def _safe_files(engine: deepspeed.DeepSpeedEngine) -> Iterator[SafeFiles]:
    """Inside the block, the engine reads and writes its files with SafeFiles."""
    plain = engine.checkpoint_engine
    engine.checkpoint_engine = files = SafeFiles(plain)
    try:
        yield files
    finally:
        engine.checkpoint_engine = plain


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Writes DeepSpeed's files into folder/TAG, by all ranks together.

    Raises OSError, on a rank whose part could not be written. By then all ranks have left DeepSpeed's collectives, and
    the engine is fit to train on.
    """
    with _safe_files(engine) as files:
        try:
            engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except OSError as error:  # while copying swap files, or scripts: what DeepSpeed does after that is done here
            files.failed = error
            if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
                engine.optimizer.checkpoint_event_epilogue()
            collectives.wait_for_all()
    if files.failed is not None:
        raise files.failed


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Restores weights, optimizer and schedule, by all ranks together."""
    if engine.zero_nvme_offload_optimizer():
        _expect_swapped_state(engine.optimizer, folder / TAG, rank)
    with _safe_files(engine):
        engine.load_checkpoint(str(folder), tag=TAG)
    _count_as_before(engine.basic_optimizer)


def _count_as_before(adam) -> None:
    """Repeats the finished steps with empty updates. DeepSpeed's CPUAdam multiplies beta into beta^n step by step, but
    after a resume it computes the power directly, and at half of the steps the last bit differs."""
    if not hasattr(adam, "ds_opt_adam"):
        return
    done = max((state["step"] for state in adam.state.values() if "step" in state), default=0)
    group = adam.param_groups[0]
    lr, betas, *rest = (group[key] for key in ("lr", "betas", "eps", "weight_decay", "bias_correction"))
    for step in range(1, done + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, lr, *betas, *rest, *(torch.empty(0) for _ in range(4)))


def _expect_swapped_state(optimizer, folder: Path, rank: int) -> None:
    """Prepares the optimizer for DeepSpeed's load, which with the optimizer on NVMe only copies swap files back.
    Without this, Adam's moments would not be read from them, its step count and the groups' learning rates would start
    again, and groups too small for a swap file (below 1 MiB) would keep the initial weights."""
    saved = optimizer_state(folder, rank)["optimizer_state_dict"]
    optimizer._set_fp32_optimizer_param_groups()
    optimizer.optimizer.load_state_dict(saved["optimizer_state_dict"])
    optimizer._clear_fp32_optimizer_param_groups()
    for number, (group, weights) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, saved["fp32_flat_groups"], strict=True)
    ):
        if not optimizer._swappable_optimizer_subgroup(number):
            group.data.copy_(weights.data)
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            # Never written, so it takes no memory. The swapper takes a tensor of the group's size, then reads its file.
            state = torch.empty(optimizer.fp16_partitioned_groups_flat_numel[number], dtype=group.dtype)
            optimizer.optimizer.state[group][key] = state
        optimizer.optimizer_swapper._get_param_swap_info(group).release_memory()
