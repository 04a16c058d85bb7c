"""Every kind of reference, and adapters to start from, on real runs against plain transformers and peft.

ZeRO-0 and ZeRO-3, 1 and 2 ranks, offload, a stop and a resume.
"""

import json
import math

import adapters
import launching
import numpy as np
import oracle
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dpo_ds.data.steps import Schedule

STEPS, BATCH, RATE = 6, 6, 5e-3
SAVE, STOP = 2, 3  # a resumed run does step 3 twice

SFT = {"adapter": "sft"}
MOVING = {"reference": "live", "reference_update_every": 2, "reference_update_alpha": 0.3}
# name: (ranks, model, DeepSpeed config, options, what the oracle does; names are of adapters)
CASES = {
    "1-adapter": (1, "llama", "stage0", SFT, "sft against sft"),
    "1-adapter-stage3-small": (1, "llama", "stage3", {**SFT, "micro_batch_tokens": 320}, "sft against sft"),
    "2-adapter-stage3": (2, "llama", "stage3", SFT, "sft against sft"),
    "2-adapter-stage3-live": (2, "llama", "stage3", {**SFT, "reference": "live"}, "sft against sft"),
    "2-adapter-stage3-resumed": (2, "llama", "stage3", {**SFT, "save_every": SAVE}, "sft against sft"),
    "1-adapter-base": (1, "llama", "stage0", {**SFT, "reference": "base"}, "sft against base"),
    "2-adapter-base-stage3": (2, "llama", "stage3", {**SFT, "reference": "base"}, "sft against base"),
    "1-adapter-other": (1, "llama", "stage0", {**SFT, "reference_adapter": "other"}, "sft against other"),
    "2-adapter-other-stage3-live": (
        2, "llama", "stage3", {**SFT, "reference_adapter": "other", "reference": "live"}, "sft against other"),
    "1-gpt2-adapter": (1, "gpt2", "stage0", {"adapter": "conv"}, "conv against conv"),
    "1-moving": (1, "llama", "stage0", MOVING, "all against base, moving 2 0.3"),
    "1-moving-stage3": (1, "llama", "stage3", MOVING, "all against base, moving 2 0.3"),
    "2-moving-stage0": (2, "llama", "stage0", MOVING, "all against base, moving 2 0.3"),
    "2-moving-stage2": (2, "llama", "stage2", {**MOVING, "micro_batch_tokens": 320}, "all against base, moving 2 0.3"),
    "2-moving-stage3": (2, "llama", "stage3", MOVING, "all against base, moving 2 0.3"),
    # Here small parameters stay gathered.
    "2-moving-stage3-offload": (2, "llama", "stage3-offload", MOVING, "all against base, moving 2 0.3"),
    "1-moving-resumed": (1, "llama", "stage0", {**MOVING, "save_every": SAVE}, "all against base, moving 2 0.3"),
    "2-moving-stage3-resumed": (2, "llama", "stage3", {**MOVING, "save_every": SAVE}, "all against base, moving 2 0.3"),
    "2-moving-hard-stage3": (
        2, "llama", "stage3", {**MOVING, "reference_update_alpha": 1}, "all against base, moving 2 1"),
    "1-still": (1, "llama", "stage0", {"reference": "live"}, "all against base"),
    "1-all-other": (1, "llama", "stage0", {"reference_adapter": "other"}, "all against other"),
}  # fmt: skip


def ds_config(name: str) -> dict:
    stage, *offload = name.removeprefix("stage").split("-")
    zero = {"stage": int(stage)}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    if stage == "3" and not offload:
        zero |= {"stage3_param_persistence_threshold": 0}
    return {"zero_optimization": zero, "gradient_clipping": "auto", "train_batch_size": "auto"}


def straight(case: str) -> str:
    return case.removesuffix("-resumed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("references")
    for name in ("llama", "gpt2"):
        tiny.make(name, place / name)
    adapters.make(place / "llama", place / "sft", target_modules=["q_proj", "down_proj"])
    adapters.make(place / "llama", place / "other", seed=1, r=2, use_rslora=True, target_modules="all-linear")
    adapters.make(place / "gpt2", place / "conv", target_modules=["c_attn"], fan_in_fan_out=True)
    return place


@pytest.fixture(scope="module")
def launched(place) -> dict[int, str]:
    scenarios: dict[int, list] = {1: [], 2: []}
    for case, (ranks, model, tier, extra, _) in CASES.items():
        (place / f"{tier}.json").write_text(json.dumps(ds_config(tier)))
        options = {
            "model": place / model, "dataset": "sample", "ds_config": place / f"{tier}.json",
            "output_dir": place / case, "cache_dir": place / f"cache-{ranks}", "max_steps": STEPS,
            "global_batch_pairs": BATCH, "learning_rate": RATE,
            "max_length": 96, "eval_pairs": 8, "eval_every": 2, "micro_batch_tokens": 4000,
            "export": "none", "precision": "fp32", "plan": "off", **extra,
        }  # fmt: skip
        for name in ("adapter", "reference_adapter"):
            if name in options:
                options[name] = place / options[name]
        if case == "2-adapter-stage3":
            options |= {"export": "merged", "generations": 1}
        scenario = {"argv": [f"--{key}={value}" for key, value in options.items()]}
        if "resumed" in case:
            scenarios[ranks].append({**scenario, "stop_after": STOP})
        scenarios[ranks].append(scenario)
    return {ranks: launching.run_scenarios(ranks, runs, place / f"{ranks}.json") for ranks, runs in scenarios.items()}


def model_of(place, base: str, name: str, train: bool):
    if name in ("base", "all"):
        return oracle.load(place / base)
    return PeftModel.from_pretrained(oracle.load(place / base), place / name, is_trainable=train).eval()


@pytest.fixture(scope="module")
def expected(place, launched) -> dict:
    """The oracle's curves, on the pairs of the runs, and the policies that it trained."""
    from dpo_ds.data.pairs import PairSet
    from dpo_ds.runs.data import hold_out

    (pairs,) = [PairSet.open(path.parent) for path in (place / "cache-1" / "tokens").glob("*/manifest.json")]
    train, _ = hold_out(pairs, 8)
    schedule = Schedule.of(train.pair_groups, BATCH, 1, STEPS, seed=42)
    steps = [[train.pair(i) for i in schedule.step(number)] for number in range(STEPS)]
    found = {}
    for _, base, _, _, which in CASES.values():
        start, _, against = which.partition(" against ")
        against, _, moves = against.partition(", moving ")
        if (base, which) not in found:
            models = model_of(place, base, start, True), model_of(place, base, against, False)
            moving = tuple(map(float, moves.split())) if moves else None
            warmup = round(0.1 * STEPS)
            curve = oracle.train(None, steps, learning_rate=RATE, warmup=warmup, models=models, moving=moving)
            found[base, which] = curve, models[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_oracles_curve(case, place, launched, expected):
    _, base, _, _, which = CASES[case]
    curve = launching.curve(place / case)
    assert len(curve) == STEPS
    np.testing.assert_allclose(curve, expected[base, which][0], rtol=0, atol=1e-5)
    start, _, against = which.partition(" against ")
    equal = start == against.partition(",")[0] or (start == "all" and against.startswith("base"))
    assert (abs(curve[0] - math.log(2)) < 1e-5) == equal
    if "resumed" in case:
        assert f"from {place / case}/checkpoints/step-00000{SAVE}" in launched[CASES[case][0]]
        assert curve == launching.curve(place / straight(case)), "to the bit"
        values = [launching.curve(place / name, "eval/loss") for name in (case, straight(case))]
        assert values[0][-2:] == values[1][-2:]


def test_the_curves_can_tell_references_apart(expected):
    curves = [curve for curve, _ in expected.values()]
    for n, curve in enumerate(curves):
        assert np.ptp(curve) > 1e-3
        assert all(np.abs(np.subtract(curve, other)).max() > 1e-4 for other in curves[:n])


def test_zero3_traces_are_never_invalidated(launched):
    assert "nvalidate trace" not in launched[1] + launched[2]


def test_the_merged_model_is_what_peft_merges(place, launched, expected, tmp_path):
    """From the live engine, and from a checkpoint."""
    from dpo_ds.export import export_checkpoint

    merged = expected["llama", "sft against sft"][1].merge_and_unload().state_dict()
    checkpoint = place / "2-adapter-stage3" / "checkpoints" / f"step-00000{STEPS}"
    for folder in (place / "2-adapter-stage3" / "merged", export_checkpoint(checkpoint, tmp_path / "exported")):
        for name, tensor in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-4, atol=1e-4)
    assert "before:" in launched[2]


def test_an_adapters_files_are_in_the_tables_key(place, launched):
    tables = [json.loads(path.read_text()) for path in (place / "cache-1" / "reference").glob("*/table.json")]
    with_adapter = [set(table["weights"]) for table in tables if any("adapter" in name for name in table["weights"])]
    files = {"config.json", "model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert len(with_adapter) == 6 and all(names == files for names in with_adapter)  # sft, other, conv; two sets each


def test_a_moving_references_evaluations_agree(place, launched):
    """Held-out pairs are scored again once the reference has moved."""
    curves = [launching.curve(place / case, "eval/loss") for case in CASES if CASES[case][4].endswith("moving 2 0.3")]
    for curve in curves:
        np.testing.assert_allclose(curve, curves[0], rtol=0, atol=2e-5)
    still = launching.curve(place / "1-still", "eval/loss")
    assert still[:1] == pytest.approx(curves[0][:1]) and abs(still[-1] - curves[0][-1]) > 1e-3


def test_no_rank_writes_more_of_a_reference_than_it_holds(place, launched):
    numbers = sum(p.numel() for p in oracle.load(place / "llama").parameters())
    for case, files in (("1-moving-resumed", 1), ("2-moving-stage2", 1), ("2-moving-stage3-resumed", 2)):
        folder = place / case / "checkpoints" / f"step-00000{STEPS}"
        parts = [sum(t.numel() for t in load_file(file).values()) for file in folder.glob("reference-*")]
        assert len(parts) == files and all(numbers / files <= part <= numbers / files + 100 for part in parts)
