"""ZeRO-3's optimizer with its state on the host, and gradients held once: the forms that forms.py describes.

The classes replace methods of DeepSpeed that are not public, so they are taken for known versions alone. Nothing here
has run on CUDA yet.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.superoffload import superoffload_stage3  # noqa: F401  # inherits from what is replaced below
from deepspeed.runtime.zero import stage3

from dpo_ds.engine import forms
from dpo_ds.ranks import console


@contextlib.contextmanager
def kept(form: str, config: dict) -> Iterator[None]:
    """Within it, deepspeed.initialize builds an engine that keeps its gradients in this form, if the config's
    optimizer is on the host. Says so where DeepSpeed's version is not known, so that its own form is all there is."""
    if forms.on_host(config) and not forms.known():
        console.say(
            f"DeepSpeed {version('deepspeed')} keeps its gradients itself, which takes 20 host bytes a parameter: "
            f"dpo_ds knows how to do with less in {', '.join(forms.KNOWN)} alone"
        )
    own = {forms.GPU: SummedOnGPU, forms.GPU_BF16: SummedOnGPU, forms.HOST: SummedOnHost}.get(form)
    if own is None or not forms.on_host(config):
        yield
        return
    with mock.patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", own):
        yield


class SummedOnGPU(stage3.DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 as without offload, but with masters and moments on the host."""

    device: Any

    def __init__(self, *args: Any, offload_optimizer_config: Any, **more: Any):
        super().__init__(*args, offload_optimizer_config=None, **more)
        sizes = self.fp16_partitioned_groups_flat_numel
        accelerator = get_accelerator()
        blocks = [torch.empty(max(sizes), dtype=torch.float32) for _ in sizes[:2]]
        self.pinned = bool(offload_optimizer_config.pin_memory)
        self.blocks = [accelerator.pin_memory(block) if self.pinned else block for block in blocks]
        self.norm_for_param_grads: dict[int, torch.Tensor] = {}
        self.copies = None if accelerator.is_synchronized_device() else accelerator.Stream()
        self.arrived = [accelerator.Event() for _ in self.blocks] if self.copies else []

    def destroy(self) -> None:
        super().destroy()
        if self.pinned:
            for block in self.blocks:
                get_accelerator().unpin_memory(block)

    def _create_fp32_partitions(self) -> None:
        """Makes the masters, on the host."""
        # The string, as DeepSpeed's own offload has it: on CPU, fp32 masters would be the weights themselves otherwise.
        device, self.device = self.device, "cpu"
        super()._create_fp32_partitions()
        self.device = device

    def initialize_optimizer_states(self) -> None:
        """Adam makes its state in its first step. DeepSpeed would make a gradient here, which nobody reads."""

    def _sums(self, group: int) -> torch.Tensor:
        """A sub-group's gradients, as they were summed."""
        sizes = self.fp16_partitioned_groups_flat_numel
        return self.grad_partitions_flat_buffer.narrow(0, sum(sizes[:group]), sizes[group])

    def _block(self, group: int) -> torch.Tensor:
        return self.blocks[group % 2].narrow(0, 0, self.fp16_partitioned_groups_flat_numel[group])

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """As DeepSpeed's offload computes them, to the bit; on the host, as the norm must be."""
        for number, group in enumerate(self.fp16_groups):
            for parameter in group:
                _, start, size = self.grad_position[self.get_param_id(parameter)]
                part = self._sums(number).narrow(0, start, size)
                self.norm_for_param_grads[self.get_param_id(parameter)] = self._constant_buffered_norm2(part)
        return [self.complete_grad_norm_calculation_for_cpu_offload(group) for group in self.fp16_groups]

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Left to unscale_and_clip_grads, which comes next and knows the norm."""

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        scale = torch.as_tensor(self.loss_scale)
        if self.clip_grad > 0:
            scale = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0) * self.loss_scale
        if sub_group_id == 0:
            self._send(0, 1.0 / scale)
        if self.copies:
            self.arrived[sub_group_id % 2].synchronize()
        self.fp32_partitioned_groups_flat[sub_group_id].grad = self._block(sub_group_id)
        if sub_group_id + 1 < len(self.fp16_groups):
            self._send(sub_group_id + 1, 1.0 / scale)

    def _send(self, group: int, scale: torch.Tensor) -> None:
        """Scales a sub-group's gradients on the GPU and sends them to their block, after what left from there."""
        if self.copies is None:
            self._block(group).copy_(self._sums(group).to(torch.float32).mul_(scale))
            return
        accelerator = get_accelerator()
        self.copies.wait_stream(accelerator.current_stream())
        with accelerator.stream(self.copies):
            self._block(group).copy_(self._sums(group).to(torch.float32).mul_(scale), non_blocking=True)
            self.arrived[group % 2].record(self.copies)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """The new weights leave by the block to which their gradient came."""
        weights = self.fp16_partitioned_groups_flat[sub_group_id]
        rounded = self.blocks[sub_group_id % 2].view(weights.dtype).narrow(0, 0, len(weights))
        rounded.copy_(self.fp32_partitioned_groups_flat[sub_group_id].data)
        weights.data.copy_(rounded, non_blocking=True)
        self._unflatten_partitioned_parameters(sub_group_id)


class SummedOnHost(stage3.DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's offload, with one set of gradients instead of two. Sums must be in fp32."""

    def initialize_optimizer_states(self) -> None:
        """Adam makes its state in its first step. DeepSpeed would make its second set of gradients here."""

    def _setup_for_real_optimizer(self) -> None:
        super()._setup_for_real_optimizer()
        assert self.grad_partitions_flat_buffer.dtype is torch.float32
        start = 0
        for group in self.fp32_partitioned_groups_flat:
            group.grad = self.grad_partitions_flat_buffer.narrow(0, start, group.numel())
            start += group.numel()
