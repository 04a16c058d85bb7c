"""A gradient that is not finite, behind a finite loss: the step is skipped and said, at every stage."""

import json
import math
import re
from dataclasses import replace

import launching
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.replay import replay
from dpo_ds.runs import bad_steps

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


def test_it_is_said_and_written_down(place):
    said = (place / "said").read_text()
    for case in CASES:
        file = place / case / "bad_steps" / f"step-{BAD:06d}.json"
        assert f"python -m dpo_ds.replay {file}" in said
        assert re.search(
            rf"step {BAD}: its loss .* changed nothing; its pairs are of rows \d+, \d+, \d+, \d+; to see", said
        )
        step = bad_steps.read(file)
        assert step.step == BAD and step.checkpoint is None and step.options.learning_rate == 1e-3
        assert len(step.pairs) == 4 and all(pair.prompt and len(pair.answers) == 2 for pair in step.pairs)


def test_a_replay_finds_no_fault_with_healthy_pairs(place, capsys):
    assert replay(bad_steps.read(place / "0-fp32" / "bad_steps" / f"step-{BAD:06d}.json")) == 0
    assert "every pair is finite with these weights" in capsys.readouterr().out


def test_a_replay_names_the_pair_that_is_not_finite(place, capsys, tmp_path):
    """A token of one pair alone has an embedding that is not finite."""
    step = bad_steps.read(place / "0-fp32" / "bad_steps" / f"step-{BAD:06d}.json")
    tokens = [{*pair.prompt, *pair.answers[0], *pair.answers[1]} for pair in step.pairs]
    bad, token = next(
        (n, t) for n, own in enumerate(tokens) for t in sorted(own) if not any(t in o for o in tokens if o is not own)
    )
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(tmp_path)
    broken = replace(step, options=step.options.replace(model=str(tmp_path)))
    assert replay(broken) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("<- not finite")]
    assert len(marked) == 1 and marked[0].startswith(f"dpo_ds: row {step.pairs[bad].row} ")


def test_bad_steps_in_a_row_stop_the_run(place):
    """A real one: at this rate the weights are so large after an update that no later loss is finite."""
    options = {
        "model": place / "llama", "dataset": "sample", "ds_config": place / "0.json", "output_dir": place / "stopped",
        "cache_dir": place / "cache", "max_steps": 8, "global_batch_pairs": 4, "max_length": 64, "eval_pairs": 0,
        "export": "none", "learning_rate": 1e30, "precision": "fp32", "max_bad_steps": 2,
    }  # fmt: skip
    done = launching.run(1, "-m", "dpo_ds.train", *[f"--{k}={v}" for k, v in options.items()], check=False)
    steps = launching.metrics(place / "stopped")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert [line["applied"] for line in steps[-2:]] == [False, False] and steps[-3]["applied"]
    assert steps[-1]["loss"] is None and steps[-1]["step"] < 8
    said = (
        f"the weights are those of step {steps[-3]['step']}: look at the pairs in {place}/stopped/bad_steps, or lower "
    )
    assert f"{said}--learning_rate (now 1e+30): with another one, the same command begins again" in done.stdout
    assert steps[-1]["learning_rate"] == steps[-2]["learning_rate"], "the schedule does not go on"
