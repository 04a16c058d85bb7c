"""Several runs of the main job in one launch, one after the other: python scenarios.py FILE (under any launcher).

FILE is a JSON list of {"argv": [...]}. Each is prepared and trained as `python -m dpo_ds.train` does. It may also have
    "curves": true                        draws curves.png, which takes longer than a few small steps
    "shard_bytes": n                      the export writes shards of n bytes
    "stop_after": n                       the run ends after step n, as if killed; the next run of its folder resumes it
    "fails": true                         a run that is refused or stopped prints why, and the next one starts
    "file_limit": [rank, a, b, n]         from step a on, a rank's files have n bytes at most, until step b
    "nan_gradient_at": n                  the gradients of step n are NaN, but its loss is finite
    "uneven_routing": true                rank r's tokens go to Mixtral's experts 2r and 2r + 1
    "experts_implementation": "eager"     replaces the one that transformers would choose
Beside each run's folder, NAME.calls.json counts the collectives that dpo_ds itself called within the run's steps, and
how often dpo_ds waited for a tensor's values.
"""

import gc
import json
import resource
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import dpo_ds
from dpo_ds.config import parse_options
from dpo_ds.engine import join
from dpo_ds.engine.engine import Engine
from dpo_ds.errors import RunStopped, UserError
from dpo_ds.losses.objective import Objective
from dpo_ds.ranks import console
from dpo_ds.ranks.process import end_without_search
from dpo_ds.ranks.world import World
from dpo_ds.reports.curves import Curves
from dpo_ds.reports.watcher import Watcher
from dpo_ds.runs.prepare import Run, prepare
from dpo_ds.train import train

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "reduce", "gather")
counts: Counter = Counter()
SHARD_BYTES = 5_000_000_000


class Calls(Watcher):
    """Counts the collectives and waits of dpo_ds's own files within a step, in the step's thread."""

    def __init__(self):
        self.inside: int | None = None

    def step_begins(self, step: int) -> None:
        self.inside = threading.get_ident()

    def step_ended(self, metrics: dict) -> None:
        self.inside = None
        counts["steps"] += 1

    def count(self) -> None:
        """Wraps torch's collectives and the methods that read a tensor's values."""
        package = str(Path(dpo_ds.__file__).parent)
        for place, name in [*((torch.distributed, n) for n in COLLECTIVES), *((torch.Tensor, n) for n in WAITS)]:
            plain = getattr(place, name)

            def counted(*args, plain=plain, name=name, **kwargs):
                caller = sys._getframe(1).f_code.co_filename
                # scoring/packed.py reads segments, which are on the host: it waits for nothing.
                own = caller.startswith(package) and not caller.endswith("scoring/packed.py")
                if own and threading.get_ident() == self.inside:
                    counts[name] += 1
                return plain(*args, **kwargs)

            setattr(place, name, counted)


class SpoilGradients(Watcher):
    """Makes the gradients of one step NaN."""

    def __init__(self, step: int):
        self.step = step

    def step_begins(self, step: int) -> None:
        Objective.judge = spoilt if step == self.step else PLAIN_JUDGE


PLAIN_JUDGE = Objective.judge
PLAIN_DRAW = Curves.draw


def spoilt(self, *args):
    judged = PLAIN_JUDGE(self, *args)
    return replace(judged, slopes=judged.slopes * torch.nan)


class Stopped(Exception):
    """Ends a run."""


class StopAfter(Watcher):
    def __init__(self, step: int):
        self.step = step

    def step_settled(self, step: int) -> None:
        if step == self.step:
            raise Stopped


class FileLimit(Watcher):
    """The kernel's limit on the size of a file that this process writes: a full disk, for one rank and some steps."""

    def __init__(self, start: int, end: int, most: int):
        self.limits = {start: most, end: resource.RLIM_INFINITY}

    def step_begins(self, step: int) -> None:
        if step in self.limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limits[step], resource.RLIM_INFINITY))


def route_unevenly(rank: int | None) -> None:
    router = MixtralTopKRouter
    router.forward = PLAIN_ROUTER
    if rank is None:
        return

    def forward(self, hidden):
        logits, _, _ = PLAIN_ROUTER(self, hidden)
        push = torch.zeros_like(logits)
        push[:, 2 * rank : 2 * rank + 2] = 1e4
        scores, experts = (logits + push).float().softmax(-1).topk(self.top_k, dim=-1)
        routed.update(experts.unique().tolist())
        return logits + push, scores / scores.sum(-1, keepdim=True), experts

    router.forward = forward


PLAIN_ROUTER = MixtralTopKRouter.forward
PLAIN_IMPLEMENTATION = PreTrainedModel.get_correct_experts_implementation
routed: set[int] = set()


def start(run: Run, scenario: dict, calls: Calls, here: World) -> None:
    """Trains a prepared run as the scenario says."""
    watchers: list[Watcher] = [calls]
    if "nan_gradient_at" in scenario:
        watchers.append(SpoilGradients(scenario["nan_gradient_at"]))
    if "file_limit" in scenario and scenario["file_limit"][0] == here.rank:
        watchers.append(FileLimit(*scenario["file_limit"][1:]))
    if "stop_after" in scenario:
        watchers.append(StopAfter(scenario["stop_after"]))
    route_unevenly(here.rank if "uneven_routing" in scenario else None)
    experts = scenario.get("experts_implementation")
    PreTrainedModel.get_correct_experts_implementation = (
        (lambda self, wanted, experts=experts: experts) if experts else PLAIN_IMPLEMENTATION
    )
    try:
        train(run, watchers)
    except Stopped:
        close_engines()


def close_engines() -> None:
    """Closes the engines that a stopped run leaves open, as long as its error holds them.

    ZeRO-3 holds a buffer of 2 GB for each, of which a small model uses little. But with a dozen of them, the kernel no
    longer lets the process start another one.
    """
    for engine in [found for found in gc.get_objects() if isinstance(found, Engine)]:
        if engine.deepspeed is not None:
            engine.close()


def main() -> None:
    from dpo_ds import export

    here = join.join()
    gc.freeze()  # an engine that is closed collects garbage; what was imported need not be searched each time
    calls = Calls()
    calls.count()
    for scenario in json.loads(Path(sys.argv[-1]).read_text()):
        counts.clear()
        Curves.draw = PLAIN_DRAW if "curves" in scenario else lambda self: None
        export.SHARD_BYTES = scenario.get("shard_bytes", SHARD_BYTES)
        routed.clear()
        try:
            run = prepare(parse_options(scenario["argv"]), here)
            start(run, scenario, calls, here)
        except (UserError, RunStopped) as error:
            if "fails" not in scenario:
                raise
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            console.say(f"{type(error).__name__}: {error}")
            close_engines()
            continue
        if routed:
            print(f"rank {here.rank} routed to {sorted(routed)}", flush=True)
        if here.speaks:
            (run.folder.parent / f"{run.folder.name}.calls.json").write_text(json.dumps(counts))
    console.leave()
    end_without_search()


if __name__ == "__main__":
    main()
