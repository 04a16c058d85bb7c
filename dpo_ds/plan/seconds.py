"""How long a run takes by its plan: each part of a step, the reference's pass, checkpoints and the export.

A part's time is its work (FLOPs, bytes) over the machine's speed for it (speeds.py). FLOPs are counted as
models/flops.py does, and recomputation on top; bytes by running the model's code without data (activations.py), and
from the sizes of what travels. Nothing was compared with a GPU yet.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from dpo_ds.config import Options, Planned
from dpo_ds.losses.table import reads_reference
from dpo_ds.models.flops import Flops
from dpo_ds.models.model import Model
from dpo_ds.plan.activations import lengths
from dpo_ds.plan.footprint import ADAM, FP32, MASTER, Footprint, filled, longest_pair, shape_of
from dpo_ds.plan.machine import Machine
from dpo_ds.plan.plan import Plan
from dpo_ds.scoring.head import LogitBudget

SHORTEST = 3  # tokens of a pair
SHOWN_PAIRS = 10_000  # for which the plan says how long they take, where the number of pairs is not known
# Adam reads both moments, the fp32 weight and the gradient; and writes all but the gradient, and the weight in bf16.
ADAM_MOVES = 4 * FP32 + 3 * FP32 + 2
# The head reads and writes its logits so often in forward and backward, in fp32. An estimate.
HEAD_PASSES = 5
# Seconds that Python needs for a module in a pass, with ZeRO's hooks. The GPU waits if it computes faster. An estimate.
MODULE = 2e-4


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts, on a rank."""

    products: float  # of matrices, and attention
    recomputed: float  # those that are made again in the backward pass: layers', and always the head's
    element_wise: float  # what else the layers and the head read and write
    waiting: float  # for other ranks' weights and gradients, copies to the host, and Python, where computing is faster
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.products + self.recomputed + self.element_wise + self.waiting + self.optimizer


class Estimate:
    """How long a run takes on pairs of a mean length, on a machine whose speeds are known."""

    def __init__(self, model: Model, options: Planned, machine: Machine, pair_tokens: int):
        assert machine.speeds is not None
        self.model, self.options, self.machine, self.speeds = model, options, machine, machine.speeds
        self.shape = shape_of(options)
        self.footprint = Footprint(self.shape, options, filled(options, model, machine), machine)
        self.pair_tokens = pair_tokens
        self.pairs, self.micro_batches = dealt(options, machine.ranks, pair_tokens)
        self.tokens = self.pairs * pair_tokens  # of a step, on a rank
        self.flops = Flops(model, options)
        prompt, chosen, rejected = lengths(pair_tokens)
        self.lengths = (
            np.full(self.pairs, prompt),
            np.tile([chosen, rejected], self.pairs),
            np.repeat(np.arange(self.pairs), 2),
        )
        self.responses = self.pairs * (chosen + rejected)
        self.forward = self.flops.forward(*self.lengths)

    def step(self) -> Step:
        """A step's parts."""
        layers, again = self.model.layers, self.options.recomputed_layers
        in_layers = self.forward.body + self.forward.attention + self.forward.adapters
        products = self.flops.step(*self.lengths) / self.speeds.products
        recomputed = (in_layers * again / layers + self.forward.head) / self.speeds.products
        moved = self._moved(again) + HEAD_PASSES * FP32 * self.responses * self._vocabulary
        if self.flops.reference:
            moved += self._forward_moved
        element_wise = moved / self.speeds.gpu_memory
        computing = products + recomputed + element_wise
        passes = 3 + again / layers + (1 if self.flops.reference else 0)
        python = MODULE * self._modules * passes * self.micro_batches
        waiting = max(0.0, self._travelling() - computing, python - computing)
        return Step(products, recomputed, element_wise, waiting, self._optimizer())

    @property
    def _modules(self) -> int:
        return sum(1 for _ in self.model.skeleton.modules())

    @property
    def _vocabulary(self) -> int:
        return self.flops.head // self.model.config.get_text_config().hidden_size

    def _moved(self, recomputed: int) -> int:
        """Bytes that the layers read and write in a step's forward and backward passes."""
        budget = LogitBudget.on(self.machine.gpu_memory)
        tokens = min(self.tokens, self.options.micro_batch_tokens)
        moved = self.shape.moved(tokens, min(self.pair_tokens, tokens), recomputed, budget)
        return moved * self.tokens // tokens

    @property
    def _forward_moved(self) -> int:
        """Bytes that the layers read and write in a forward pass: what recomputation adds."""
        return self._moved(self.model.layers) - self._moved(0)

    def _travelling(self) -> float:
        """Seconds in which a step's weights and gradients travel, while the rank computes."""
        whole, update = (self.footprint.host_traffic(count) for count in (self.micro_batches, 0))
        host = max(of_step - of_update for of_step, of_update in zip(whole, update, strict=True)) / self.speeds.to_host
        gathers = 0.0
        if self.footprint.gathers:  # for the forward and the backward pass, and for what is computed again
            times = 2 + self.options.recomputed_layers / self.model.layers
            times += 1 if self.flops.reference else 0
            gathers = times * self.footprint.item * self.shape.all * self.micro_batches
        reduced = self.footprint.item * self.shape.trained
        reduced *= {0: 2, 1: 1}.get(self.footprint.stage, self.micro_batches)
        return max(self._between_ranks(gathers + reduced), host, self._from_drive(2 * self.micro_batches))

    def _from_drive(self, passes: float) -> float:
        """Seconds in which a node's drive gives so many passes over the weights that are there."""
        if self.footprint.weights_at != "nvme":
            return 0.0
        size = self.footprint.item * self.footprint.share * self.machine.ranks_per_node
        return passes * size / self.speeds.disk

    def _between_ranks(self, size: float) -> float:
        """Seconds of collectives in which every rank gets so many bytes, its own share included."""
        speed = self.speeds.between_gpus
        if self.machine.nodes > 1:
            speed = min(speed, self.speeds.between_nodes)
        return size * (self.machine.ranks - 1) / self.machine.ranks / speed

    def _optimizer(self) -> float:
        """Seconds of the update. At stages 1 and 2, every rank then gets the others' new weights."""
        spread = self.footprint.item * self.shape.trained if self.footprint.stage in (1, 2) else 0
        return self._between_ranks(spread) + self._update()

    def _update(self) -> float:
        share = self.footprint.trained_share
        if self.footprint.optimizer_at == "gpu":
            return ADAM_MOVES * share / self.speeds.gpu_memory
        copies = max(self.footprint.host_traffic(0)) / self.speeds.to_host
        in_node = share * self.machine.ranks_per_node
        on_host = ADAM_MOVES * in_node / self.speeds.host_memory
        if self.footprint.optimizer_at == "nvme":  # read, and written back
            return max(on_host, copies, 2 * (self.footprint.state + FP32) * in_node / self.speeds.disk)
        return max(on_host, copies)

    @property
    def reference(self) -> float:
        """Seconds in which the reference table's part for a step's pairs is filled; 0 without a table."""
        given = self.options.reference_table is not None
        if given or self.options.reference != "precomputed" or not reads_reference(self.options):
            return 0.0
        return self.scoring

    @property
    def scoring(self) -> float:
        """Seconds of a forward pass over a step's pairs."""
        products = self.forward.body + self.forward.head + self.forward.attention
        computing = products / self.speeds.products + self._forward_moved / self.speeds.gpu_memory
        batches = self.tokens / max(self.options.scoring_tokens, self.pair_tokens)
        gathers = self.footprint.item * self.shape.all * batches if self.footprint.gathers else 0
        return max(computing, self._between_ranks(gathers), self._from_drive(batches))

    @property
    def checkpoint(self) -> float:
        return (ADAM + MASTER) * self.shape.trained / self.machine.nodes / self.speeds.disk

    @property
    def export(self) -> float:
        """Seconds of the export, or of reading the model at the start."""
        return self.footprint.item * self.model.parameters / self.speeds.disk

    @property
    def _reads_once(self) -> bool:
        """Whether the policy fills the reference table: it starts as the reference."""
        return self.options.reference_model is None and self.options.reference_adapter is None

    def run(self, pairs: int) -> dict[str, float]:
        """Seconds of a run on so many pairs, by its parts. Tokenising and the sample answers are not estimated."""
        steps, batch = steps_of(self.options, pairs), self.options.global_batch_pairs
        saves = math.ceil(steps / self.options.save_every) if self.options.save_every else 1  # one comes at the end
        every = max(1, steps // 10) if self.options.eval_every is None else self.options.eval_every
        evaluations = 1 + (math.ceil(steps / every) if every else 1)
        held_out = min(500, pairs // 20) if self.options.eval_pairs is None else self.options.eval_pairs
        return {
            "reading the model": self.export * (2 if self.reference and not self._reads_once else 1),
            "the reference": self.reference * math.ceil(visited(self.options, pairs) / batch),
            "training": steps * self.step().seconds,
            "evaluations": evaluations * self.scoring * held_out / batch,
            "checkpoints": saves * self.checkpoint,
            "the export": self.export if self.options.export == "merged" else 0.0,
        }


def dealt(options: Planned, ranks: int, pair_tokens: int) -> tuple[int, int]:
    """How many pairs of this length, and how many micro-batches, a rank has in a step."""
    pairs = math.ceil(options.global_batch_pairs / ranks)
    in_each = max(1, options.micro_batch_tokens // pair_tokens)
    return pairs, math.ceil(pairs / in_each)


def steps_of(options: Options, pairs: int) -> int:
    """The steps of a run on so many pairs."""
    if options.max_steps is not None:
        return options.max_steps
    return math.ceil(options.epochs * pairs / options.global_batch_pairs)


def visited(options: Options, pairs: int) -> int:
    """How many of so many pairs a run trains on."""
    return min(pairs, steps_of(options, pairs) * options.global_batch_pairs)


def estimate(plan: Plan) -> Estimate | None:
    """The estimate for a plan that trains; None where the machine's speeds are not known."""
    if plan.machine.speeds is None or not plan.trained:
        return None
    tokens = plan.options.pair_tokens or max(SHORTEST, longest_pair(plan.options) // 2)
    return Estimate(plan.model, plan.options, plan.machine, tokens)


def of_run(model: Model, options: Planned, pair_tokens: int) -> Estimate | None:
    """The estimate for a run on this machine, whose pairs are known; None where its speeds are not known."""
    machine = Machine.of(options)
    return None if machine.speeds is None else Estimate(model, options, machine, max(SHORTEST, pair_tokens))


def of_step(plan: Plan) -> float:
    """Seconds of a step, where they can be estimated."""
    found = estimate(plan)
    assert found is not None
    return found.step().seconds


def facts(plan: Plan) -> dict:
    """The estimate for --json: seconds of a step by its parts. Its keys are part of the command's interface."""
    found = estimate(plan) if plan.fits else None
    if found is None:
        return dict.fromkeys(("seconds", "traffic", "run", "gpu_hours", "cost"))
    to_host, to_gpu = found.footprint.host_traffic(found.micro_batches)
    step, price, parts = found.step(), found.options.price_per_gpu_hour, found.run(SHOWN_PAIRS)
    hours = gpu_hours(found, parts)
    return {
        "seconds": {
            "pair_tokens": found.pair_tokens,
            "step": step.seconds,
            **dataclasses.asdict(step),
            "reference": found.reference,
            "checkpoint": found.checkpoint,
            "export": found.export,
        },
        "traffic": {"to_host": to_host, "to_gpu": to_gpu},
        "run": {"pairs": SHOWN_PAIRS, "steps": steps_of(found.options, SHOWN_PAIRS), **parts},
        "gpu_hours": hours,
        "cost": None if price is None else hours * price,
    }


def as_markdown(found: Estimate) -> str:
    """An estimate's lines: a step by its parts, and a run on SHOWN_PAIRS pairs."""
    step = found.step()
    lines = [
        f"Time, estimated for {found.speeds.name} and pairs of {found.pair_tokens:,} tokens: "
        f"{duration(step.seconds)} a step of {found.options.global_batch_pairs} pairs, {found.micro_batches} "
        "micro-batch(es) a rank",
        "",
        "| part of a step | share |",
        "|---|---:|",
    ]
    for name, seconds in _named(step).items():
        if seconds >= 0.005 * step.seconds:
            lines.append(f"| {name} | {seconds / step.seconds:.0%} |")
    to_host, to_gpu = found.footprint.host_traffic(found.micro_batches)
    if to_host or to_gpu:
        lines += ["", f"Each GPU sends {to_host / 1e9:.3g} GB to the host in a step, and gets {to_gpu / 1e9:.3g} GB."]
    return "\n".join([*lines, "", of_pairs(found, SHOWN_PAIRS)])


def of_pairs(found: Estimate, pairs: int) -> str:
    """The line on a run on so many pairs."""
    parts, price = found.run(pairs), found.options.price_per_gpu_hour
    hours = gpu_hours(found, parts)
    cost = f", {hours * price:,.2f} at {price:g} each" if price is not None else ""
    said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds > 0)
    steps = f"{visited(found.options, pairs):,} pairs, {steps_of(found.options, pairs):,} steps"
    return f"{steps}: {duration(sum(parts.values()))}, {hours:,.3g} GPU-hours{cost} ({said})"


def gpu_hours(found: Estimate, parts: dict[str, float]) -> float:
    """Of a run with these parts, in seconds."""
    return sum(parts.values()) * found.machine.ranks / 3600


def _named(step: Step) -> dict[str, float]:
    return {
        "matrix products and attention": step.products,
        "activations computed again": step.recomputed,
        "norms, activation functions and the rest": step.element_wise,
        "waiting for weights, gradients or Python": step.waiting,
        "Adam": step.optimizer,
    }


def duration(seconds: float) -> str:
    """A time in words, with as many digits as an estimate has."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
