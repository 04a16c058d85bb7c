"""Where gradients are while the optimizer's state is on the host: every form gives DeepSpeed's own bits.

Real runs of ten steps, compared by their last checkpoints: fp32 weights and Adam's moments, to the bit. Micro-batches
are small, so that ranks have different numbers of them; some runs go on in another form than they began in.
"""

import json

import launching
import pytest
import tiny
import torch
from safetensors.torch import load_file

STEPS, STOP = 10, 5
SMALL, LARGE = {"micro_batch_tokens": 260}, {"micro_batch_tokens": 4000}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OWN, FORMS = "deepspeed", ("gpu", "host")
# name: (ranks, precision, numbers in a sub-group, further config, options)
CASES = {
    "1-fp32-clipped": (1, "fp32", 10**9, FP32_SUMS, {**LARGE, "max_grad_norm": 0.01}),
    "1-bf16": (1, "bf16", 20_000, FP32_SUMS, SMALL),
    "2-fp32": (2, "fp32", 20_000, FP32_SUMS, SMALL),
    "2-bf16": (2, "bf16", 4_000, FP32_SUMS, SMALL),
    "2-bf16-one-group-unclipped": (2, "bf16", 10**9, FP32_SUMS, {**SMALL, "max_grad_norm": 1e6}),
    "2-bf16-clipped": (2, "bf16", 20_000, FP32_SUMS, {**SMALL, "max_grad_norm": 0.01}),
    "2-bf16-lora": (2, "bf16", 10**9, FP32_SUMS, {**SMALL, "lora": "true", "learning_rate": 5e-3}),
    "2-bf16-weights-on-host": (2, "bf16", 20_000, FP32_SUMS, SMALL),
    "2-bf16-sums": (2, "bf16", 20_000, {}, SMALL),
}
# (the form in which a run of "2-bf16" begins, the form in which it goes on)
CHANGES = [(OWN, "gpu"), ("gpu", "host"), ("host", OWN), ("gpu", "gpu")]


def forms(case: str) -> tuple[str, ...]:
    return ("gpu_bf16",) if case == "2-bf16-sums" else FORMS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("forms")
    tiny.make("llama", place / "llama")
    scenarios: dict[int, list] = {1: [], 2: []}
    for case, (ranks, precision, group, config, more) in CASES.items():
        zero = {"stage": 3, "sub_group_size": group, "stage3_param_persistence_threshold": 100,
                "offload_optimizer": {"device": "cpu", "pin_memory": True}}  # fmt: skip
        if case == "2-bf16-weights-on-host":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        (place / f"{case}.json").write_text(json.dumps({**config, "zero_optimization": zero}))

        def argv(name: str, form: str, case=case, precision=precision, ranks=ranks, more=more) -> list[str]:
            options = {
                "model": place / "llama", "dataset": "sample", "ds_config": place / f"{case}.json",
                "output_dir": place / name, "cache_dir": place / f"cache-{ranks}", "max_steps": STEPS,
                "global_batch_pairs": 7, "learning_rate": 1e-3, "max_length": 96, "eval_pairs": 0, "export": "none",
                "precision": precision, "gradients": form, "save_every": STOP, "plan": "off", "keep_last": 1, **more,
            }  # fmt: skip
            return [f"--{key}={value}" for key, value in options.items()]

        for form in (OWN, *forms(case)):
            scenarios[ranks].append({"argv": argv(f"{case}-{form}", form)})
        if case == "2-bf16":
            for first, then in CHANGES:
                scenarios[ranks].append({"argv": argv(f"{first}-{then}", first), "stop_after": STOP})
                scenarios[ranks].append({"argv": argv(f"{first}-{then}", then)})
    for ranks, runs in scenarios.items():
        launching.run_scenarios(ranks, runs, place / f"{ranks}.json")
    return place


def state(place, name: str) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds."""
    folder = place / name / "checkpoints" / f"step-{STEPS:06d}"
    return {f"{file.name} {key}": tensor for file in sorted(folder.glob("*.safetensors"))
            for key, tensor in load_file(file).items()}  # fmt: skip


def differences(place, name: str, other: str) -> list[str]:
    one, two = state(place, name), state(place, other)
    assert one.keys() == two.keys() and any("exp_avg_sq" in key for key in one)
    return [key for key, tensor in one.items() if not torch.equal(tensor, two[key])]


@pytest.mark.parametrize(("case", "form"), [(case, form) for case in CASES for form in forms(case)])
def test_every_number_is_deepspeeds_own(case, form, place):
    assert differences(place, f"{case}-{form}", f"{case}-{OWN}") == []
    assert launching.untimed(place / f"{case}-{form}") == launching.untimed(place / f"{case}-{OWN}")


@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_a_run_goes_on_in_another_form(first, then, place):
    assert differences(place, f"{first}-{then}", f"2-bf16-{OWN}") == []


def test_the_runs_show_something(place):
    """Clipping took place where it should, sums in bf16 give other numbers, and weights moved."""
    clipped = {case: [line["clipped"] for line in launching.metrics(place / f"{case}-gpu") if "clipped" in line]
               for case in CASES if "gpu" in forms(case)}  # fmt: skip
    assert all(clipped["2-bf16-clipped"]) and all(clipped["1-fp32-clipped"])
    assert not any(clipped["2-bf16-one-group-unclipped"])
    assert differences(place, f"2-bf16-sums-{OWN}", f"2-bf16-{OWN}")
    curve = launching.curve(place / "2-bf16-gpu")
    assert max(curve) - min(curve) > 0.01
