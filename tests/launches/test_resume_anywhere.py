"""A run that goes on with other ranks, another ZeRO stage, other offload and other sub-groups has the same curve.

Each run moves through all layouts, two steps in each. An undisturbed run in the first layout is what it must equal.
"""

import json

import launching
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

HOP = 2  # steps in each layout
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
GATHERED = {"stage3_param_persistence_threshold": 0}
# (ranks, zero_optimization, micro-batch); a launch runs the neighbours with as many ranks
LAYOUTS = [
    (1, {"stage": 0}, 4000),
    (2, {"stage": 3, **GATHERED}, 4000),
    (2, {"stage": 2, **OFFLOAD}, 400),
    (2, {"stage": 1}, 400),
    (3, {"stage": 3, "sub_group_size": 5000}, 400),
    (3, {"stage": 0}, 400),
    (1, {"stage": 3, "sub_group_size": 9000, **OFFLOAD}, 400),
    (1, {"stage": 2}, 4000),
    (2, {"stage": 3, **OFFLOAD}, 4000),
]
STEPS = HOP * len(LAYOUTS)
# name: (model, further options)
RUNS = {
    "full": ("llama", {"weight_decay": 0.1, "loss": "bco_pair"}),
    "tied-bf16": ("llama-tied", {"precision": "bf16"}),
    "lora": ("gpt2", {"lora": "true"}),
    "experts": ("mistralai/Mixtral-8x7B-Instruct-v0.1", {"router_aux_loss_coef": 0.01}),
    "moving": ("llama", {"reference": "live", "reference_update_every": 3}),
}


def argv(place, name: str, layout: int, folder: str) -> list[str]:
    model, more = RUNS[name]
    options = {
        "model": place / tiny.short(model), "dataset": "sample", "ds_config": place / f"{layout}.json",
        "output_dir": place / folder, "cache_dir": place / "cache", "max_steps": STEPS, "save_every": HOP,
        "eval_every": 0, "global_batch_pairs": 6, "eval_pairs": 4, "max_length": 96, "learning_rate": 1e-3,
        "generations": 0, "precision": "fp32", "micro_batch_tokens": LAYOUTS[layout][2],
        "gradient_checkpointing": "on" if layout % 2 else "off", **more,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("anywhere")
    for model in {model for model, _ in RUNS.values()}:
        tiny.make(model, place / tiny.short(model))
    for number, (_, zero, _) in enumerate(LAYOUTS):
        (place / f"{number}.json").write_text(json.dumps({"zero_optimization": zero}))
    launches: list[tuple[int, list]] = [(1, [{"argv": argv(place, name, 0, f"{name}-straight")} for name in RUNS])]
    for number, (ranks, _, _) in enumerate(LAYOUTS):
        if launches[-1][0] != ranks:
            launches.append((ranks, []))
        last = number == len(LAYOUTS) - 1
        for name in RUNS:
            stop = {} if last else {"stop_after": HOP * (number + 1)}
            launches[-1][1].append({"argv": argv(place, name, number, name), **stop})
    output = ""
    for number, (ranks, scenarios) in enumerate(launches):
        output += launching.run_scenarios(ranks, scenarios, place / f"launch-{number}.json")
    (place / "output").write_text(output)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_the_same_wherever_the_run_goes_on(name, place):
    moved, straight = [launching.metrics(place / f"{name}{end}") for end in ("", "-straight")]
    assert [line["step"] for line in moved] == [line["step"] for line in straight]
    bf16 = "bf16" in name
    for key in ("loss", "grad_norm", "eval/loss"):
        values = [np.array([line[key] for line in lines if key in line]) for lines in (moved, straight)]
        assert len(values[0]) == (2 if key == "eval/loss" else STEPS)
        allowed = 0.05 if bf16 else 1e-6 if "loss" in key else 1e-4
        np.testing.assert_allclose(*values, rtol=allowed, atol=allowed, err_msg=key)
    rates = [[line["learning_rate"] for line in lines if "loss" in line] for lines in (moved, straight)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", RUNS)
def test_the_export_is_the_undisturbed_runs(name, place):
    moved, straight = (load_file(place / f"{name}{end}" / "merged" / "model.safetensors") for end in ("", "-straight"))
    assert moved.keys() == straight.keys()
    far = max(float((moved[key].float() - straight[key].float()).abs().max()) for key in moved)
    assert far < (0.05 if "bf16" in name else 2e-5), far
    start = load_file(place / tiny.short(RUNS[name][0]) / "model.safetensors")
    assert any(not torch.equal(moved[key].float(), start[key]) for key in moved), "nothing was learnt"
