"""Several runs of the main job in one launch, one after the other: python scenarios.py FILE (under any launcher).

FILE is JSON: a list of {"argv": [...]}, each prepared and trained as `python -m dpo_ds.train` does, and perhaps with
    "shard_bytes": n                      exported in shards of that size
    "stop_after": n                       ended there as if it had been killed; the next with its folder resumes it
    "uneven_routing": true                rank r's tokens go to Mixtral's experts 2r and 2r + 1
    "experts_implementation": "eager"     not the one that transformers would take
Beside each run's folder, NAME.calls.json counts the collectives that dpo_ds itself called within its steps, and how
often it waited for a tensor's numbers.
"""

import contextlib
import json
import sys
import threading
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from dpo_ds import world
from dpo_ds.config import parse_options
from dpo_ds.train import train
from dpo_ds.trainer import Trainer

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "reduce", "gather")
counts: Counter = Counter()
SHARD_BYTES = 5_000_000_000


def count_calls_of_dpo_ds() -> None:
    """Wraps torch's collectives and what reads a tensor's numbers: calls from dpo_ds's own files in a step's thread,
    while it runs, are counted."""
    inside = []
    package = str(Path(world.__file__).parent)
    plain_step = Trainer.step

    def step(self, number):
        inside.append(threading.get_ident())
        try:
            return plain_step(self, number)
        finally:
            inside.pop()
            counts["steps"] += 1

    Trainer.step = step
    for place, name in [*((torch.distributed, n) for n in COLLECTIVES), *((torch.Tensor, n) for n in WAITS)]:
        plain = getattr(place, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            own = caller.startswith(package) and not caller.endswith("scoring/packed.py")  # segments are on the host
            if own and threading.get_ident() in inside:
                counts[name] += 1
            return plain(*args, **kwargs)

        setattr(place, name, counted)


class Stopped(Exception):
    """The run ends here."""


PLAIN_AFTER_STEP = Trainer.after_step


def stop_after(step: int | None) -> None:
    def after_step(self, steps_done, last):
        PLAIN_AFTER_STEP(self, steps_done, last)
        if steps_done == step:
            raise Stopped

    Trainer.after_step = after_step


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


def main() -> None:
    from dpo_ds import export
    from dpo_ds.prepare import prepare

    here = world.join()
    count_calls_of_dpo_ds()
    for scenario in json.loads(Path(sys.argv[-1]).read_text()):
        counts.clear()
        export.SHARD_BYTES = scenario.get("shard_bytes", SHARD_BYTES)
        routed.clear()
        run = prepare(parse_options(scenario["argv"]), here.size)
        stop_after(scenario.get("stop_after"))
        route_unevenly(here.rank if "uneven_routing" in scenario else None)
        experts = scenario.get("experts_implementation")
        PreTrainedModel.get_correct_experts_implementation = (
            (lambda self, wanted, experts=experts: experts) if experts else PLAIN_IMPLEMENTATION
        )
        with contextlib.suppress(Stopped):
            train(run)
        if routed:
            print(f"rank {here.rank} routed to {sorted(routed)}", flush=True)
        if here.speaks:
            (run.folder.parent / f"{run.folder.name}.calls.json").write_text(json.dumps(counts))
    world.leave()


if __name__ == "__main__":
    main()
