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

HOP, FROM = 2, 4  # steps in each layout; the step from whose checkpoint other runs begin
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
GATHERED = {"stage3_param_persistence_threshold": 0}
# (ranks, zero_optimization, micro-batch); neighbours with as many ranks share a launch
LAYOUTS = [
    (1, {"stage": 0}, 4000),
    (2, {"stage": 3, **GATHERED}, 4000),
    (2, {"stage": 2, **OFFLOAD}, 400),
    (2, {"stage": 1}, 400),
    (2, {"stage": 0}, 4000),
    (3, {"stage": 3, "sub_group_size": 5000}, 400),
    (1, {"stage": 3, "sub_group_size": 9000, **OFFLOAD}, 400),
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
    launches[-1][1].extend(begun_from(place))
    output = ""
    for number, (ranks, scenarios) in enumerate(launches):
        output += launching.run_scenarios(ranks, scenarios, place / f"launch-{number}.json")
    (place / "output").write_text(output)
    return place


def begun_from(place) -> list[dict]:
    """Other runs that begin from a checkpoint of the full run: with a longer schedule, and without Adam's state."""
    checkpoint = place / "full" / "checkpoints" / f"step-{FROM:06d}"
    words = [f"--resume={checkpoint}", f"--max_steps={STEPS + 4}", "--learning_rate=2e-3", "--export=none"]
    longer = [*argv(place, "full", 0, "longer"), *words]
    fresh = [*argv(place, "full", 0, "fresh"), *words, "--resume_optimizer=false"]
    other = [*argv(place, "full", 0, "other"), *words, "--beta=0.5"]
    return [
        {"argv": longer, "stop_after": FROM + 3},  # after its first checkpoint
        {"argv": longer},
        {"argv": fresh},
        {"argv": fresh[:-1], "fails": True},
        {"argv": other, "fails": True},
    ]


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


def test_another_run_begins_from_a_checkpoint_with_what_it_may_change(place):
    """The schedule goes on at its step; the first loss and gradient are the old run's."""
    output = (place / "output").read_text()
    checkpoint = place / "full" / "checkpoints" / f"step-{FROM:06d}"
    for change in (f"max_steps is {STEPS} there and {STEPS + 4} here", "learning_rate is 0.001 there and 0.002 here",
                   "Adam's state is kept", "Adam's state is not kept"):  # fmt: skip
        assert f"--resume {checkpoint}: {change}" in output
    old, longer, fresh = (
        {line["step"]: line for line in launching.metrics(place / name) if "loss" in line}
        for name in ("full-straight", "longer", "fresh")
    )
    steps = list(range(FROM + 1, STEPS + 5))
    assert list(longer) == list(fresh) == steps, "each step once, across the stop"
    for run in (longer, fresh):
        np.testing.assert_allclose(run[FROM + 1]["loss"], old[FROM + 1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(run[FROM + 1]["grad_norm"], old[FROM + 1]["grad_norm"], rtol=1e-4)
        assert run[FROM + 1]["learning_rate"] > old[FROM + 1]["learning_rate"]
    assert abs(longer[FROM + 2]["loss"] - fresh[FROM + 2]["loss"]) > 1e-6, "Adam's state makes another step"
    assert f"from {place}/longer/checkpoints/step-{FROM + HOP:06d} ->" in output
    assert "holds another run (it began from a checkpoint of another run, or with another --resume)" in output
    assert f"UserError: --resume {checkpoint} is of another run (beta is not given there and 0.5 here): only" in output
