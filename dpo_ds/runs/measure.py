"""How long a step takes on this machine (--plan measure), by training models of the same shape with few layers.

A step's time grows linearly with the number of layers. So two models with few layers and random weights train a few
steps, in the run's own engine on all its ranks, and the model's own time lies on the line through both.
"""

import copy
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.config import Options, Planned
from dpo_ds.data.pairs import Group
from dpo_ds.engine.build import policy_engine
from dpo_ds.engine.engine import Engine
from dpo_ds.engine.requirements import require_compiler, require_nvme
from dpo_ds.engine.tiers import swap_folders
from dpo_ds.errors import require_writable
from dpo_ds.losses.table import reads_reference
from dpo_ds.models.model import Model, torch_dtype
from dpo_ds.plan.activations import lengths, with_layers
from dpo_ds.plan.footprint import longest_pair
from dpo_ds.plan.plan import Plan
from dpo_ds.plan.refuse import for_run
from dpo_ds.plan.seconds import SHORTEST, SHOWN_PAIRS, dealt, duration, steps_of, visited
from dpo_ds.ranks import collectives, console, hang
from dpo_ds.ranks.collectives import on_rank_0, one_after_another
from dpo_ds.ranks.world import World
from dpo_ds.runs.loadable import Loadable, plan_and_find
from dpo_ds.runs.shared import require_shared
from dpo_ds.scoring.packed import PackedBatch, pack

MODELS = "measure-"  # begins the name of a folder with such models, in --cache_dir
OLD = 86_400  # seconds after which it is nobody's any more
# Steps that are timed, after the first two: as many as take so many seconds, between these numbers.
SECONDS, LEAST, MOST = 4.0, 3, 20


@dataclass(frozen=True)
class Times:
    """Seconds: of a micro-batch's forward and backward, of the step's last one, of a forward alone, of the update."""

    learning: float
    last: float
    scoring: float
    update: float

    def at(self, more: float, other: "Times") -> "Times":
        """On the line through these and `other`, `more` times their distance from these. A line that falls, as when
        something else takes the cores meanwhile, is taken to be level."""
        return Times(
            *(a + more * max(0.0, b - a) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Measured:
    """A step of the whole model, as it follows from what was measured. Seconds."""

    options: Planned
    ranks: int
    layers: tuple[int, int]  # of the models that were trained
    of_layers: int
    pair_tokens: int
    micro_batches: int  # of a step, on a rank
    times: Times  # of the whole model

    @property
    def step(self) -> float:
        passes = (self.micro_batches - 1) * self.times.learning + self.times.last
        in_step = self.scoring if self.options.reference in ("live", "base") else 0.0
        return passes + in_step + self.times.update

    @property
    def scoring(self) -> float:
        """Of a forward pass over a step's pairs."""
        return self.micro_batches * self.times.scoring

    def as_line(self) -> str:
        options, steps = self.options, steps_of(self.options, SHOWN_PAIRS)
        pairs = visited(options, SHOWN_PAIRS)
        table = options.reference == "precomputed" and options.reference_table is None and reads_reference(options)
        reference = self.scoring * math.ceil(pairs / options.global_batch_pairs) if table else 0.0
        before = f", and {duration(reference)} for the reference" if table else ""
        hours = (steps * self.step + reference) * self.ranks / 3600
        price = options.price_per_gpu_hour
        cost = f"; {hours:,.3g} GPU-hours, {hours * price:,.2f} at {price:g} each" if price is not None else ""
        return (
            f"measured with {self.layers[0]} and {self.layers[1]} of {self.of_layers} layers: "
            f"{duration(self.step)} a step of {options.global_batch_pairs} pairs of {self.pair_tokens:,} tokens "
            f"({self.micro_batches} micro-batch(es) a rank; update {duration(self.times.update)}); {pairs:,} pairs, "
            f"{steps:,} steps: {duration(steps * self.step)}{before}{cost}"
        )


def measure(options: Options, here: World, plan: Plan | None) -> Measured:
    """Measures, by all ranks together. `here` is what join.join() returned; `plan` is rank 0's.

    Raises UserError for what a run would be refused for before its data is read.
    """
    planned, found = plan_and_find(lambda: plan or for_run(options), options, here)
    require_compiler(planned.ds_config, found.ds_config, torch.cuda.is_available())
    if used := swap_folders(found.ds_config):
        one_after_another(lambda: require_nvme(used))
    place = Path(planned.cache_dir).expanduser()
    one_after_another(lambda: require_writable("--cache_dir", place))
    require_shared(place, "--cache_dir")
    pair_tokens = planned.pair_tokens or max(SHORTEST, longest_pair(planned) // 2)
    pairs, micro_batches = dealt(planned, here.size, pair_tokens)
    batch = _batch(found.model, pair_tokens, math.ceil(pairs / micro_batches))
    again = planned.recomputed_layers / found.model.layers
    folder = Path(on_rank_0(lambda: _folder(place)))
    try:
        with hang.watched(folder, planned.hang_minutes):
            whole = _whole(found, planned, batch, folder, recompute=again == 1)
            if 0 < again < 1:
                whole = whole.at(again, _whole(found, planned, batch, folder, recompute=True))
    finally:
        if here.speaks:  # the others may still be at work after an error here: nobody waits for them
            shutil.rmtree(folder, ignore_errors=True)
    layers = _few_and_many(found.model)
    return Measured(planned, here.size, layers, found.model.layers, pair_tokens, micro_batches, whole)


def _folder(place: Path) -> str:
    """A new folder for the models. Those of starts that were killed go."""
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{MODELS}*"):
        if time.time() - left.stat().st_mtime > OLD:
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=MODELS, dir=place)


def _few_and_many(model: Model) -> tuple[int, int]:
    """The numbers of layers to train: each with all kinds of layers in equal parts."""
    kinds = len(set(getattr(model.config.get_text_config(), "layer_types", None) or [None]))
    few = min(2 * kinds, max(1, model.layers // 2))
    return few, min(2 * few, model.layers)


def _whole(found: Loadable, planned: Planned, batch: PackedBatch, folder: Path, recompute: bool) -> Times:
    """The times of the whole model, if all layers recompute or none."""
    few, many = _few_and_many(found.model)
    first = _train(found, planned, batch, folder, few, recompute)
    if many == few:
        return first
    second = _train(found, planned, batch, folder, many, recompute)
    if second.learning < first.learning:
        console.say(
            f"{many} layers took less time than {few}, so something else is using the machine: measure again without it"
        )
    return first.at((found.model.layers - few) / (many - few), second)


def _train(found: Loadable, planned: Planned, batch: PackedBatch, folder: Path, layers: int, recompute: bool) -> Times:
    """Trains a model with so many layers. The slowest rank's times count."""
    model = folder / f"{layers}-layers"
    with console.working(f"measuring {layers} layers"):
        on_rank_0(lambda: _write_model(found.model, planned, layers, model))
        options = planned.replace(recomputed_layers=layers if recompute else 0)
        engine = policy_engine(model, copy.deepcopy(found.ds_config), options, found.attention, 2 + MOST)
        with hang.limited("step"):
            own = _timed(engine, batch)
        engine.close()
    each = collectives.gather(tuple(vars(own).values()))
    return Times(*(max(column) for column in zip(*each, strict=True)))


def _write_model(model: Model, planned: Planned, layers: int, folder: Path) -> None:
    """Writes a model of this shape with so many layers and random weights, unless it is there."""
    if folder.is_dir():
        return
    with torch.device("meta"):
        small: Any = AutoModelForCausalLM.from_config(
            with_layers(model.config, layers),
            dtype=torch_dtype(planned.precision),
            trust_remote_code=planned.trust_remote_code,
        )
    small.to_empty(device="cpu")
    small.tie_weights()
    for parameter in small.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    small.save_pretrained(folder)


def _batch(model: Model, pair_tokens: int, pairs: int) -> PackedBatch:
    vocabulary, random = model.config.get_text_config().vocab_size, np.random.default_rng(0)
    sizes = lengths(pair_tokens)
    return pack(
        [
            Group.of_pair(*(random.integers(vocabulary, size=size, dtype=np.int32) for size in sizes))
            for _ in range(pairs)
        ]
    )


def _timed(engine: Engine, batch: PackedBatch) -> Times:
    learning: list[float] = []
    last: list[float] = []
    scoring: list[float] = []
    update: list[float] = []

    def learn(ends: bool) -> None:
        engine.backward(1e-3 * engine(batch).answers.sum(), ends)

    def step() -> float:
        """Two micro-batches, the update, and a forward alone."""
        learning.append(_seconds(engine, lambda: learn(False)))
        last.append(_seconds(engine, lambda: learn(True)))
        update.append(_seconds(engine, engine.step))
        scoring.append(_seconds(engine, lambda: engine.score(batch)))
        engine.release_gathered()
        hang.alive()
        return learning[-1] + last[-1] + update[-1] + scoring[-1]

    step()  # much is made only here
    longest = max(collectives.gather(step()))
    columns = learning, last, scoring, update
    for column in columns:
        column.clear()
    for _ in range(min(MOST, max(LEAST, math.ceil(SECONDS / longest)))):
        step()
    return Times(*map(statistics.median, columns))


def _seconds(engine: Engine, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - started
