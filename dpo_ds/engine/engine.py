"""A DeepSpeed engine as the rest of the package sees it: it scores packed batches, learns from them, gives weights."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from dpo_ds.engine.memory import clear_swap_folders, free_swap_buffers, release_memory
from dpo_ds.engine.slices import held_of
from dpo_ds.engine.state import load_state, save_state
from dpo_ds.engine.tiers import swap_folders
from dpo_ds.models.lora import LanguageModel
from dpo_ds.ranks import collectives
from dpo_ds.ranks.world import from_environment
from dpo_ds.scoring.adapters import left_out
from dpo_ds.scoring.packed import PackedBatch
from dpo_ds.scoring.scorer import Scored

SCHEDULED = "scheduled"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # DeepSpeed's names


class _Optimizer(Protocol):
    """What DeepSpeed reads and calls of an optimizer. One of torch's has no `overflow` until Engine.step sets it."""

    overflow: bool
    step: Callable[..., object]


class Engine:
    """A DeepSpeed engine that scores packed batches and, for a policy, learns from them."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: dict | None = None):
        self.deepspeed = engine
        self.swap_folders = swap_folders(config or {})

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    @property
    def model(self) -> LanguageModel:
        return self.deepspeed.module.model

    def __call__(self, batch: PackedBatch) -> Scored:
        """Scores one packed batch for learning, with a graph. `backward` must follow."""
        return self.deepspeed(batch.to(self.device))

    def preview(self, batch: PackedBatch) -> Scored:
        """The same without a graph: dropout is on. Under ZeRO-3, `backward` must have run once."""
        with torch.no_grad():
            return self.deepspeed(batch.to(self.device))

    def score(self, batch: PackedBatch) -> torch.Tensor:
        """Scores one packed batch, without a graph: logps of the answers [A], or of their learned tokens [N] in a run
        that needs these. Under ZeRO-3, a policy must run `backward` first."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                found: Scored = self.deepspeed(batch.to(self.device))
        finally:
            self.deepspeed.train()
        return found.answers if found.tokens is None else found.tokens

    def score_base(self, batch: PackedBatch) -> torch.Tensor:
        """Likewise with LoRA's base weights. (peft's disable_adapter would invalidate ZeRO-3's trace at every
        switch.)"""
        with left_out(self.model):
            return self.score(batch)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of the loss to the step's. `last` means that `step` comes next."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self) -> tuple[torch.Tensor, bool]:
        """Applies the step's gradients, unless one is not finite. Returns their norm before clipping (fp32, on any
        device), and whether they were applied."""
        norm = None
        optimizer: _Optimizer = self.deepspeed.optimizer
        plain = isinstance(optimizer, torch.optim.Optimizer)
        if plain:  # stage 0 in fp32: DeepSpeed computes and checks no norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            # DeepSpeed's own optimizers have this flag too: after a skipped step, the learning rate stays the same.
            optimizer.overflow = not bool(torch.isfinite(norm))
        with _skipped(optimizer) if plain and optimizer.overflow else contextlib.nullcontext():
            self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32), self.deepspeed.was_step_applied()

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.deepspeed.zero_optimization_stage()

    @property
    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint takes: of each trained number, its fp32 weight and Adam's two averages."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return 12 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)

    def save(self, folder: Path) -> dict[str, dict]:
        """Writes this rank's part of a checkpoint. Returns its files' sizes and checksums. Raises OSError."""
        return save_state(self.deepspeed, folder)

    @property
    def counts(self) -> dict[str, int]:
        """What the engine counts: its steps, and those of the schedule, which waits in a step that is not applied."""
        return {SCHEDULED: self.deepspeed.lr_scheduler.last_epoch} | {
            name: getattr(self.deepspeed, name) for name in COUNTERS
        }

    def load(self, folder: Path, counts: dict[str, int], optimizer: bool = True) -> None:
        """Restores weights, Adam's state unless `optimizer` is false, and the schedule, by all ranks together.

        folder, counts: what an engine on any number of ranks, at any stage, saved and counted.
        """
        load_state(self.deepspeed, folder, optimizer)
        for name in COUNTERS:
            setattr(self.deepspeed, name, counts[name])
        scheduler, done = self.deepspeed.lr_scheduler, counts[SCHEDULED]
        rates = [rate * factor(done) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict(
            scheduler.state_dict() | {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
        )

    def weights(self) -> Callable[[list[str], bool], dict[str, torch.Tensor]]:
        """Returns a function fetch(names, wanted): the whole tensors of these parameters and buffers on the host, or
        none if this rank does not want them. All ranks must call it with the same names."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

        def fetch(names: list[str], wanted: bool) -> dict[str, torch.Tensor]:
            whole = {}
            for name in names:  # one by one, because offload to NVMe has a fixed number of buffers
                tensor = tensors[name]
                gathered = [tensor] if isinstance(tensor, torch.nn.Parameter) else []
                with deepspeed.zero.GatheredParameters(gathered, enabled=self.stage == 3):
                    if wanted:
                        whole[name] = tensor.detach().cpu().clone()
            return whole

        return fetch

    def release_gathered(self) -> None:
        """Frees what scoring after a step has gathered under ZeRO-3, by all ranks together."""
        if self.stage == 3 and hasattr(self.deepspeed.optimizer, "checkpoint_event_prologue"):
            self.deepspeed.optimizer.checkpoint_event_prologue()
            self.deepspeed.optimizer.checkpoint_event_epilogue()  # small parameters stay gathered

    def largest_weight(self) -> float:
        """The largest weight of all ranks, as size; NaN if one is NaN. All ranks call it together.

        Partitions that are kept on NVMe are not read.
        """
        found, rank = [torch.zeros(2, device=self.device)], from_environment().rank
        for parameter in self.model.parameters():
            held = getattr(parameter, "ds_tensor", parameter)
            _, length = held_of(parameter, rank)
            if length and getattr(held, "final_location", None) != OffloadDeviceEnum.nvme:
                found.append(torch.stack(held.detach().flatten()[:length].aminmax()).to(found[0]))
        own = torch.stack(found).abs().max()  # NaN comes through
        largest = collectives.gather(float(own))
        return math.nan if any(map(math.isnan, largest)) else max(largest)

    @property
    def learning_rate(self) -> float:
        return self.deepspeed.get_lr()[0]

    def close(self) -> None:
        """Frees the engine's memory, and returns it to the machine."""
        engine, self.deepspeed = self.deepspeed, None
        optimizer, parameters = engine.optimizer, list(engine.module.parameters())
        engine.destroy()
        free_swap_buffers(parameters)
        # ZeRO's hooks and groups form reference cycles, and some outlive the engine. So what they hold is cleared.
        for holder in (optimizer, getattr(engine, "basic_optimizer", None)):
            if holder is not None:
                vars(holder).clear()
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            parameter.grad = None
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor = None
        del engine, optimizer, parameters
        clear_swap_folders(self.swap_folders)
        release_memory()


@contextlib.contextmanager
def _skipped(optimizer: _Optimizer) -> Iterator[None]:
    """Inside the block, the optimizer's step does nothing."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = step
