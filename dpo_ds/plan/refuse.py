"""Makes a run's plan, or refuses it: one line with what is missing and the cheapest changes that would make it fit."""

import dataclasses
from collections.abc import Iterator

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.plan.choose import PLENTY, choose, decide_by_class
from dpo_ds.plan.machine import GIB, NODE_GPUS, Machine, gib
from dpo_ds.plan.plan import Plan

SHORTEST = 128  # tokens: a shorter --max_length is not suggested


def for_run(options: Options) -> Plan:
    """The plan of a run on the machine that `options` describe, by default this one.

    Raises UserError if it does not fit, unless --plan is off. The message says what would fit.
    """
    machine = Machine.of(options)
    if options.plan == "off":
        return choose(
            decide_by_class(options, machine),
            dataclasses.replace(machine, gpu_memory=machine.gpu_memory and PLENTY, host_memory=PLENTY),
        )
    plan = choose(options, machine)
    if not plan.fits:
        raise UserError(refusal(plan, options))
    return plan


def refusal(plan: Plan, options: Options) -> str:
    """One line: what is missing, and the cheapest changes that would make it fit."""
    changes = [f"{what}: {found.how}, {_needs(found)}" for what, found in remedies(options, plan.machine)]
    instead = f"; what would fit: {'; '.join(changes)}" if changes else ""
    return (
        f"--model {plan.model.name} does not fit {plan.machine.name}: with {plan.how} it needs "
        f"{' and '.join(plan.lacking)}{instead} (python -m dpo_ds.plan shows the parts; --plan off starts anyway)"
    )


def _needs(plan: Plan) -> str:
    names = {"gpu": "GiB a GPU", "host": "GiB of host memory", "nvme": "GiB of NVMe"}
    return ", ".join(f"{gib(plan.need(where))} {names[where]}" for where in plan.available if plan.need(where))


def remedies(options: Options, machine: Machine) -> Iterator[tuple[str, Plan]]:
    """Yields single changes that would make the run fit, the cheapest first, each with its plan."""
    on_gpu = machine.gpu_memory is not None

    def trial(changed: Options, where: Machine) -> Plan | None:
        try:
            plan = choose(changed, where)
        except UserError:  # the user's own ds_config does not allow this change
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
