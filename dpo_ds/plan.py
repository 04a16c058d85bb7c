"""What a run takes of GPUs, host memory and disk, in bytes, before anything is downloaded or loaded.

    python -m dpo_ds.plan --model meta-llama/Meta-Llama-3-70B-Instruct --gpus 8 --gpu_memory 80 --host_memory 1000
    python -m dpo_ds.plan --all

The options of dpo_ds.train, and a machine; without one, this machine. Sizes are GiB, as nvidia-smi and free count.
dpo_ds.train makes the same plan first: it picks the tier, the micro-batch and whether activations are recomputed.

What DeepSpeed (0.19.8) holds where was read in its sources and is compared with what real runs hold and peak at, on CPU
(tests/test_plan.py); activations are counted on the model's own code (activations.py). Nothing has been compared with a
GPU yet.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_ds import activations, models, world
from dpo_ds.config import Options, parse_options
from dpo_ds.lora import is_target
from dpo_ds.lora import targets as lora_targets
from dpo_ds.scoring.twin import require_exact
from dpo_ds.tiers import fill_tier

GIB = 2**30
# What every process takes before a model is loaded.
CUDA = 2 * GIB  # per GPU: context, cuBLAS and NCCL workspaces; an estimate
PROCESS = int(0.8 * GIB)  # of the host, per rank: Python, torch, DeepSpeed, datasets; measured 0.35 to 0.7 on CPU
# Of a GPU's memory, this much is lost to the driver and to fragmentation; an estimate.
USABLE = 0.95
NODE_GPUS = 8
# Per rank on CPU, measured; products in bf16 take more.
CPU_WORK, CPU_WORK_BF16 = 70 * 2**20, 160 * 2**20
LEFT_BEHIND = "freed, but kept by the C library"
ADAM, MASTER = 8, 4  # bytes a trained parameter: two fp32 moments; the fp32 weight


@dataclass(frozen=True)
class Machine:
    """Where a run would take place. Sizes in bytes; `gpu_memory` None: no GPUs, the ranks share the host's memory."""

    ranks: int
    ranks_per_node: int
    gpu_memory: int | None
    host_memory: int  # of each node
    nvme: int = 0  # of each node

    @classmethod
    def of(cls, options: Options) -> "Machine":
        """This machine with as many ranks as the launcher says, where the options do not name another."""
        import torch

        ranks = options.gpus or world.from_environment().size
        per_node = min(ranks, NODE_GPUS) if options.gpus else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if ranks % per_node:
            raise ValueError(f"--gpus {ranks} are not whole nodes of {NODE_GPUS}: plan for a multiple of that")
        gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        host = host_memory()
        if gpu is None and (options.gpus or options.gpu_memory):  # a plan for another machine: A100s, as most have them
            gpu, host = 80 * GIB, 1000 * GIB
        gpu = int(options.gpu_memory * GIB) if options.gpu_memory else gpu
        host = int(options.host_memory * GIB) if options.host_memory else host
        nvme = int(options.nvme * GIB) if options.nvme is not None else nvme_free(options.nvme_path)
        return cls(ranks, per_node, gpu, host, nvme)

    @property
    def name(self) -> str:
        nodes = self.ranks // self.ranks_per_node
        host = f"{_gib(self.host_memory)} GiB of host memory" + (" each" if nodes > 1 else "")
        nvme = f", {_gib(self.nvme)} GiB of NVMe" if self.nvme else ""
        if self.gpu_memory is None:
            return f"{self.ranks} rank(s) without GPU, {host}{nvme}"
        where = f"{nodes} nodes of {self.ranks_per_node}" if nodes > 1 else f"{self.ranks}"
        return f"{where} GPU(s) of {_gib(self.gpu_memory)} GiB, {host}{nvme}"


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less by a control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [total]
    own = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    for line in own:
        number, controllers, path = line.split(":", 2)
        root, file = (
            ("/sys/fs/cgroup", "memory.max") if number == "0" else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        )
        if number == "0" or "memory" in controllers.split(","):
            # A limit may sit on any group above; in a container, the group's own path may not be there.
            folder = Path(root + path)
            for group in (folder, *folder.parents):
                if not str(group).startswith(root):
                    break
                if (group / file).is_file() and (text := (group / file).read_text().strip()).isdigit():
                    limits.append(int(text))
    return min(limits)


def nvme_free(path: str | None) -> int:
    if path is None:
        return 0
    folder = Path(path).expanduser().absolute()
    disk = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))  # the run makes the rest
    return disk.f_frsize * disk.f_bavail


# ---------------------------------------------------------------------------------------------------- what a run takes


WHEN = ("always", "compute and step", "compute", "step")


@dataclass(frozen=True)
class Part:
    """Bytes of one kind. `where`: gpu (each), host (each node), nvme (each node) or disk (the run's folder). `when`:
    one of WHEN; a micro-batch is computed, or the optimizer steps, not both at once."""

    where: str
    what: str
    bytes: int
    when: str = "always"


@dataclass(frozen=True)
class Plan:
    """What one choice of tier, micro-batch and recomputation takes."""

    model: models.Model
    options: Options  # ds_config, micro_batch_tokens, gradient_checkpointing are decided
    machine: Machine
    trained: int
    parts: tuple[Part, ...]

    def need(self, where: str) -> int:
        """Bytes at the worst moment."""
        here = [part for part in self.parts if part.where == where]
        always, both, compute, step = (sum(part.bytes for part in here if part.when == when) for when in WHEN)
        return always + both + max(compute, step)

    @property
    def room(self) -> dict[str, int]:
        machine = self.machine
        gpu = {} if machine.gpu_memory is None else {"gpu": int(USABLE * machine.gpu_memory)}
        return {**gpu, "host": machine.host_memory, "nvme": machine.nvme}

    @property
    def fits(self) -> bool:
        return all(self.need(where) <= room for where, room in self.room.items())

    @property
    def excess(self) -> float:
        """How many times over the scarcest room is asked for."""
        return max((self.need(where) / room for where, room in self.room.items() if room), default=0.0)

    @property
    def lacking(self) -> list[str]:
        names = {"gpu": "of GPU memory", "host": "of host memory", "nvme": "on --nvme_path"}
        return [
            f"{_gib(self.need(where))} GiB {names[where]} (there are {_gib(room)})"
            for where, room in self.room.items()
            if self.need(where) > room
        ]

    @property
    def how(self) -> str:
        recompute = ", activations recomputed" if self.options.gradient_checkpointing == "on" else ""
        lora = f"LoRA r={self.options.lora_r}, " if self.options.lora else ""
        return f"{lora}{self.options.ds_config}, micro-batches of {self.options.micro_batch_tokens} tokens{recompute}"

    def table(self) -> str:
        """The parts and their sums in GiB, as Markdown."""
        lines = [
            f"{self.model.name} ({self.model.parameters:,} parameters, {self.trained:,} trained) on "
            f"{self.machine.name}: {self.how}",
            "",
            "| where | what | GiB | when |",
            "|---|---|---:|---|",
        ]
        for part in self.parts:
            lines.append(f"| {part.where} | {part.what} | {_gib(part.bytes)} | {part.when} |")
        for where in dict.fromkeys(part.where for part in self.parts):
            room = f" of {_gib(self.room[where])}" if where in self.room else ""
            lines.append(f"| **{where}** | **at most** | **{_gib(self.need(where))}**{room} | |")
        return "\n".join(lines)

    def facts(self) -> dict:
        """For --json."""
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "trained": self.trained,
            "machine": dataclasses.asdict(self.machine),
            "tier": self.options.ds_config,
            "micro_batch_tokens": self.options.micro_batch_tokens,
            "gradient_checkpointing": self.options.gradient_checkpointing == "on",
            "fits": self.fits,
            "need": {where: self.need(where) for where in ("gpu", "host", "nvme", "disk")},
            "room": self.room,
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }


def _gib(size: int) -> str:
    """Three figures, no more: what is known."""
    value = size / GIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


class Footprint:
    """A model with its adapters, as numbers: parameters by what ZeRO does with them, activations by the token."""

    def __init__(self, model: models.Model, options: Options):
        require_exact(model.name, model.config, model.trust_remote_code)
        self.model, self.dtype = model, models.torch_dtype(options.precision)
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
        # ZeRO-3 gathers a module's own parameters at a time, and those of a block of experts all at once.
        own = (sum(p.numel() for p in module.parameters(recurse=False)) for module in skeleton.modules())
        self.largest_gathered = max(model.largest_block, *own)
        self.counter = activations.Counter(model.config, options, self.dtype, model.is_moe)

    def small(self, threshold: int) -> int:
        """Parameters in tensors of at most `threshold`: ZeRO-3 keeps those whole on every rank."""
        return sum(size for size, _ in self.sizes if size <= threshold)

    @functools.cache  # noqa: B019 (a plan's few footprints live as long as the process)
    def activations(self, tokens: int, pair_tokens: int, recompute: bool) -> int:
        return self.counter.count(tokens, pair_tokens, recompute).bytes


def parts(footprint: Footprint, options: Options, config: dict, machine: Machine) -> Iterator[Part]:
    """What a filled DeepSpeed config holds where. Micro-batch and gradient_checkpointing must be decided."""
    zero = config["zero_optimization"]
    stage, ranks, per_node = zero["stage"], machine.ranks, machine.ranks_per_node
    item = footprint.dtype.itemsize
    accumulation = 4 if config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else item
    optimizer_at = (zero.get("offload_optimizer") or {}).get("device", "gpu")
    weights_at = (zero.get("offload_param") or {}).get("device", "gpu") if stage == 3 else "gpu"
    share = math.ceil(footprint.all / ranks) if stage == 3 else footprint.all
    mine = math.ceil(footprint.trained / ranks) if stage else footprint.trained

    def part(where: str, what: str, size: float, when: str = "always") -> Part:
        where = {"cpu": "host"}.get(where, where)
        if where == "gpu" and machine.gpu_memory is None:
            where = "host"
        return Part(where, what, int(size) * (1 if where in ("gpu", "disk") else per_node), when)

    def pinned(size: float) -> int:
        """Page-locked host memory, which torch rounds up to a power of two unless told not to (world.join tells it)."""
        rounded = machine.gpu_memory is not None and not world.exact_pinned_memory()
        return 2 ** math.ceil(math.log2(size)) if rounded and size > 1 else int(size)

    yield part(
        weights_at, f"weights ({options.precision})", pinned(item * share) if weights_at == "cpu" else item * share
    )
    if weights_at == "nvme":
        swap = zero["offload_param"]
        yield part("host", "buffers of the weights", item * swap.get("buffer_count", 5) * swap["buffer_size"])
    if options.reference == "live":
        yield part(weights_at, "the reference's weights", item * (share if stage == 3 else footprint.all))
    masters = stage > 0 or options.precision == "bf16"
    state = ADAM + (MASTER if masters else 0)
    if optimizer_at == "gpu":
        yield part("gpu", "Adam's moments" + (" and fp32 weights" if masters else ""), state * mine)
    else:
        yield from offloaded_optimizer(part, pinned, optimizer_at, zero, mine)
    yield from gradients(part, pinned, footprint, config, options, optimizer_at, mine, accumulation)
    if stage == 3:
        small = footprint.small(zero.get("stage3_param_persistence_threshold", 100_000))
        yield part("gpu", "small parameters kept whole", item * small * (ranks > 1 or weights_at != "gpu"))
        ahead = zero.get("stage3_max_live_parameters", 10**9) if zero.get("stage3_max_reuse_distance", 1) else 0
        live = min(footprint.all, ahead + footprint.largest_gathered)
        gathered = ranks > 1 or weights_at != "gpu"  # a single rank uses its partition as it is
        yield part("gpu", "gathered parameters", item * live * gathered, "compute")
    if stage:
        buckets = 2 if zero.get("overlap_comm", stage == 3) else 1
        yield part("gpu", "reduction buckets", buckets * item * zero.get("reduce_bucket_size", 5 * 10**8), "compute")
        if ranks > 1:
            yield part("gpu", "the largest gradient, reduced", item * footprint.largest_trained, "compute")
    recompute = options.gradient_checkpointing == "on"
    pair_tokens = min(longest_pair(options), options.micro_batch_tokens)
    size = footprint.activations(options.micro_batch_tokens, pair_tokens, recompute)
    yield part("gpu", "activations, " + ("recomputed" if recompute else "kept") + ", and head tiles", size, "compute")
    if machine.gpu_memory is not None:
        yield part("gpu", "CUDA context and libraries", CUDA)
    else:
        # glibc keeps freed blocks below 32 MB for later: measured, a fifth to the whole of what comes and goes.
        yield part("host", LEFT_BEHIND, size, "compute")
        bf16 = CPU_WORK_BF16 if options.precision == "bf16" else 0
        yield part("host", "work space of the libraries", CPU_WORK + bf16, "compute")
    yield part("host", "processes", PROCESS)
    checkpoint = (ADAM + MASTER) * footprint.trained if masters else ADAM * footprint.trained
    frozen = footprint.all - footprint.trained if stage == 3 else footprint.all
    yield part("disk", "a checkpoint", checkpoint + item * frozen)
    yield part("disk", "the merged model", item * footprint.model.parameters)


def offloaded_optimizer(part, pinned, where: str, zero: dict, mine: int) -> Iterator[Part]:
    groups = _split(mine, int(zero.get("sub_group_size", 10**9)))
    if where == "nvme":
        yield part("nvme", "Adam's moments, fp32 weights and gradients", (ADAM + MASTER + 4) * mine)
        # A group at a time comes to the host: moments, weights and gradients.
        yield part("host", "the group being updated", pinned((ADAM + MASTER + 4) * groups[0]))
    else:
        yield part("host", "Adam's moments and fp32 weights", sum(3 * pinned(4 * size) for size in groups))
        yield part("host", "fp32 gradients", sum(pinned(4 * size) for size in groups))


def gradients(
    part, pinned, footprint: Footprint, config: dict, options: Options, optimizer_at: str, mine: int, accumulation: int
) -> Iterator[Part]:
    """Gradients as they wait for the step."""
    zero = config["zero_optimization"]
    stage = zero["stage"]
    if stage == 0:
        yield part("gpu", "gradients", 4 * mine, "compute and step")
    elif stage == 1:
        yield part("gpu", "gradients", footprint.dtype.itemsize * footprint.trained, "compute and step")
    else:
        at = "gpu" if optimizer_at == "gpu" else "host"
        when = "always" if stage == 3 or at == "host" else "compute and step"
        size = accumulation * mine
        yield part(at, "gradients, accumulated", pinned(size) if at == "host" else size, when)
    if optimizer_at == "gpu" and stage:
        group = min(mine, int(zero.get("sub_group_size", 10**9))) if stage == 3 else mine
        yield part("gpu", "fp32 gradients of the update", 4 * group, "step")
    if config["optimizer"]["params"].get("torch_adam"):
        # torch's own AdamW makes two temporaries of the tensor that it updates; a partition is one tensor.
        group = footprint.largest_trained if stage == 0 else min(mine, int(zero.get("sub_group_size", 10**9)))
        yield part("gpu", "AdamW's temporaries", 8 * group, "step")


def _split(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])


# ------------------------------------------------------------------------------------------------------- what to choose


def longest_pair(options: Options) -> int:
    """The most tokens that a packed pair can have."""
    return 2 * options.max_length - 1


def decide(options: Options, model: models.Model, on_gpu: bool) -> Options:
    """Fills precision, learning rate and length, which follow from the model and the kind of machine.

    Raises ValueError for what the model cannot do.
    """
    changes = {}
    if options.precision == "auto":
        changes["precision"] = "bf16" if on_gpu else "fp32"
    if options.learning_rate is None:
        changes["learning_rate"] = model.size_class.learning_rate * (10 if options.lora else 1)
    if options.max_length is None:
        changes["max_length"] = min(1024, model.context or 1024)
    elif model.context is not None and options.max_length > model.context:
        raise ValueError(f"--max_length {options.max_length} is above the model's context of {model.context}: lower it")
    if options.router_aux_loss_coef == "model" or float(options.router_aux_loss_coef) > 0:
        changes["router_aux_loss_coef"] = _router_coefficient(options.router_aux_loss_coef, model)
    return options.replace(**changes)


def _router_coefficient(wanted: str, model: models.Model) -> str:
    own = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if own is None:
        raise ValueError(
            f"--router_aux_loss_coef {wanted}: {model.name} is no mixture of experts with such a loss: leave it out"
        )
    return str(own) if wanted == "model" else wanted


def candidates(options: Options, model: models.Model, machine: Machine) -> list[str]:
    """The tiers to try, the fastest first: the class's own, without offload before with it, NVMe last."""
    if options.ds_config != "auto":
        return [options.ds_config]
    own = model.lora_tier if options.lora else model.tier
    order = [own]
    if not options.lora and own.startswith("zero3_offload") and machine.gpu_memory is not None:
        order.insert(0, "zero3_standard")
    if own in ("zero0_debug", "zero2_small"):
        order += ["zero2_small", "zero3_standard", "zero3_offload_specialised"]
    if own == "zero3_standard":
        order += ["zero3_offload_specialised"]
    if machine.nvme and not options.lora:  # adapters' state is small: it is never what lacks room
        order.append("zero3_nvme_large")
    return list(dict.fromkeys(order))


@functools.lru_cache(maxsize=4)
def _footprint(model: str, trust_remote_code: bool, precision: str, lora: bool, lora_r: int, lora_targets: str):
    options = Options(model=model, precision=precision, lora=lora, lora_r=lora_r, lora_targets=lora_targets)
    return Footprint(models.known_model(model, trust_remote_code), options)


def choose(options: Options, machine: Machine) -> Plan:
    """The first tier that fits, with the micro-batch that fills the GPU; if none does, the one that lacks least."""
    model = models.known_model(options.model, options.trust_remote_code)
    options = decide(options, model, machine.gpu_memory is not None)
    lora = (options.lora, options.lora_r, options.lora_targets) if options.lora else (False, 1, "")
    footprint = _footprint(options.model, options.trust_remote_code, options.precision, *lora)
    plans = []
    for tier in candidates(options, model, machine):
        plan = fill(footprint, options.replace(ds_config=tier), machine)
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.excess)


def fill(footprint: Footprint, options: Options, machine: Machine) -> Plan:
    """The plan of one tier: activations kept if a step's share of pairs fits so, else recomputed, in the largest
    micro-batch that fits."""
    somewhere = options if options.nvme_path else options.replace(nvme_path="/nvme")  # a plan needs no real one
    config = fill_tier(options.ds_config, somewhere, footprint.model, machine.ranks, machine.gpu_memory is not None)

    def plan(tokens: int, checkpointing: str) -> Plan:
        decided = options.replace(micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
        return Plan(
            footprint.model, decided, machine, footprint.trained, tuple(parts(footprint, decided, config, machine))
        )

    pair = longest_pair(options)
    if options.micro_batch_tokens is not None:
        most = least = options.micro_batch_tokens
    elif machine.gpu_memory is None:
        most, least = max(pair, 4096), pair
    else:
        most, least = pair * min(math.ceil(options.global_batch_pairs / machine.ranks), max(1, 65536 // pair)), pair
    asked = options.gradient_checkpointing
    if asked == "auto":
        if not (smallest := plan(least, "on")).fits:
            return smallest
        asked = "off" if plan(most, "off").fits else "on"
    return _largest(lambda tokens: plan(tokens, asked), least, most)


def _largest(plan: Callable[[int], Plan], least: int, most: int) -> Plan:
    """The plan with the most tokens that fits, to 1024; with the least if none does."""
    if (top := plan(most)).fits or most == least or not (bottom := plan(least)).fits:
        return top if top.fits or most == least else bottom
    # What is needed grows in a straight line, or nearly so.
    part = min(
        (room - bottom.need(where)) / (top.need(where) - bottom.need(where))
        for where, room in top.room.items()
        if top.need(where) > bottom.need(where)
    )
    steps = int(part * (most - least) / 1024)
    while steps > 0:
        if (found := plan(least + 1024 * steps)).fits:
            return found
        steps -= 1
    return bottom


# ---------------------------------------------------------------------------------------------------- what to say of it

PLENTY = 10**6 * GIB
SHORTEST = 128  # tokens of a row worth training on


@functools.lru_cache(maxsize=4)
def for_run(options: Options) -> Plan:
    """The plan of a run on the machine that `options` names, this one by default.

    Raises ValueError if it does not fit, in one line with what would, unless --plan is off.
    """
    machine = Machine.of(options)
    if options.plan == "off":
        return choose(
            _by_class(options, machine),
            dataclasses.replace(machine, gpu_memory=machine.gpu_memory and PLENTY, host_memory=PLENTY),
        )
    plan = choose(options, machine)
    if not plan.fits:
        raise ValueError(refusal(plan, options))
    return plan


def _by_class(options: Options, machine: Machine) -> Options:
    """What a run takes without a plan."""
    on_gpu = machine.gpu_memory is not None
    model = models.known_model(options.model, options.trust_remote_code)
    options = decide(options, model, on_gpu)
    tier = model.lora_tier if options.lora else model.tier
    return options.replace(
        ds_config=tier if options.ds_config == "auto" else options.ds_config,
        micro_batch_tokens=options.micro_batch_tokens or max(longest_pair(options), 8192 if on_gpu else 4096),
        gradient_checkpointing={"auto": "on" if model.parameters >= 1e9 else "off"}.get(
            options.gradient_checkpointing, options.gradient_checkpointing
        ),
    )


def refusal(plan: Plan, options: Options) -> str:
    """One line: what lacks, and the cheapest changes that would make it fit."""
    changes = [f"{what}: {found.how}, {_needs(found)}" for what, found in remedies(options, plan.machine)]
    instead = f"; what would fit: {'; '.join(changes)}" if changes else ""
    return (
        f"--model {plan.model.name} does not fit {plan.machine.name}: with {plan.how} it needs "
        f"{' and '.join(plan.lacking)}{instead} (python -m dpo_ds.plan shows the parts; --plan off starts all the same)"
    )


def _needs(plan: Plan) -> str:
    names = {"gpu": "GiB a GPU", "host": "GiB of host memory", "nvme": "GiB of NVMe"}
    return ", ".join(f"{_gib(plan.need(where))} {names[where]}" for where in plan.room if plan.need(where))


def remedies(options: Options, machine: Machine) -> Iterator[tuple[str, Plan]]:
    """Changes, one at a time and the cheapest first, that would make the run fit."""
    on_gpu = machine.gpu_memory is not None

    def trial(changed: Options, where: Machine) -> Plan | None:
        plan = choose(changed, where)
        return plan if plan.fits else None

    if not options.lora and (found := trial(options.replace(lora=True), machine)):
        yield "--lora", found
    if trial(options.replace(max_length=SHORTEST), machine):
        lengths = (2**n * SHORTEST for n in range(6, -1, -1) if 2**n * SHORTEST < (options.max_length or 1024))
        yield next(
            (f"--max_length {length}", found)
            for length in lengths
            if (found := trial(options.replace(max_length=length), machine))
        )
    if on_gpu and options.ds_config == "auto":
        if not machine.nvme and (found := trial(options, dataclasses.replace(machine, nvme=PLENTY))):
            yield "--nvme_path on a local disk", found
        if found := trial(options, dataclasses.replace(machine, host_memory=PLENTY)):
            yield "more host memory", found
    for factor in (2, 4, 8) if on_gpu else ():
        more = dataclasses.replace(machine, ranks=factor * machine.ranks)
        more = dataclasses.replace(more, ranks_per_node=more.ranks if more.ranks <= NODE_GPUS else NODE_GPUS)
        if found := trial(options, more):
            yield f"{more.ranks} GPUs", found
            break
    if not on_gpu:
        server = Machine(NODE_GPUS, NODE_GPUS, 80 * GIB, PLENTY)
        for changed in (options, options.replace(lora=True)):
            if found := trial(changed.replace(precision="auto"), server):
                yield "on 8 GPUs of 80 GiB", found


def everything() -> str:
    """The twelve models on 8 A100s with 80 or 40 GiB each, and 1 or 2 TB of host memory, as Markdown."""
    lines = [
        "| model | | " + " | ".join(f"{gpu} GiB, {host} TB" for gpu in (80, 40) for host in (1, 2)) + " |",
        "|---|---|" + "---|" * 4,
    ]
    for name in models.table():
        for lora in (False, True):
            cells = []
            for gpu in (80, 40):
                for host in (1, 2):
                    machine = Machine(NODE_GPUS, NODE_GPUS, gpu * GIB, host * 1000 * GIB)
                    cells.append(_cell(choose(Options(model=name, lora=lora), machine)))
            lines.append(f"| `{name}` | {'LoRA' if lora else 'full'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(plan: Plan) -> str:
    if not plan.fits:
        return f"no: {', '.join(plan.lacking)}"
    recompute = ", recomputed" if plan.options.gradient_checkpointing == "on" else ""
    need = " + ".join(f"{_gib(plan.need(where))}" for where in ("gpu", "host"))
    return f"`{plan.options.ds_config}` {plan.options.micro_batch_tokens:,} tokens{recompute}: {need}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    own, rest = parser.parse_known_args(argv)
    with world.user_errors():
        world.quiet_start()
        if own.all:
            print(everything())
            return
        options = parse_options(rest, "plan")
        plan = choose(options, Machine.of(options))
        print(json.dumps(plan.facts(), indent=1) if own.json else plan.table())
        if not plan.fits:
            raise ValueError(refusal(plan, options))


if __name__ == "__main__":
    world.run_main(main)
