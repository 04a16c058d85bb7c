"""A gradient that is not finite, behind a finite loss: the step is skipped and said, at every stage."""

import json
import math

import launching
import numpy as np
import pytest
import tiny

CASES = {"0-fp32": {}, "0-bf16": {"precision": "bf16"}, "2": {}, "3": {}}
STEPS, BAD = 4, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("gradients")
    tiny.make("llama", place / "llama")
    scenarios = []
    for case, extra in CASES.items():
        tier = place / f"{case[0]}.json"
        tier.write_text(json.dumps({"zero_optimization": {"stage": int(case[0])}}))
        options = {
            "model": place / "llama", "dataset": "sample", "ds_config": tier, "output_dir": place / case,
            "cache_dir": place / "cache", "max_steps": STEPS, "global_batch_pairs": 4, "max_length": 64,
            "eval_pairs": 4, "export": "none", "learning_rate": 1e-3, "precision": "fp32", **extra,
        }  # fmt: skip
        scenarios.append({"argv": [f"--{k}={v}" for k, v in options.items()], "nan_gradient_at": BAD})
    (place / "said").write_text(launching.run_scenarios(1, scenarios, place / "all.json"))
    return place


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_finite_gradients_is_skipped_at_every_stage(case, place):
    def strict(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (place / case / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in (json.loads(line, parse_constant=strict) for line in lines) if "loss" in line]
    assert [line["applied"] for line in steps] == [number != BAD for number in range(1, STEPS + 1)]
    assert steps[BAD - 1]["grad_norm"] is None and all(math.isfinite(line["loss"]) for line in steps)
    assert steps[-1]["loss"] != steps[BAD]["loss"], "it learns on"


def test_every_stage_goes_on_alike(place):
    """The skipped step moves neither weights nor learning rate."""
    for key in ("loss", "learning_rate"):
        curves = {case: launching.curve(place / case, key) for case in CASES if case != "0-bf16"}
        for case, curve in curves.items():
            np.testing.assert_allclose(curve, curves["0-fp32"], rtol=0, atol=1e-5, err_msg=f"{case} {key}")


def test_it_is_said(place):
    assert (place / "said").read_text().count(f"step {BAD}: its gradients are not finite") == len(CASES)
