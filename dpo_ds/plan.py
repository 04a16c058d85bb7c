"""What a run takes of GPUs, host memory and disk, in bytes, before anything is downloaded or loaded.

    python -m dpo_ds.plan --model meta-llama/Meta-Llama-3-70B-Instruct --gpus 8 --gpu_memory 80 --host_memory 1000
    python -m dpo_ds.plan --all

The options of dpo_ds.train, and a machine; without one, this machine. Sizes are GiB, as nvidia-smi and free count.
dpo_ds.train makes the same plan first: it picks the tier, the micro-batch and whether activations are recomputed.

What a choice holds where is in footprint.py; this file makes the choice, and says what would fit where nothing does.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpo_ds import models, world
from dpo_ds.config import Options, parse_options
from dpo_ds.footprint import WHEN, Footprint, Part, Shape, longest_pair
from dpo_ds.machine import GIB, NODE_GPUS, Machine, gib
from dpo_ds.tiers import fill_tier

# Of a GPU's memory, the rest is lost to the driver and to fragmentation; an estimate.
USABLE = 0.95
PLENTY = 10**6 * GIB
SHORTEST = 128  # tokens of a row worth training on


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
            f"{gib(self.need(where))} GiB {names[where]} (there are {gib(room)})"
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
            lines.append(f"| {part.where} | {part.what} | {gib(part.bytes)} | {part.when} |")
        for where in dict.fromkeys(part.where for part in self.parts):
            room = f" of {gib(self.room[where])}" if where in self.room else ""
            lines.append(f"| **{where}** | **at most** | **{gib(self.need(where))}**{room} | |")
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


# ------------------------------------------------------------------------------------------------------- what to choose


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
def _shape(model: str, trust_remote_code: bool, precision: str, lora: bool, lora_r: int, lora_targets: str) -> Shape:
    options = Options(model=model, precision=precision, lora=lora, lora_r=lora_r, lora_targets=lora_targets)
    return Shape(models.known_model(model, trust_remote_code), options)


def choose(options: Options, machine: Machine) -> Plan:
    """The first tier that fits, with the micro-batch that fills the GPU; if none does, the one that lacks least."""
    model = models.known_model(options.model, options.trust_remote_code)
    options = decide(options, model, machine.gpu_memory is not None)
    lora = (options.lora, options.lora_r, options.lora_targets) if options.lora else (False, 1, "")
    shape = _shape(options.model, options.trust_remote_code, options.precision, *lora)
    plans = []
    for tier in candidates(options, model, machine):
        plan = fill(shape, options.replace(ds_config=tier), machine)
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.excess)


def fill(shape: Shape, options: Options, machine: Machine) -> Plan:
    """The plan of one tier: activations kept if a step's share of pairs fits so, else recomputed, in the largest
    micro-batch that fits."""
    somewhere = options
    if machine.nvme and not options.nvme_path:  # another machine's, whose folders nobody has named
        somewhere = options.replace(nvme_path="/nvme")
    config = fill_tier(options.ds_config, somewhere, shape.model, machine.ranks, machine.gpu_memory is not None)

    def plan(tokens: int, checkpointing: str) -> Plan:
        decided = options.replace(micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
        return Plan(shape.model, decided, machine, shape.trained, tuple(Footprint(shape, decided, config, machine)))

    pair = longest_pair(options)
    if options.micro_batch_tokens is not None:
        most = least = options.micro_batch_tokens
    elif machine.gpu_memory is None:
        most, least = tokens_on_cpu(pair), pair
    else:
        most, least = pair * min(math.ceil(options.global_batch_pairs / machine.ranks), max(1, 65536 // pair)), pair
    asked = options.gradient_checkpointing
    if asked == "auto":
        if not (smallest := plan(least, "on")).fits:
            return smallest
        asked = "off" if plan(most, "off").fits else "on"
    return _largest(lambda tokens: plan(tokens, asked), least, most)


def tokens_on_cpu(longest_pair: int) -> int:
    """A micro-batch's tokens: more would make products no faster and take memory (benchmarks/README.md)."""
    return max(longest_pair, 1024)


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
        micro_batch_tokens=options.micro_batch_tokens
        or (max(longest_pair(options), 8192) if on_gpu else tokens_on_cpu(longest_pair(options))),
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
    return ", ".join(f"{gib(plan.need(where))} {names[where]}" for where in plan.room if plan.need(where))


def remedies(options: Options, machine: Machine) -> Iterator[tuple[str, Plan]]:
    """Changes, one at a time and the cheapest first, that would make the run fit."""
    on_gpu = machine.gpu_memory is not None

    def trial(changed: Options, where: Machine) -> Plan | None:
        try:
            plan = choose(changed, where)
        except ValueError:  # a change that the user's own ds_config does not go with
            return None
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
    need = " + ".join(f"{gib(plan.need(where))}" for where in ("gpu", "host"))
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
