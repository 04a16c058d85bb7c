"""What a step moves between a GPU and the host, by the plan and by counting: one rank, ZeRO-3, optimizer on the host.

On CPU both are the same memory. So the optimizer's own host tensors count as the host, and all else as the GPU: a copy
from one side to the other is counted. DeepSpeed asks where a tensor is, and is answered likewise.
"""

import json

import launching
import pytest
import tiny

PROBE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from dpo_ds.engine import join
join.join()
from dpo_ds.config import parse_options
from dpo_ds.data.pairs import Group
from dpo_ds.engine.build import policy_engine
from dpo_ds.models.find import known_model
from dpo_ds.plan.choose import decide
from dpo_ds.plan.footprint import Footprint, filled, shape_of
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.scoring.packed import pack

class Count(TorchFunctionMode):
    def __init__(self, optimizer):
        super().__init__()
        self.to_host = self.to_gpu = 0
        masters = optimizer.fp32_partitioned_groups_flat
        held = [*masters, *(master.grad for master in masters if master.grad is not None)]
        held += getattr(optimizer, "blocks", [optimizer.grad_partitions_flat_buffer])
        self.host = {tensor.untyped_storage().data_ptr() for tensor in held}

    def on_host(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.host

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "copy_":
            there, here = map(self.on_host, args[:2])
            size = args[0].numel() * args[0].itemsize
            self.to_host += size * (there and not here)
            self.to_gpu += size * (here and not there)
        if name == "to" and len(args) > 1 and isinstance(args[1], (str, torch.device)) and self.on_host(args[0]):
            if torch.device(args[1]) == torch.device("cpu") and args[0].numel():  # cpu stands for the GPU
                found = args[0].clone()
                self.to_gpu += found.numel() * found.itemsize
                return found
        return function(*args, **kwargs)

folder, words = Path(sys.argv[1]), json.loads(sys.argv[2])
machine = Machine(1, 1, None, 8 * GIB)
found = {}
for form, sums in words:
    tier = folder / f"{sums}.json"
    zero = {"stage": 3, "sub_group_size": 20_000, "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    tier.write_text(json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": sums}}))
    options = parse_options(["--model", str(folder), "--ds_config", str(tier), "--precision", "bf16",
                             "--max_grad_norm", "1e-3"])
    model = known_model(options.model, False)
    options = decide(options, model, False).planned(
        gradients=form, micro_batch_tokens=100, scoring_tokens=100, recomputed_layers=0, gradient_checkpointing="off"
    )
    config = filled(options, model, machine)
    generator = np.random.default_rng(0)
    batch = pack([Group.of_pair(*(generator.integers(0, 90, n).astype(np.int32) for n in (17, 7, 12)))])
    engine = policy_engine(folder, config, options, "sdpa", total_steps=10)
    for micro_batches in (1, 1, 3):  # the first step makes what later ones use
        with Count(engine.deepspeed.optimizer) as count:
            get_accelerator().on_accelerator = lambda tensor: not count.on_host(tensor)
            for number in range(micro_batches):
                engine.backward(engine(batch).answers.sum(), number == micro_batches - 1)
            engine.step()
        planned = Footprint(shape_of(options), options, config, machine).host_traffic(micro_batches)
        found[f"{form} {sums} {micro_batches}"] = [planned, [count.to_host, count.to_gpu]]
    engine.close()
print("RESULT", json.dumps(found))
"""
FORMS = [("deepspeed", "fp32"), ("deepspeed", "bf16"), ("host", "fp32"), ("gpu", "fp32"), ("gpu_bf16", "bf16")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic")
    tiny.make("llama", folder)
    printed = launching.run(1, "-c", PROBE, folder, json.dumps(FORMS)).stdout
    return json.loads(printed.split("RESULT")[1].splitlines()[0])


@pytest.mark.parametrize(("form", "sums"), FORMS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_plans_bytes_are_those_that_move(form, sums, micro_batches, found):
    planned, counted = found[f"{form} {sums} {micro_batches}"]
    assert counted[0] > 0 and planned == counted


def test_gradients_on_the_gpu_move_once(found):
    """DeepSpeed's own form moves more with every micro-batch."""
    assert found["gpu fp32 1"][1] == found["gpu fp32 3"][1]
    once, thrice = (sum(found[f"deepspeed fp32 {count}"][1]) for count in (1, 3))
    assert thrice > 2 * once > 4 * sum(found["gpu fp32 1"][1])
