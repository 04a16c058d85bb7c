"""The state that training changes in an engine: fp32 weights and Adam's state. Saves it, and loads it into an engine of
any ZeRO stage on any number of ranks.

DeepSpeed's optimizers hold these numbers in several ways. All of them can be seen as buffers: flat tensors that Adam
updates, and in each of them the places of some parameters' numbers. A checkpoint holds the numbers by these places
(slices.py), so it does not matter how a stage divided them. Frozen weights are not saved: they are those of the model's
files.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dpo_ds.engine.slices import Slice, SliceReader, held_of, write
from dpo_ds.ranks.world import from_environment

PREFIX = "state"  # of the files' names
WEIGHT, BUFFER = "weight", "buffer"  # kinds of tensors in the files; the others are Adam's: exp_avg, exp_avg_sq
STEPS = "steps"  # in a file's note: Adam's number of updates of each parameter


@dataclass(frozen=True)
class Place:
    """Numbers of a parameter within a buffer."""

    name: str  # the parameter's
    shape: tuple[int, ...]  # the whole parameter's
    start: int  # in the flattened parameter
    offset: int  # in the buffer
    length: int


@dataclass(frozen=True)
class Buffer:
    """A flat fp32 tensor that Adam updates on this rank."""

    key: torch.Tensor  # what Adam keeps its state under
    places: list[Place]
    number: int = 0  # of the sub-group, at stage 3


class EngineState:
    """An engine's buffers, and how they are brought into memory and to the model's weights."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.adam, self.optimizer = engine.basic_optimizer, engine.optimizer
        self.parameters = dict(engine.module.named_parameters())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.buffers = _sub_groups(self.optimizer, names)
        elif isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            groups = zip(self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups, strict=True)
            self.buffers = [_partition(parameters, flat, names) for parameters, flat in groups]
        elif isinstance(self.optimizer, BF16_Optimizer):
            groups = zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_flat_partition, strict=True)
            self.buffers = [_partition(parameters, flat, names) for parameters, flat in groups]
        elif isinstance(self.optimizer, FP16_Optimizer):
            groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups_flat, strict=True)
            self.buffers = [Buffer(flat, _whole(parameters, names)) for parameters, flat in groups]
        elif isinstance(self.optimizer, FP16_UnfusedOptimizer):
            groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            pairs = [pair for lower, masters in groups for pair in zip(lower, masters, strict=True)]
            self.buffers = [Buffer(master, _whole([parameter], names)) for parameter, master in pairs]
        else:  # stage 0 in fp32: Adam updates the parameters themselves
            assert self.optimizer is self.adam, type(self.optimizer)
            parameters = [parameter for group in self.adam.param_groups for parameter in group["params"]]
            self.buffers = [Buffer(parameter, _whole([parameter], names)) for parameter in parameters]

    @property
    def repeated(self) -> bool:
        """Whether every rank holds all numbers."""
        return self.optimizer is self.adam or isinstance(self.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer))

    @contextlib.contextmanager
    def in_memory(self, buffer: Buffer) -> Iterator[None]:
        """Inside the block, the buffer and its state are in memory. They are not changed there."""
        if not self._swapped(buffer):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(buffer.number)
        try:
            yield
        finally:
            self.optimizer._release_swap_buffers(buffer.number)

    @contextlib.contextmanager
    def changing(self, buffer: Buffer) -> Iterator[None]:
        """Likewise, and what was changed inside the block is kept."""
        if self._swapped(buffer):
            self.optimizer._optimizer_states_and_gradient_swap_in(buffer.number)
        yield
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(buffer.number)
        if self._swapped(buffer):
            self.optimizer._optimizer_states_and_gradient_swap_out(buffer.number)

    def _swapped(self, buffer: Buffer) -> bool:
        """Whether a buffer is on NVMe."""
        return isinstance(
            self.optimizer, DeepSpeedZeroOptimizer_Stage3
        ) and self.optimizer._swappable_optimizer_subgroup(buffer.number)

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Around the change of all buffers, by all ranks: at the end, the model has the new weights."""
        third = isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3)
        if third:
            self.optimizer.checkpoint_event_prologue()  # partitions what is gathered
        yield
        if third:
            self.optimizer.checkpoint_event_epilogue()  # gathers what stays gathered
        elif not self.repeated:
            self.optimizer.update_lp_params()
        elif self.optimizer is not self.adam:  # its fp32 weights are copies
            for buffer in self.buffers:
                for place in buffer.places:
                    numbers = buffer.key.data.view(-1).narrow(0, place.offset, place.length)
                    self.parameters[place.name].data.copy_(numbers.view(place.shape))


def _whole(parameters: Sequence[torch.Tensor], names: dict[int, str]) -> list[Place]:
    """Whole parameters, flattened one after another."""
    places, offset = [], 0
    for parameter in parameters:
        places.append(Place(names[id(parameter)], tuple(parameter.shape), 0, offset, parameter.numel()))
        offset += parameter.numel()
    return places


def _partition(parameters: Sequence[Any], flat: torch.Tensor, names: dict[int, str]) -> Buffer:
    """This rank's part of a group of parameters, which are flattened one after another."""
    places = [
        Place(
            names[id(parameter)],
            tuple(parameter.shape),
            mapping.lp_fragment_address.start,
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
        )
        for parameter in parameters
        if (mapping := parameter._hp_mapping) is not None
    ]
    return Buffer(flat, places)


def _sub_groups(optimizer: DeepSpeedZeroOptimizer_Stage3, names: dict[int, str]) -> list[Buffer]:
    """This rank's part of every parameter: as many numbers on each rank, the last ones padded."""
    buffers = []
    for number, parameters in enumerate(optimizer.fp16_groups):
        places, offset = [], 0
        for parameter in parameters:
            start, length = held_of(parameter, optimizer._get_param_partition_rank(parameter))
            if length > 0:
                places.append(Place(names[id(parameter)], tuple(parameter.ds_shape), start, offset, length))
            offset += parameter.partition_numel()
        buffers.append(Buffer(optimizer.fp32_partitioned_groups_flat[number], places, number))
    return buffers


def save_state(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, dict]:
    """Writes this rank's file. Returns its name with its size and checksum. Ranks need not wait for each other.

    Raises OSError if it cannot be written. The engine is unchanged.
    """
    here, state = from_environment(), EngineState(engine)
    shares = [_share(buffer.places, here.rank, here.size) if state.repeated else buffer.places
              for buffer in state.buffers]  # fmt: skip
    kept = _constants(engine) if here.speaks else {}
    slices: list[Slice] = []
    steps: dict[str, int] = {}
    for buffer, places in zip(state.buffers, shares, strict=True):
        of_adam = state.adam.state.get(buffer.key, {})
        for kind in (WEIGHT, *_moments(of_adam)):
            slices += [Slice(f"{kind}/{p.name}", p.shape, p.start, p.length, torch.float32) for p in places]
        if "step" in of_adam:
            steps |= {place.name: int(of_adam["step"]) for place in places}
    slices += [Slice(f"{BUFFER}/{name}", tuple(t.shape), 0, t.numel(), t.dtype) for name, t in kept.items()]

    def numbers() -> Iterator[torch.Tensor]:
        for buffer, places in zip(state.buffers, shares, strict=True):
            with state.in_memory(buffer):
                of_adam = state.adam.state.get(buffer.key, {})
                for held in (buffer.key, *(of_adam[kind] for kind in _moments(of_adam))):
                    flat = held.detach().view(-1)
                    yield from (flat.narrow(0, place.offset, place.length) for place in places)
        yield from kept.values()

    name = f"{PREFIX}-{here.rank}.safetensors"
    return {name: write(folder / name, slices, numbers(), {STEPS: steps})}


def _share(places: list[Place], rank: int, ranks: int) -> list[Place]:
    """What this rank writes of places that every rank holds."""
    shares = []
    for place in places:
        begin, end = (place.length * n // ranks for n in (rank, rank + 1))
        if end > begin:
            shares.append(Place(place.name, place.shape, place.start + begin, place.offset + begin, end - begin))
    return shares


def _constants(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The model's tensors that are no parameters. The widest come first: a reader needs them aligned."""
    module = engine.module
    kept = module.state_dict(keep_vars=True).keys()
    found = {name: tensor for name, tensor in module.named_buffers() if name in kept}
    return dict(sorted(found.items(), key=lambda entry: -entry[1].itemsize))


def _moments(of_adam: dict) -> list[str]:
    """The names of Adam's tensors that have a number for each weight: exp_avg, exp_avg_sq."""
    return sorted(key for key, value in of_adam.items() if torch.is_tensor(value) and key != "step")


@torch.no_grad()
def load_state(engine: deepspeed.DeepSpeedEngine, folder: Path, optimizer: bool = True) -> None:
    """Restores what any number of ranks saved from an engine of any stage, by all ranks together. The engine must have
    made no step yet.

    optimizer: whether Adam's state is restored too, or starts from nothing. Raises UserError if a number is missing.
    """
    reader, state = SliceReader(folder, PREFIX), EngineState(engine)
    steps = {name: count for note in reader.notes for name, count in note[STEPS].items()}
    kinds = sorted({name.split("/")[0] for name in reader.shapes} - {WEIGHT, BUFFER}) if optimizer else []
    with state.replacing():
        for buffer in state.buffers:
            with state.changing(buffer):
                _fill(buffer.key, reader, WEIGHT, buffer.places)
                updates = {steps.get(place.name, 0) for place in buffer.places} if kinds else set()
                if any(updates):
                    moments = {kind: torch.zeros_like(buffer.key, dtype=torch.float32) for kind in kinds}
                    for kind, tensor in moments.items():
                        # Adam has no state of a parameter that never had a gradient.
                        _fill(tensor, reader, kind, [p for p in buffer.places if f"{kind}/{p.name}" in reader])
                    state.adam.state[buffer.key] = {"step": _step_for(state.adam, buffer.key, max(updates)), **moments}
    for name, tensor in _constants(engine).items():
        tensor.copy_(reader.whole(f"{BUFFER}/{name}"))
    _count_as_before(state.adam)


def _fill(tensor: torch.Tensor, reader: SliceReader, kind: str, places: list[Place]) -> None:
    flat = tensor.data.view(-1)
    for place in places:
        reader.read_into(flat.narrow(0, place.offset, place.length), f"{kind}/{place.name}", place.start)


def _step_for(adam: torch.optim.Optimizer, key: torch.Tensor, count: int) -> torch.Tensor | int:
    """The number of updates, as this kind of Adam keeps it: torch's as a tensor, DeepSpeed's two as a number."""
    if not type(adam).__module__.startswith("torch."):
        return count
    group = adam.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(count), dtype=torch.float32, device=key.device if on_device else "cpu")


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
