"""A plan: one choice of tier, micro-batch and recomputation, the memory that it needs, and whether that fits."""

import dataclasses
from dataclasses import dataclass

from dpo_ds.config import Planned
from dpo_ds.engine import forms
from dpo_ds.models.model import Model
from dpo_ds.plan.footprint import WHEN, Part, recomputed
from dpo_ds.plan.machine import Machine, gib

# Fraction of a GPU's memory; the rest is lost to the driver and to fragmentation. An estimate.
USABLE = 0.95
# Where gradients are summed, in words, if the optimizer's state is on the host.
SUMS = {
    forms.GPU: "gradients on the GPU",
    forms.GPU_BF16: "gradients on the GPU in bf16",
    forms.HOST: "gradients on the host",
}


@dataclass(frozen=True)
class Plan:
    """One choice of tier, micro-batch and recomputation, with the memory that it needs."""

    model: Model
    options: Planned
    machine: Machine
    trained: int  # parameters; 0 if the model only scores
    parts: tuple[Part, ...]
    reasons: tuple[str, ...] = ()  # why it is not another, one sentence each

    def need(self, where: str) -> int:
        """The most bytes that are needed there at any time."""
        here = [part for part in self.parts if part.where == where]
        always, both, compute, step = (sum(part.bytes for part in here if part.when == when) for when in WHEN)
        return always + both + max(compute, step)

    @property
    def available(self) -> dict[str, int]:
        machine = self.machine
        gpu = {} if machine.gpu_memory is None else {"gpu": int(USABLE * machine.gpu_memory)}
        return {**gpu, "host": machine.host_memory, "nvme": machine.nvme}

    @property
    def fits(self) -> bool:
        return all(self.need(where) <= available for where, available in self.available.items())

    @property
    def excess(self) -> float:
        """The largest ratio of what is needed to what is available. Above 1, the plan does not fit."""
        return max(
            (self.need(where) / available for where, available in self.available.items() if available), default=0.0
        )

    @property
    def lacking(self) -> list[str]:
        names = {"gpu": "of GPU memory", "host": "of host memory", "nvme": "on --nvme_path"}
        return [
            f"{gib(self.need(where))} GiB {names[where]} (there are {gib(available)})"
            for where, available in self.available.items()
            if self.need(where) > available
        ]

    @property
    def how(self) -> str:
        recomputing = recomputed(self.options, self.model) if self.trained else ""
        recompute = f", activations {recomputing}" if recomputing else ""
        lora = f"LoRA r={self.options.lora_r}, " if self.options.lora else ""
        gradients = f", {SUMS[self.options.gradients]}" if self.trained and self.options.gradients in SUMS else ""
        tokens, scored = self.options.micro_batch_tokens, self.options.scoring_tokens
        more = f" ({scored} without gradients)" if scored != tokens else ""
        return f"{lora}{self.options.ds_config}{gradients}, micro-batches of {tokens} tokens{more}{recompute}"

    def as_markdown(self) -> str:
        """The parts and their sums in GiB, as Markdown."""
        trained = f", {self.trained:,} trained" if self.trained else ""
        lines = [
            f"{self.model.name} ({self.model.parameters:,} parameters{trained}) on {self.machine.name}: {self.how}",
            "",
            "| where | what | GiB | when |",
            "|---|---|---:|---|",
        ]
        for part in self.parts:
            lines.append(f"| {part.where} | {part.what} | {gib(part.bytes)} | {part.when} |")
        for where in dict.fromkeys(part.where for part in self.parts):
            of_available = f" of {gib(self.available[where])}" if where in self.available else ""
            lines.append(f"| **{where}** | **at most** | **{gib(self.need(where))}**{of_available} | |")
        lines += ["", *(f"- {reason}" for reason in self.reasons)] if self.reasons else []
        return "\n".join(lines)

    def facts(self) -> dict:
        """The plan for --json. Its keys are part of the command's interface."""
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "trained": self.trained,
            "machine": dataclasses.asdict(self.machine),
            "tier": self.options.ds_config,
            "gradients": self.options.gradients,
            "micro_batch_tokens": self.options.micro_batch_tokens,
            "scoring_tokens": self.options.scoring_tokens,
            "gradient_checkpointing": self.options.gradient_checkpointing == "on",
            "recomputed_layers": self.options.recomputed_layers,
            "reasons": self.reasons,
            "fits": self.fits,
            "need": {where: self.need(where) for where in ("gpu", "host", "nvme", "disk")},
            "room": self.available,
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }
