"""Moves a reference's weights towards the policy's: ref <- alpha * policy + (1 - alpha) * ref.

This is TR-DPO (arXiv 2404.09656).

Each rank mixes the numbers that it holds: under ZeRO-3 its own partition of each parameter, otherwise whole parameters,
one after another. No rank ever gathers a model. The policy's fp32 masters count, not its bf16 weights, and in bf16 the
reference has fp32 weights too: a small update would otherwise be lost in rounding, as it would be in the policy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

from dpo_ds.engine.engine import Engine
from dpo_ds.engine.slices import Slice, SliceReader, held_of, write
from dpo_ds.ranks.world import World

PREFIX = "reference"  # of the files' names


class MovingWeights:
    """The weights of a reference's engine that follow a policy's. Both hold the same model in the same way."""

    def __init__(self, reference: Engine, policy: Engine):
        self.policy = dict(policy.model.named_parameters())
        self.reference = dict(reference.model.named_parameters())
        assert self.policy.keys() == self.reference.keys()
        # fp32 weights [this rank's numbers] by name. In fp32 the engine's own weights are these.
        self.exact = {
            name: held.detach().view(-1) if held.dtype == torch.float32 else held.detach().view(-1).float()
            for name, held in self._held()
        }

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The numbers of each of the reference's parameters that this rank holds."""
        for name, parameter in self.reference.items():
            yield name, getattr(parameter, "ds_tensor", parameter.data)

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """One update, by all ranks together."""
        for name, exact in self.exact.items():
            exact.mul_(1 - alpha).add_(_master(self.policy[name]).to(exact.device), alpha=alpha)
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        """Gives the engine the weights of `exact`."""
        for name, held in self._held():
            if held.dtype != torch.float32:
                held.copy_(self.exact[name].view_as(held))
        # ZeRO-3 keeps small parameters whole once they have been gathered. They are gathered again, as after a step of
        # an optimizer.
        whole: list[Any] = [
            p for p in self.reference.values() if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE
        ]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def save(self, folder: Path, here: World) -> dict[str, dict]:
        """Writes this rank's numbers into a checkpoint's folder; where every rank holds the same, rank 0 does. Returns
        the files' sizes and checksums. Raises OSError."""
        partitioned = any(hasattr(parameter, "ds_tensor") for parameter in self.reference.values())
        if here.rank > 0 and not partitioned:
            return {}
        slices, file = self._slices(here.rank), f"{PREFIX}-{here.rank}.safetensors"
        return {file: write(folder / file, slices, (self.exact[s.name][: s.length] for s in slices), {})}

    def load(self, folder: Path, here: World) -> None:
        """Restores what any number of ranks saved."""
        reader = SliceReader(folder, PREFIX)
        for part in self._slices(here.rank):
            reader.read_into(self.exact[part.name][: part.length], part.name, part.start)
        self._apply()

    def _slices(self, rank: int) -> list[Slice]:
        """Which numbers of each parameter this rank holds."""
        slices = []
        for name, parameter in self.reference.items():
            start, length = held_of(parameter, rank)
            slices.append(
                Slice(name, tuple(getattr(parameter, "ds_shape", parameter.shape)), start, length, torch.float32)
            )
        return slices


def _master(parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of a trained parameter: this rank's partition under ZeRO-3, otherwise all of them."""
    if hasattr(parameter, "ds_tensor"):
        return safe_get_local_fp32_param(parameter).flatten()
    found = safe_get_full_fp32_param(parameter)
    return (parameter.detach().float() if found is None else found).flatten()
