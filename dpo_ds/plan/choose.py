"""Chooses tier, micro-batch and recomputation: the first tier that fits, with the largest micro-batch that fits.

footprint.py computes the memory that a choice needs; refuse.py writes the message if nothing fits.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dpo_ds.config import Options
from dpo_ds.engine.check_config import AUTO
from dpo_ds.engine.forms import GPU, GPU_BF16, HOST, OWN, known, on_host
from dpo_ds.engine.tiers import GRAD_SUMS, load_tier
from dpo_ds.errors import UserError
from dpo_ds.losses.table import reads_reference
from dpo_ds.models.adapter import find_adapter
from dpo_ds.models.find import known_model
from dpo_ds.models.model import Model
from dpo_ds.plan import seconds
from dpo_ds.plan.footprint import Footprint, ScoringFootprint, Shape, filled, longest_pair, shape_of
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.plan.plan import Plan
from dpo_ds.scoring.fuse import parts

PLENTY = 10**6 * GIB
# Fraction of a GPU's memory that is used to recompute less. The rest is left for what the plan has wrong: a run that
# recomputes a layer more is a little slower, but one that runs out of memory ends.
FOR_SPEED = 0.9
# How much faster a step must be, by the estimate, to take smaller micro-batches than fit.
GAIN = 1.05

MOST_SCORED = 2**16  # tokens of a micro-batch without gradients: a GPU is busy with less

Purpose = type[Footprint]  # what a plan is for: training, or with ScoringFootprint scoring alone


def decide(options: Options, model: Model, on_gpu: bool) -> Options:
    """Fills precision, learning rate, length, reference and an adapter's shape from the model, the kind of machine and
    the losses.

    Raises UserError for options that the model or one another do not allow.
    """
    changes: dict[str, Any] = {}
    if options.adapter is not None:
        adapter = find_adapter("--adapter", options.adapter, options.model, options.trust_remote_code)
        changes |= {"lora_r": adapter.r, "lora_alpha": adapter.alpha, "lora_targets": adapter.targets}
    if options.reference == "auto":
        changes["reference"] = "precomputed" if reads_reference(options) else "none"
    if options.precision == "auto":
        changes["precision"] = "bf16" if on_gpu else "fp32"
    if options.gradients == GPU_BF16 and changes.get("precision", options.precision) == "fp32":
        raise UserError(f"--gradients {GPU_BF16} sums in bf16, but this run computes in fp32: say --gradients {GPU}")
    if options.fuse == "auto":
        changes["fuse"] = "on" if on_gpu and parts(model.skeleton) else "off"
    elif options.fuse == "on" and not parts(model.skeleton):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"--fuse on knows the layers of the twelve models that python -m dpo_ds.models lists, but not those of "
            f"{kind}: leave it out"
        )
    if options.learning_rate is None:
        changes["learning_rate"] = model.size_class.learning_rate * (10 if options.lora else 1)
    if options.recomputed_layers is not None and options.recomputed_layers > model.layers:
        raise UserError(f"--recomputed_layers {options.recomputed_layers}: the model has {model.layers} layers")
    changes["max_length"] = model.max_length(options.max_length)
    if options.pair_tokens is not None and options.pair_tokens > (longest := 2 * changes["max_length"] - 1):
        raise UserError(
            f"--pair_tokens {options.pair_tokens}: no pair is longer than {longest} tokens, by --max_length"
        )
    if options.router_aux_loss_coef == "model" or float(options.router_aux_loss_coef) > 0:
        changes["router_aux_loss_coef"] = _router_coefficient(options.router_aux_loss_coef, model)
    return options.replace(**changes)


def _router_coefficient(wanted: str, model: Model) -> str:
    own = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if own is None:
        raise UserError(
            f"--router_aux_loss_coef {wanted}: {model.name} is no mixture of experts with a router loss: leave it out"
        )
    return str(own) if wanted == "model" else wanted


def candidates(options: Options, model: Model, machine: Machine, purpose: Purpose = Footprint) -> list[str]:
    """The tiers to try, the fastest first: without offload, then the size class's own, then more offload, NVMe last.
    For scoring: the whole model on every rank, then a share of it."""
    if options.ds_config != "auto":
        return [options.ds_config]
    if purpose is ScoringFootprint:
        return ["zero0_debug", "zero3_standard", *(["zero3_nvme_large"] if machine.nvme else [])]
    own = model.lora_tier if options.lora else model.tier
    order = [own]
    if not options.lora and own.startswith("zero3_offload") and machine.gpu_memory is not None:
        order.insert(0, "zero3_standard")
    if own in ("zero0_debug", "zero2_small"):
        order += ["zero2_small", "zero3_standard", "zero3_offload_specialised"]
    if own == "zero3_standard":
        order += ["zero3_offload_specialised"]
    if machine.nvme and not options.lora:  # adapters' state is small, so NVMe would not help
        order.append("zero3_nvme_large")
    return list(dict.fromkeys(order))


def choose(options: Options, machine: Machine, purpose: Purpose = Footprint) -> Plan:
    """The plan of the first tier that fits, with its largest micro-batch; if none fits, the plan of least excess."""
    model = known_model(options.model, options.trust_remote_code)
    options = decide(options, model, machine.gpu_memory is not None)
    shape = shape_of(options)
    plans: list[Plan] = []
    for tier in candidates(options, model, machine, purpose):
        plan = fill(shape, options.replace(ds_config=tier), machine, purpose)
        if plan.fits:
            others = [f"{other.options.ds_config} would need {' and '.join(other.lacking)}" for other in plans]
            if options.scoring_tokens is None:
                plan = with_scoring(plan, shape)
            return dataclasses.replace(plan, reasons=(*others, *plan.reasons))
        plans.append(plan)
    return min(plans, key=lambda plan: plan.excess)


def fill(shape: Shape, options: Options, machine: Machine, purpose: Purpose = Footprint) -> Plan:
    """The plan of one tier. Of the forms of its gradients that fit, it has the first that recomputes nothing, else the
    first; if none fits, the one of least excess."""
    forms = forms_of(options, shape.model, machine)
    plans = [fill_form(shape, options.replace(gradients=form), machine, purpose) for form in forms]
    if fitting := [plan for plan in plans if plan.fits]:
        return next((plan for plan in fitting if plan.options.gradient_checkpointing == "off"), fitting[0])
    return min(plans, key=lambda plan: plan.excess)


def forms_of(options: Options, model: Model, machine: Machine) -> list[str]:
    """The forms of a tier's gradients to try, the one with the least host memory first.

    On CPU, the "GPU" is the host, where the blocks that gradients pass through would only take memory. With --plan off
    the memory is unknown. Then the form is `host`, which takes no more of the host or the GPU than DeepSpeed's own.

    Raises UserError for a form that the tier rules out.
    """
    config = filled(options, model, machine)
    if not (on_host(config) and known()):
        return [OWN]
    in_fp32 = options.precision == "fp32" or (config.get("data_types") or {}).get(GRAD_SUMS) == "fp32"
    if options.gradients == HOST and not in_fp32:
        raise UserError(
            f"--gradients {HOST} sums in fp32, but --ds_config {options.ds_config} sums in bf16: set "
            f'data_types.{GRAD_SUMS} to "fp32", or say --gradients {GPU}'
        )
    if options.gradients != "auto":
        return [options.gradients]
    if in_fp32 and (machine.gpu_memory is None or options.plan == "off"):
        return [HOST]
    may_be_bf16 = options.precision == "bf16" and (load_tier(options.ds_config).get("data_types") or {}).get(GRAD_SUMS)
    return [GPU, *([GPU_BF16] if may_be_bf16 == AUTO else []), *([HOST] if in_fp32 else [])]


def fill_form(shape: Shape, options: Options, machine: Machine, purpose: Purpose = Footprint) -> Plan:
    """The plan of one tier and form with the largest micro-batch that fits, and as few recomputed layers as fit with
    it. Activations are kept in all layers if the rank's whole share of a step fits with them."""
    layers = shape.model.layers
    trained = 0 if purpose is ScoringFootprint else shape.trained
    config = filled(options, shape.model, machine)

    def plan(tokens: int, recomputed: int) -> Plan:
        checkpointing = "on" if recomputed else "off"
        planned = options.planned(
            micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, recomputed_layers=recomputed,
            scoring_tokens=options.scoring_tokens or tokens,
        )  # fmt: skip
        return Plan(shape.model, planned, machine, trained, tuple(purpose(shape, planned, config, machine)))

    pair = longest_pair(options)
    if options.micro_batch_tokens is not None:
        most = least = options.micro_batch_tokens
    elif machine.gpu_memory is None:
        most, least = tokens_on_cpu(pair), pair
    else:
        most, least = pair * min(math.ceil(options.global_batch_pairs / machine.ranks), max(1, 65536 // pair)), pair
    asked = options.recomputed_layers
    if purpose is ScoringFootprint:
        asked = layers
    elif asked is None:  # where it is given, it says more than on or off
        asked = {"on": layers, "off": 0}.get(options.gradient_checkpointing)
    if asked not in (None, 0, layers) and not shape.switchable:
        raise UserError(
            f"--recomputed_layers {asked}: the layers of this model's code recompute all together: say "
            "--gradient_checkpointing on"
        )
    if asked is not None:
        return _largest(lambda tokens: plan(tokens, asked), least, most)
    if not (smallest := plan(least, layers)).fits:
        return smallest
    if (everything := plan(most, 0)).fits:
        return everything
    found = _largest(lambda tokens: plan(tokens, layers), least, most)
    if not shape.switchable:
        return found

    def recomputing_least(tokens: int) -> Plan:
        """With micro-batches of so many tokens, and as few recomputed layers as fit."""

        def has_room(recomputed: int) -> bool:
            trial = plan(tokens, recomputed)
            return trial.fits and (machine.gpu_memory is None or trial.need("gpu") <= FOR_SPEED * machine.gpu_memory)

        return plan(tokens, bisect.bisect_left(range(layers), True, key=has_room))

    largest = recomputing_least(found.options.micro_batch_tokens)
    if seconds.estimate(largest) is None:
        return largest
    return _fastest(largest, recomputing_least, least)


def _fastest(largest: Plan, recomputing_least: Callable[[int], Plan], least: int) -> Plan:
    """Of a plan with the largest micro-batch and those with smaller ones, which recompute less, the fastest by the
    estimate. least: tokens of the smallest."""
    plans = [largest]
    while plans[-1].options.recomputed_layers and (tokens := plans[-1].options.micro_batch_tokens) > least:
        plans.append(recomputing_least(max(least, tokens // 2)))
    steps = [seconds.of_step(plan) for plan in plans]
    best = min(range(len(plans)), key=steps.__getitem__)
    if steps[best] > steps[0] / GAIN:
        return largest
    reason = (
        f"micro-batches of {largest.options.micro_batch_tokens} tokens fit as well, but recompute "
        f"{largest.options.recomputed_layers} layers: a step would take {steps[0] / steps[best]:.2f} times as long"
    )
    return dataclasses.replace(plans[best], reasons=(reason,))


def with_scoring(plan: Plan, shape: Shape) -> Plan:
    """The plan with the largest micro-batches to score that take no more memory than those to train on.

    Larger ones gather the weights, or read them from a drive, less often. Where nothing is gathered they save little.
    """
    if not plan.trained or plan.machine.gpu_memory is None or plan.options.reference_model is not None:
        return plan
    config = filled(plan.options, plan.model, plan.machine)
    footprint = Footprint(shape, plan.options, config, plan.machine)
    tokens, room = plan.options.micro_batch_tokens, footprint.learned_bytes
    larger = [2**n * tokens for n in range(16, 0, -1) if 2**n * tokens <= MOST_SCORED]
    most = next((size for size in larger if footprint.scored_bytes(size) <= room), tokens)
    return dataclasses.replace(plan, options=plan.options.replace(scoring_tokens=most))


def tokens_on_cpu(longest_pair: int) -> int:
    """The size of a micro-batch on CPU. Larger ones are not faster, but take more memory (benchmarks/README.md)."""
    return max(longest_pair, 1024)


def _largest(plan: Callable[[int], Plan], least: int, most: int) -> Plan:
    """The plan with the most tokens that fits, within 1024 tokens; if none fits, the plan with the least tokens."""
    if (top := plan(most)).fits or most == least or not (bottom := plan(least)).fits:
        return top if top.fits or most == least else bottom
    # The need grows almost linearly with the tokens.
    part = min(
        (available - bottom.need(where)) / (top.need(where) - bottom.need(where))
        for where, available in top.available.items()
        if top.need(where) > bottom.need(where)
    )
    steps = int(part * (most - least) / 1024)
    while steps > 0:
        if (found := plan(least + 1024 * steps)).fits:
            return found
        steps -= 1
    return bottom


def decide_by_class(options: Options, machine: Machine) -> Options:
    """The options of a run with --plan off: the tier of the model's size class, and default sizes."""
    on_gpu = machine.gpu_memory is not None
    model = known_model(options.model, options.trust_remote_code)
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
