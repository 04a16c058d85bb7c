"""Writes and loads DeepSpeed's files of a checkpoint, and restores what DeepSpeed's own loading leaves out."""

from pathlib import Path

import deepspeed
import torch

from dpo_ds.engine.shards import TAG, optimizer_state


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Writes DeepSpeed's files into folder/TAG, by all ranks together."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Restores weights, optimizer and schedule, by all ranks together."""
    if engine.zero_nvme_offload_optimizer():
        _expect_swapped_state(engine.optimizer, folder / TAG, rank)
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
