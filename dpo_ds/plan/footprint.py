"""The bytes that one choice of tier, micro-batch and recomputation needs on GPU, host, NVMe and disk.

The sizes follow from the sources of DeepSpeed 0.19.8. tests/launches/test_plan_measured.py compares them with real runs
on CPU; nothing has been compared on a GPU yet. activations.py counts activations by running the model's own code.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_ds.config import Options, Planned, Precision
from dpo_ds.engine import forms
from dpo_ds.engine.tiers import fill_tier, reference_config
from dpo_ds.models.adapter import find_adapter
from dpo_ds.models.find import known_model
from dpo_ds.models.lora import is_target
from dpo_ds.models.lora import targets as lora_targets
from dpo_ds.models.model import Model, torch_dtype
from dpo_ds.models.recompute import switched_layers
from dpo_ds.plan.activations import Activations, Counter
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.ranks import process
from dpo_ds.scoring.head import LogitBudget
from dpo_ds.scoring.twin import require_exact

# What every process needs before a model is loaded.
CUDA = 2 * GIB  # per GPU: context, cuBLAS and NCCL workspaces; an estimate
PROCESS = int(0.8 * GIB)  # host memory per rank: Python, torch, DeepSpeed, datasets; measured 0.35 to 0.7 GiB on CPU
# The libraries' work space per rank on CPU, measured. Products in bf16 need more, above all on a CPU that computes them
# in fp32.
CPU_WORK, CPU_WORK_BF16, CPU_WORK_NO_BF16 = 70 * 2**20, 85 * 2**20, 160 * 2**20

LEFT_BEHIND = "freed, but kept by the C library"

ADAM, MASTER = 8, 4  # bytes per trained parameter: two fp32 moments; the fp32 weight
FP32 = 4

WHEN = ("always", "compute and step", "compute", "step")


@dataclass(frozen=True)
class Part:
    """One part of the memory. `where`: gpu (each), host (each node), nvme (each node) or disk (the run's folder).
    `when`: one of WHEN. "compute" (of a micro-batch) and "step" (of the optimizer) are never at the same time."""

    where: str
    what: str
    bytes: int
    when: str = "always"


class Shape:
    """The sizes of a model and its adapters: numbers of parameters, and activations for a number of tokens."""

    def __init__(self, model: Model, options: Options):
        require_exact(model.name, model.config, model.trust_remote_code)
        self.model, self.dtype = model, torch_dtype(options.precision)
        skeleton = model.skeleton
        # (numbers in the tensor, whether it is trained)
        self.sizes = [(p.numel(), not options.lora) for p in skeleton.parameters()]
        if options.lora:
            adapted = lora_targets(skeleton, options.lora_targets)
            matrices = [m.weight for name, m in skeleton.named_modules() if is_target(name, adapted)]
            self.sizes += [(options.lora_r * side, True) for matrix in matrices for side in matrix.shape]
        self.all = sum(size for size, _ in self.sizes)
        self.trained = sum(size for size, trained in self.sizes if trained)
        self.largest_trained = max(size for size, trained in self.sizes if trained)
        # ZeRO-3 gathers one module's own parameters at a time, but a whole block of experts at once.
        own = (sum(p.numel() for p in module.parameters(recurse=False)) for module in skeleton.modules())
        self.largest_gathered = max(model.largest_block, *own)
        self.switchable = len(switched_layers(skeleton)) == model.layers  # each layer for itself
        self.counter = Counter(model.config, options, self.dtype, model.is_moe)

    def small(self, threshold: int) -> int:
        """Number of parameters in tensors of at most `threshold` elements, which ZeRO-3 keeps whole on every rank."""
        return sum(size for size, _ in self.sizes if size <= threshold)

    def activations(self, tokens: int, pair_tokens: int, recomputed: int, budget: LogitBudget) -> int:
        """Bytes of a micro-batch's, if so many layers recompute theirs."""
        if recomputed in (0, self.counter.layers):
            return self._counted(tokens, pair_tokens, recomputed > 0, budget).bytes
        kept, again = (self._counted(tokens, pair_tokens, recompute, budget) for recompute in (False, True))
        return Activations.mixed(kept, again, recomputed)

    def scored(self, tokens: int, pair_tokens: int, budget: LogitBudget) -> int:
        """Bytes of a micro-batch's, if it is scored without gradients."""
        return self._counted(tokens, pair_tokens, False, budget, learns=False).bytes

    def moved(self, tokens: int, pair_tokens: int, recomputed: int, budget: LogitBudget) -> int:
        """Bytes that a micro-batch's forward and backward read and write in the layers, beside matrix products."""
        kept, again = (self._counted(tokens, pair_tokens, recompute, budget).moved for recompute in (False, True))
        return (self.counter.layers - recomputed) * kept + recomputed * again

    @functools.cache  # noqa: B019 (a plan's few shapes live as long as the process)
    def _counted(
        self, tokens: int, pair_tokens: int, recompute: bool, budget: LogitBudget, learns: bool = True
    ) -> Activations:
        return self.counter.count(tokens, pair_tokens, recompute, budget, learns)


def shape_of(options: Options) -> Shape:
    """The sizes of the options' model, with their adapters. Precision is decided."""
    lora = (options.lora, options.lora_r, options.lora_targets) if options.lora else (False, 1, "")
    assert options.precision != "auto"
    return _shape(options.model, options.trust_remote_code, options.precision, *lora)


@functools.cache  # small: a shape holds no weights
def _shape(
    model: str, trust_remote_code: bool, precision: Precision, lora: bool, lora_r: int, lora_targets: str
) -> Shape:
    options = Options(model=model, precision=precision, lora=lora, lora_r=lora_r, lora_targets=lora_targets)
    return Shape(known_model(model, trust_remote_code), options)


def filled(options: Options, model: Model, machine: Machine) -> dict:
    """The config of the options' tier on that machine."""
    if machine.nvme and not options.nvme_path:  # a plan for another machine, whose folders are not known
        options = options.replace(nvme_path="/nvme")
    return fill_tier(options.ds_config, options, model, machine.ranks, machine.gpu_memory is not None)


class Footprint:
    """The memory of a model under a filled DeepSpeed config on a machine. Iterate over it to get its parts."""

    def __init__(self, shape: Shape, options: Planned, config: dict, machine: Machine):
        self.shape, self.options, self.config, self.machine = shape, options, config, machine
        self.zero = config["zero_optimization"]
        self.stage, self.ranks = self.zero["stage"], machine.ranks
        self.item = shape.dtype.itemsize
        self.optimizer_at = (self.zero.get("offload_optimizer") or {}).get("device", "gpu")
        self.weights_at = (self.zero.get("offload_param") or {}).get("device", "gpu") if self.stage == 3 else "gpu"
        # How many of all parameters a rank holds, and how many of the trained ones it updates.
        self.share = math.ceil(shape.all / self.ranks) if self.stage == 3 else shape.all
        self.trained_share = math.ceil(shape.trained / self.ranks) if self.stage else shape.trained
        # How many of those ZeRO-3 updates at a time.
        self.group = min(self.trained_share, int(self.zero.get("sub_group_size", 10**9)))
        # ZeRO and bf16 train fp32 copies ("masters") of the weights.
        self.state = ADAM + (MASTER if self.stage or options.precision == "bf16" else 0)
        # A single rank with its partition on the device gathers nothing.
        self.moves = options.reference_update_every is not None
        self.gathers = self.stage == 3 and (self.ranks > 1 or self.weights_at != "gpu")

    def __iter__(self) -> Iterator[Part]:
        yield from self.weights()
        yield from self.offloaded_optimizer() if self.optimizer_at != "gpu" else self.optimizer()
        yield from self.gradients()
        yield from self.live_parameters()
        yield from self.buckets()
        yield from self.compute()
        yield from self.disk()

    def part(self, where: str, what: str, size: float, when: str = "always") -> Part:
        """A part of `size` bytes per rank."""
        where = {"cpu": "host"}.get(where, where)
        if where == "gpu" and self.machine.gpu_memory is None:
            where = "host"
        ranks = 1 if where in ("gpu", "disk") else self.machine.ranks_per_node
        return Part(where, what, int(size) * ranks, when)

    def pinned(self, size: float) -> int:
        """Bytes of a page-locked block. torch rounds up to a power of two, unless quiet_start has turned that off."""
        rounded = self.machine.gpu_memory is not None and not process.exact_pinned_memory()
        return 2 ** math.ceil(math.log2(size)) if rounded and size > 1 else int(size)

    def weights(self) -> Iterator[Part]:
        own = self.item * self.share
        size = self.pinned(own) if self.weights_at == "cpu" else own
        yield self.part(self.weights_at, f"weights ({self.options.precision})", size)
        if self.weights_at == "nvme":
            swap = self.zero["offload_param"]
            size = self.item * swap.get("buffer_count", 5) * swap["buffer_size"]
            yield self.part("host", "buffers of the weights", size)
        if (reference := self.reference_numbers()) > 0:
            yield self.part(self.weights_at, "the reference's weights", self.item * reference)
            if self.moves and self.options.precision == "bf16":
                yield self.part(self.weights_at, "the reference's fp32 weights", FP32 * reference)

    def reference_numbers(self) -> int:
        """How many of the reference's parameters a rank holds beside the policy's. A reference that only fills a table
        is gone before the policy comes; only a larger one counts, by what it has more."""
        other = self.options.reference_model
        numbers = self.shape.all
        if other is not None:
            numbers = known_model(other, self.options.trust_remote_code).parameters
        if self.options.reference != "live":
            numbers -= self.shape.all
        elif (adapter := self.options.reference_adapter) is not None:
            base = other or self.options.model
            numbers += find_adapter("--reference_adapter", adapter, base, self.options.trust_remote_code).numbers
        return math.ceil(numbers / self.ranks) if self.stage == 3 else numbers

    def optimizer(self) -> Iterator[Part]:
        masters = " and fp32 weights" if self.state > ADAM else ""
        yield self.part("gpu", f"Adam's moments{masters}", self.state * self.trained_share)

    def offloaded_optimizer(self) -> Iterator[Part]:
        if self.optimizer_at == "nvme":
            yield self.part(
                "nvme", "Adam's moments, fp32 weights and gradients", (self.state + FP32) * self.trained_share
            )
            # One group at a time is copied to the host: moments, weights and gradients.
            yield self.part("host", "the group being updated", self.pinned((self.state + FP32) * self.group))
            return
        groups = [self.group] * (self.trained_share // self.group)
        groups += [self.trained_share % self.group] if self.trained_share % self.group else []
        a_number_each = sum(self.pinned(FP32 * size) for size in groups)
        yield self.part("host", "Adam's moments and fp32 weights", self.state // FP32 * a_number_each)
        if self.stage < 3 or self.options.gradients == forms.OWN:
            yield self.part("host", "fp32 gradients", a_number_each)
        elif self.sums_at == "gpu":
            blocks = sum(self.pinned(FP32 * self.group) for _ in groups[:2])
            yield self.part("host", "gradients on their way to Adam", blocks)

    def gradients(self) -> Iterator[Part]:
        """Gradients until the step, and what the step itself needs."""
        on_gpu = self.sums_at == "gpu"
        if self.stage == 0:
            yield self.part("gpu", "gradients", FP32 * self.trained_share, "compute and step")
        elif self.stage == 1:
            yield self.part("gpu", "gradients", self.item * self.shape.trained, "compute and step")
        else:
            size = self.sums_size * self.trained_share
            when = "always" if self.stage == 3 or not on_gpu else "compute and step"
            where, size = ("gpu", size) if on_gpu else ("host", self.pinned(size))
            yield self.part(where, "gradients, accumulated", size, when)
        if on_gpu and self.stage:
            group = self.group if self.stage == 3 else self.trained_share
            yield self.part("gpu", "fp32 gradients of the update", FP32 * group, "step")
        adam = self.config["optimizer"]["params"]
        if adam.get("torch_adam") and not adam.get("fused"):
            # torch's own AdamW makes two temporaries as large as the tensor that it updates; a partition is one tensor.
            group = self.shape.largest_trained if self.stage == 0 else self.group
            yield self.part("gpu", "AdamW's temporaries", 2 * FP32 * group, "step")

    @property
    def sums_size(self) -> int:
        """Bytes of a summed gradient, at stage 2 and 3."""
        return FP32 if self.config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else self.item

    @property
    def sums_at(self) -> str:
        """Where gradients are summed."""
        apart = self.stage == 3 and self.optimizer_at == "cpu" and self.options.gradients in (forms.GPU, forms.GPU_BF16)
        return "gpu" if apart or self.optimizer_at == "gpu" else "host"

    def live_parameters(self) -> Iterator[Part]:
        if not self.gathers:
            return
        small = self.shape.small(self.zero.get("stage3_param_persistence_threshold", 100_000))
        yield self.part("gpu", "small parameters kept whole", self.item * small)
        reused = self.zero.get("stage3_max_reuse_distance", 1)
        ahead = self.zero.get("stage3_max_live_parameters", 10**9) if reused else 0
        live = min(self.shape.all, ahead + self.shape.largest_gathered)
        yield self.part("gpu", "gathered parameters", self.item * live, "compute")

    def buckets(self) -> Iterator[Part]:
        if not self.stage:
            return
        count = 2 if self.zero.get("overlap_comm", self.stage == 3) else 1
        size = count * self.item * self.zero.get("reduce_bucket_size", 5 * 10**8)
        yield self.part("gpu", "reduction buckets", size, "compute")
        if self.ranks > 1:
            yield self.part("gpu", "the largest gradient, reduced", self.item * self.shape.largest_trained, "compute")

    @property
    def activations(self) -> str:
        return f"activations, {recomputed(self.options, self.shape.model) or 'kept'},"

    @property
    def learned_bytes(self) -> int:
        """Of the activations of a micro-batch that is trained on."""
        tokens, budget = self.options.micro_batch_tokens, LogitBudget.on(self.machine.gpu_memory)
        pair = min(longest_pair(self.options), tokens)
        return self.shape.activations(tokens, pair, self.options.recomputed_layers, budget)

    def scored_bytes(self, tokens: int) -> int:
        """Of the activations of a micro-batch of so many tokens that is scored."""
        pair = min(longest_pair(self.options), tokens)
        return self.shape.scored(tokens, pair, LogitBudget.on(self.machine.gpu_memory))

    @property
    def activation_bytes(self) -> int:
        larger = self.options.scoring_tokens > self.options.micro_batch_tokens
        return max(self.learned_bytes, self.scored_bytes(self.options.scoring_tokens) if larger else 0)

    def host_traffic(self, micro_batches: int) -> tuple[int, int]:
        """Bytes that a step with so many micro-batches moves between a GPU and the host: to the host, and back. Read in
        DeepSpeed's sources; tests/launches/test_host_traffic.py counts them.
        """
        to_host = to_gpu = 0
        if self.weights_at != "gpu":  # gathered for forward and for backward; those on NVMe come by way of the host
            to_gpu += 2 * self.item * self.share * micro_batches
        if self.optimizer_at != "gpu":
            if self.sums_at == "host":  # each micro-batch sends its gradients, brings the sums back, and adds there
                to_host += self.sums_size * self.trained_share * micro_batches
                to_gpu += self.sums_size * self.trained_share * micro_batches
            to_host += FP32 * self.trained_share
            to_gpu += self.item * self.trained_share
        return to_host, to_gpu

    def compute(self) -> Iterator[Part]:
        """A micro-batch's activations, and the libraries' own memory."""
        size = self.activation_bytes
        yield self.part("gpu", f"{self.activations} and head tiles", size, "compute")
        if self.machine.gpu_memory is not None:
            yield self.part("gpu", "CUDA context and libraries", CUDA)
        else:
            # glibc keeps freed blocks below 32 MB: between a fifth and all of the activations, as measured.
            yield self.part("host", LEFT_BEHIND, size, "compute")
            more = CPU_WORK_BF16 if process.multiplies_bf16() else CPU_WORK_NO_BF16
            work = CPU_WORK + (more if self.options.precision == "bf16" else 0)
            yield self.part("host", "work space of the libraries", work, "compute")
        yield self.part("host", "processes", PROCESS)

    def disk(self) -> Iterator[Part]:
        count = checkpoints_at_once(self.options)
        several = f"{count} checkpoints" if count > 1 else "a checkpoint"
        yield self.part("disk", several, count * (ADAM + MASTER) * self.shape.trained)
        if self.moves:
            yield self.part("disk", f"the reference in {several}", count * FP32 * self.shape.all)
        yield self.part("disk", "the merged model", self.item * self.shape.model.parameters)


class ScoringFootprint(Footprint):
    """The memory of a frozen model that only scores, as in dpo_ds.evaluate. `config` is a policy's."""

    def __init__(self, shape: Shape, options: Planned, config: dict, machine: Machine):
        super().__init__(shape, options, reference_config(config), machine)

    def __iter__(self) -> Iterator[Part]:
        yield from self.weights()
        yield from self.live_parameters()
        yield from self.compute()

    @property
    def activations(self) -> str:
        return "activations of a forward pass"

    @property
    def activation_bytes(self) -> int:
        return self.scored_bytes(self.options.scoring_tokens)


def recomputed(options: Planned, model: Model) -> str:
    """How many of the layers recompute their activations, in words; empty if none does."""
    if options.recomputed_layers in (0, model.layers):
        return "recomputed" if options.recomputed_layers else ""
    return f"recomputed in {options.recomputed_layers} of {model.layers} layers"


def checkpoints_at_once(options: Options) -> int:
    """How many checkpoints are on the disk at the same time. An older one goes once a new one is whole. If all are
    kept, a full disk is noticed at a save: training goes on without it (--on_save_error)."""
    if not options.save_every or options.keep_last is None:
        return 1
    return options.keep_last + 1 + (options.keep_best is not None)


def longest_pair(options: Options) -> int:
    """The most tokens that a packed pair can have, once choose.decide has filled max_length."""
    assert options.max_length is not None
    return 2 * options.max_length - 1
