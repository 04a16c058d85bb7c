"""A DeepSpeed engine as the rest of the package sees it: scores packed batches, learns from them, hands weights out."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch

from dpo_ds.engine.memory import clear_swap_folders, free_swap_buffers, release_memory
from dpo_ds.engine.resume import load_checkpoint, save_checkpoint
from dpo_ds.engine.tiers import swap_folders
from dpo_ds.models.lora import LanguageModel
from dpo_ds.scoring.packed import PackedBatch


class _Optimizer(Protocol):
    """What DeepSpeed reads and calls of an optimizer. One of torch's has no `overflow` until Engine.step sets it."""

    overflow: bool
    step: Callable[..., object]


class Engine:
    """A DeepSpeed engine that scores packed batches and, if it is a policy's, learns from them."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: dict | None = None):
        self.deepspeed = engine
        self.swap_folders = swap_folders(config or {})

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    @property
    def model(self) -> LanguageModel:
        return self.deepspeed.module.model

    def __call__(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logps [B, 2] with a graph, to be followed by `backward`; and the router's loss [B], where a run wants it."""
        found = self.deepspeed(batch.to(self.device))
        return found if isinstance(found, tuple) else (found, None)

    def score(self, batch: PackedBatch) -> torch.Tensor:
        """logps [B, 2] without a graph. Under ZeRO-3 a policy must have been through `backward` once before."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                return self.deepspeed(batch.to(self.device))
        finally:
            self.deepspeed.train()

    def score_base(self, batch: PackedBatch) -> torch.Tensor:
        """logps [B, 2] of LoRA's base weights: the adapters are scaled to 0, which keeps ZeRO-3's trace (unlike
        disable_adapter, which invalidates it at every switch)."""
        modules: Iterator[Any] = self.model.modules()
        layers = [(module, dict(module.scaling)) for module in modules if hasattr(module, "lora_A")]
        for module, scaling in layers:
            module.scaling = dict.fromkeys(scaling, 0.0)
        try:
            return self.score(batch)
        finally:
            for module, scaling in layers:
                module.scaling = scaling

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the loss's gradients to the step's; `last` says that `step` comes next."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self) -> tuple[torch.Tensor, bool]:
        """Applies the step's gradients. Returns their norm before clipping, fp32 on some device, and whether the step
        was applied: not if a gradient is not finite."""
        norm = None
        optimizer: _Optimizer = self.deepspeed.optimizer
        plain = isinstance(optimizer, torch.optim.Optimizer)
        if plain:  # stage 0 in fp32: DeepSpeed keeps no norm, and checks nothing
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            # DeepSpeed's own optimizers report it so as well: a skipped step does not move the learning rate either.
            optimizer.overflow = not bool(torch.isfinite(norm))
        with _skipped(optimizer) if plain and optimizer.overflow else contextlib.nullcontext():
            self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32), self.deepspeed.was_step_applied()

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return self.deepspeed.zero_optimization_stage()

    def save(self, folder: Path) -> None:
        """Writes the engine's part of a checkpoint, by all ranks together."""
        save_checkpoint(self.deepspeed, folder)

    def load(self, folder: Path, rank: int) -> None:
        """Puts the engine where it was when `save` wrote there: weights, optimizer, schedule."""
        load_checkpoint(self.deepspeed, folder, rank)

    def weights(self) -> Callable[[list[str], bool], dict[str, torch.Tensor]]:
        """A function from names of parameters and buffers, and whether this rank wants them, to whole tensors on the
        host (none where they are not wanted). All ranks call it alike."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

        def fetch(names: list[str], wanted: bool) -> dict[str, torch.Tensor]:
            whole = {}
            for name in names:  # one by one: offload to NVMe has a fixed number of buffers
                tensor = tensors[name]
                gathered = [tensor] if isinstance(tensor, torch.nn.Parameter) else []
                with deepspeed.zero.GatheredParameters(gathered, enabled=self.stage == 3):
                    if wanted:
                        whole[name] = tensor.detach().cpu().clone()
            return whole

        return fetch

    @property
    def learning_rate(self) -> float:
        return self.deepspeed.get_lr()[0]

    def close(self) -> None:
        """Gives the engine's memory back, to the allocator and from there to the machine."""
        engine, self.deepspeed = self.deepspeed, None
        optimizer, parameters = engine.optimizer, list(engine.module.parameters())
        engine.destroy()
        free_swap_buffers(parameters)
        # ZeRO's hooks and groups form cycles with all they hold, and some outlive the engine: empty the holders.
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
    """Within it, the optimizer's step does nothing."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = step
