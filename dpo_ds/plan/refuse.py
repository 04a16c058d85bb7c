"""Makes a run's plan, or refuses it: one line with what is missing and the cheapest change that would make it fit."""

import dataclasses
from collections.abc import Callable, Iterator

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.plan import seconds
from dpo_ds.plan.choose import PLENTY, Purpose, choose, decide_by_class
from dpo_ds.plan.footprint import Footprint
from dpo_ds.plan.machine import GIB, NODE_GPUS, Machine, gib
from dpo_ds.plan.plan import Plan

NO_SPEEDS = (
    "The speeds of this machine are not known, so its time is not estimated: name one with --machine, or let "
    "dpo_ds.train measure with --plan measure."
)
SHORTEST = 128  # tokens: a shorter --max_length is not suggested


def for_run(options: Options, purpose: Purpose = Footprint) -> Plan:
    """The plan of a run on the machine that `options` describe, by default this one. purpose: training, or scoring.

    Raises UserError if it does not fit, unless --plan is off. The message says what would fit.
    """
    machine = Machine.of(options)
    if options.plan == "off":
        return choose(
            decide_by_class(options, machine),
            dataclasses.replace(machine, gpu_memory=machine.gpu_memory and PLENTY, host_memory=PLENTY),
            purpose,
        )
    plan = choose(options, machine, purpose)
    if not plan.fits:
        raise UserError(refusal(plan, options, purpose) + "; --plan only shows the table, --plan off starts anyway")
    return plan


def show(options: Options, say: Callable[[str], None], purpose: Purpose = Footprint) -> Plan:
    """Says the plan's table and, if it does not fit, every single change that would make it fit. Then raises UserError
    if it does not fit."""
    plan = choose(options, Machine.of(options), purpose)
    lines = [described(plan)]
    if not plan.fits and (found := list(remedies(options, plan.machine, purpose))):
        lines += [
            "",
            "It would fit with one of these changes:",
            *(f"- {change}: {other.how}; {_needs(other)}" for change, other in found),
        ]
    say("\n".join(lines))
    if not plan.fits:
        raise UserError(refusal(plan, options, purpose))
    return plan


def described(plan: Plan) -> str:
    """The plan and, where it can be estimated, how long its run takes."""
    found = seconds.estimate(plan) if plan.fits else None
    if found is not None:
        return f"{plan.as_markdown()}\n\n{seconds.as_markdown(found)}"
    options = plan.options
    wanted = plan.machine.gpu_memory is not None or options.pair_tokens or options.price_per_gpu_hour is not None
    if plan.fits and plan.trained and wanted:
        return f"{plan.as_markdown()}\n\n{NO_SPEEDS}"
    return plan.as_markdown()


def refusal(plan: Plan, options: Options, purpose: Purpose = Footprint) -> str:
    """One line: what is missing where, and the cheapest change that would make it fit."""
    change, other = next(remedies(options, plan.machine, purpose), (None, plan))
    remedy = f"; it would fit with {change} ({_needs(other)})" if change else ""
    return f"--model {plan.model.name} does not fit {plan.machine.devices}: {' and '.join(_missing(plan))}{remedy}"


def _missing(plan: Plan) -> Iterator[str]:
    places = {"gpu": "on each GPU", "host": "of host memory", "nvme": "on --nvme_path"}
    for where, available in plan.available.items():
        need = plan.need(where)
        if need > available:
            node = " in each node" if where != "gpu" and plan.machine.nodes > 1 else ""
            short = f"{gib(need - available)} GiB {places[where]}{node} are missing"
            yield f"{short} (it needs {gib(need)}, there are {gib(available)})"


def _needs(plan: Plan) -> str:
    names = {"gpu": "GiB a GPU", "host": "GiB of host memory", "nvme": "GiB of NVMe"}
    return ", ".join(f"{gib(plan.need(where))} {names[where]}" for where in plan.available if plan.need(where))


def remedies(options: Options, machine: Machine, purpose: Purpose = Footprint) -> Iterator[tuple[str, Plan]]:
    """Yields single changes that would make the run fit, the cheapest first, each with its plan."""
    on_gpu, trains = machine.gpu_memory is not None, purpose is Footprint

    def trial(changed: Options, where: Machine) -> Plan | None:
        try:
            plan = choose(changed, where, purpose)
        except UserError:  # the user's own ds_config does not allow this change
            return None
        return plan if plan.fits else None

    if trains and not options.lora and (found := trial(options.replace(lora=True), machine)):
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
        with_lora = [("--lora on ", options.replace(lora=True))] if trains else []
        for flag, changed in [("", options), *with_lora]:
            if found := trial(changed.replace(precision="auto"), server):
                yield f"{flag}8 GPUs of 80 GiB", found
