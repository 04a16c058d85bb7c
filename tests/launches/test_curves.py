"""The same loss curve whatever runs it: ranks, ZeRO stage, offload, micro-batches, reference, recomputation, a stop.

Each row of CASES is a real run of ten steps in fp32; all are compared with the oracle's plain loop.
"""

import gzip
import json
import math
from itertools import pairwise

import launching
import numpy as np
import oracle
import pytest
import tiny

from dpo_ds.data.steps import Schedule
from dpo_ds.embedded import sample_file

STEPS, BATCH, RATE = 10, 8, 2e-3
SMALL, LARGE = "320", "4000"
SAVE, STOP = 4, 6  # resumed runs do steps 5 and 6 twice

# name: (ranks, model, tier or stage, further options)
CASES = {
    "1-stage0": (1, "llama", "stage0", {}),
    "1-stage2": (1, "llama", "stage2", {}),
    "1-stage3": (1, "llama", "stage3", {}),
    "1-stage0-small-micro-batches": (1, "llama", "stage0", {"micro_batch_tokens": SMALL}),
    "1-stage0-live": (1, "llama", "stage0", {"reference": "live"}),
    "1-stage0-checkpointing": (1, "llama", "stage0", {"gradient_checkpointing": "on"}),
    "1-stage3-offload": (1, "llama", "stage3-offload", {}),
    "2-stage0": (2, "llama", "stage0", {}),
    "2-stage1": (2, "llama", "stage1", {}),
    "2-stage2": (2, "llama", "stage2", {}),
    "2-stage2-offload": (2, "llama", "stage2-offload", {"micro_batch_tokens": SMALL}),
    "2-stage3": (2, "llama", "stage3", {}),
    "2-stage3-small-micro-batches": (2, "llama", "stage3", {"micro_batch_tokens": SMALL}),
    "2-stage3-offload": (2, "llama", "stage3-offload", {}),
    "2-stage3-offload-both": (2, "llama", "stage3-offload-both", {}),
    "2-stage3-live": (2, "llama", "stage3", {"reference": "live"}),
    "2-stage3-one-layer-recomputed": (2, "llama", "stage3", {"recomputed_layers": 1}),
    "2-stage3-fused-recomputed": (
        2,
        "llama",
        "stage3",
        {"fuse": "on", "gradient_checkpointing": "on", "micro_batch_tokens": SMALL},
    ),
    "1-stage0-resumed": (1, "llama", "stage0", {"save_every": SAVE}),
    "2-stage3-offload-resumed": (2, "llama", "stage3-offload", {"save_every": SAVE}),
    "1-gpt2-stage0": (1, "gpt2", "stage0", {}),
    "2-gpt2-stage3": (2, "gpt2", "stage3", {"micro_batch_tokens": SMALL}),
    # Four answers and six weighted pairs a prompt; small micro-batches split such a group.
    "1-groups-stage0": (1, "llama", "stage0", {}),
    "1-groups-alone-stage0": (1, "llama", "stage0", {"micro_batch_tokens": SMALL}),
    "2-groups-stage3": (2, "llama", "stage3", {}),
    "2-groups-stage2-live": (2, "llama", "stage2", {"reference": "live"}),
}


def ds_config(name: str) -> dict:
    """A plain DeepSpeed config as a user writes it, with "auto" for what is ours to fill."""
    stage, *offload = name.removeprefix("stage").split("-")
    zero = {"stage": int(stage)}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "both" in offload:
        zero["offload_param"] = {"device": "cpu"}
    if stage == "3":
        zero |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
    return {"zero_optimization": zero, "gradient_clipping": "auto", "train_batch_size": "auto"}


def kind(case: str) -> str:
    """Cases of one kind have one curve."""
    return "groups" if "groups" in case else CASES[case][1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("curves")
    with gzip.open(sample_file(), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(place / "groups.jsonl", "w") as file:
        for n, (row, other) in enumerate(pairwise(rows[:61])):
            answers = [row["chosen"], row["rejected"], other["rejected"], other["chosen"]]
            several = {"prompt": row["prompt"], "responses": answers, "scores": [4, 1, 3, 2], "weight": 1 + n % 3}
            file.write(json.dumps(several) + "\n")
    return place


@pytest.fixture(scope="module")
def launched(place) -> dict[int, str]:
    """All cases, in one launch per number of ranks: what each launch printed."""
    for name in {model for _, model, _, _ in CASES.values()}:
        tiny.make(name, place / name)
    scenarios: dict[int, list] = {1: [], 2: []}
    for case, (ranks, model, tier, extra) in CASES.items():
        (place / f"{tier}.json").write_text(json.dumps(ds_config(tier)))
        options = {
            "model": place / model,
            "dataset": "sample",
            "ds_config": place / f"{tier}.json",
            "output_dir": place / case,
            "cache_dir": place / f"cache-{ranks}",
            "max_steps": STEPS,
            "global_batch_pairs": BATCH,
            "learning_rate": RATE,
            "max_length": 96,
            "eval_pairs": 12,
            "eval_every": 5,
            "micro_batch_tokens": LARGE,
            "export": "none",
            "precision": "fp32",
            **extra,
        }
        if kind(case) == "groups":
            options |= {"dataset": place / "groups.jsonl", "pairs": "all"}
        scenario = {"argv": [f"--{key}={value}" for key, value in options.items()]}
        if "resumed" in case:
            scenarios[ranks].append({**scenario, "stop_after": STOP})
        scenarios[ranks].append(scenario)
    return {ranks: launching.run_scenarios(ranks, runs, place / f"{ranks}.json") for ranks, runs in scenarios.items()}


@pytest.fixture(scope="module")
def expected(place, launched) -> dict[str, list[float]]:
    """The oracle's curves by kind, on the very pairs that the schedule gives each step, one by one."""
    from dpo_ds.data.pairs import PairSet
    from dpo_ds.runs.data import hold_out

    sets = [PairSet.open(path.parent) for path in (place / "cache-1" / "tokens").glob("*/manifest.json")]
    plain, groups = sorted(sets, key=lambda pairs: len(pairs) / len(pairs.answers))
    assert len(groups) == 6 * 60 and len(groups.answers) == 4 * 60
    curves = {}
    for name, model, pairs in (("llama", "llama", plain), ("gpt2", "gpt2", plain), ("groups", "llama", groups)):
        train, _ = hold_out(pairs, 12)
        schedule = Schedule.of(train.pair_groups, BATCH, 1, STEPS, seed=42)
        numbers = [schedule.step(number) for number in range(STEPS)]
        steps = [[train.pair(i) for i in step] for step in numbers]
        weights = [train.weights[step].tolist() for step in numbers]
        curves[name] = oracle.train(place / model, steps, weights, learning_rate=RATE, warmup=round(0.1 * STEPS))
    return curves


@pytest.mark.parametrize("case", CASES)
def test_same_curve_as_the_oracle(case, place, launched, expected):
    curve = launching.curve(place / case)
    assert len(curve) == STEPS
    assert abs(curve[0] - math.log(2)) < 1e-5
    np.testing.assert_allclose(curve, expected[kind(case)], rtol=0, atol=1e-5)
    if "resumed" in case:
        assert f"from {place / case}/checkpoints/step-00000{SAVE}" in launched[CASES[case][0]]
        assert curve == launching.curve(place / case.removesuffix("-resumed")), "to the bit"


def test_the_curve_is_one_that_can_tell_runs_apart(expected):
    """A curve that stayed at ln 2 would let every case pass."""
    for curve in expected.values():
        assert np.abs(np.diff(curve)).max() > 0.01


def test_zero3_traces_are_never_invalidated(launched):
    assert "nvalidate trace" not in launched[1] + launched[2]


def test_one_collective_and_one_wait_a_step(place, launched):
    """Two ranks: ours is one all-reduce of the metrics in each step, then one look at them, and nothing else. Reference
    tables need none."""
    for case in ("2-stage0", "2-stage3", "2-stage3-small-micro-batches", "2-stage3-live"):
        counts = json.loads((place / f"{case}.calls.json").read_text())
        # Stage 0 in fp32 asks once more, before the update: are the gradients finite?
        asked = {"__bool__": STEPS} if case == "2-stage0" else {}
        assert counts == {"steps": STEPS, "all_reduce": STEPS, "tolist": STEPS, **asked}, case


def test_grad_norms_agree(place, launched):
    """Before clipping, whatever keeps it: torch at stage 0, DeepSpeed elsewhere."""
    norms = {case: launching.curve(place / case, "grad_norm") for case in CASES if kind(case) == "llama"}
    for case, values in norms.items():
        np.testing.assert_allclose(values, norms["1-stage0"], rtol=2e-3, err_msg=case)


def test_evaluations_agree_and_start_at_ln_2(place, launched):
    curves = {case: launching.curve(place / case, "eval/loss") for case in CASES if kind(case) == "llama"}
    for case, values in curves.items():
        assert len(values) == 3 and abs(values[0] - math.log(2)) < 1e-5, case
        np.testing.assert_allclose(values, curves["1-stage0"], rtol=0, atol=2e-5, err_msg=case)


def test_a_reference_table_is_made_once(launched):
    """The first run of a launch scores; the others, on the same weights and pairs, find the table."""
    assert launched[1].count("to score") == 3 * 2  # llama's, gpt2's and the groups', training and held-out pairs
    assert "found in the table" in launched[1]
