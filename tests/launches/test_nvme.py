"""Optimizer and parameters on NVMe (any drive will do): the curve, the resume and the exports of a run without it.

DeepSpeed keeps what is below 1 MiB a rank in memory, so the model here is larger than the other tests'.
"""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import launching
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpo_ds.embedded import model_folder

RANKS, STEPS, SAVE, STOP = 2, 4, 2, 3
LARGEST = 1024 * 512  # elements: embeddings, output head and the MLPs' matrices, 1 MiB on each of two ranks in fp32

# name: (ds_config, further options); weight decay puts the norms into a group of their own, too small for a swap file
CASES = {
    "cpu-resumed": ("cpu", {"save_every": SAVE}),
    "optimizer": ("optimizer", {}),
    "both-live": ("both", {"reference": "live"}),
    "both-resumed": ("both", {"save_every": SAVE}),
}

BUILD = """
from deepspeed.ops.op_builder import AsyncIOBuilder
import sys
from dpo_ds.engine import ops
ops.build_in_turns(speaks=False)
AsyncIOBuilder().load(verbose=False) if AsyncIOBuilder().is_compatible() else sys.exit("libaio-dev is not installed")
"""


def ds_config(where: str) -> dict:
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1_000_000,  # three groups of parameters a rank
        "offload_optimizer": {"device": "cpu"},
    }
    if where != "cpu":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": "auto"}
    if where == "both":
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_max_reuse_distance": "auto"}
        zero["offload_param"] = {
            "device": "nvme", "nvme_path": "auto", "buffer_count": 5, "buffer_size": "auto", "max_in_cpu": "auto",
        }  # fmt: skip
    return {"zero_optimization": zero}


@pytest.fixture(scope="module")
def async_io():
    """DeepSpeed's op, built before the ranks ask for it: minutes once, then seconds."""
    built = subprocess.run(
        [sys.executable, "-c", BUILD], env=launching.environment(), capture_output=True, text=True, timeout=1200
    )
    if built.returncode != 0:
        pytest.skip(f"DeepSpeed's async_io op cannot be had here: {built.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory, async_io):
    """All cases in one launch, with what was seen in the swap folder meanwhile."""
    place = tmp_path_factory.mktemp("nvme")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.COMMON, **sizes}))
    assert max(p.numel() for p in model.parameters()) == LARGEST
    model.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(place / "model")
    (place / "swap").mkdir()
    scenarios = []
    for case, (where, extra) in CASES.items():
        (place / f"{where}.json").write_text(json.dumps(ds_config(where)))
        options = {
            "model": place / "model",
            "dataset": "sample",
            "ds_config": place / f"{where}.json",
            "output_dir": place / case,
            "cache_dir": place / "cache",
            "max_steps": STEPS,
            "global_batch_pairs": 4,
            "learning_rate": 2e-4,
            "weight_decay": 0.1,
            "max_length": 96,
            "eval_pairs": 4,
            "eval_every": 0,
            "micro_batch_tokens": 100,  # several micro-batches a step
            "precision": "fp32",
            "generations": 0,
            "nvme_path": place / "swap",
            **extra,
        }
        scenario = {"argv": [f"--{key}={value}" for key, value in options.items()]}
        if "resumed" in case:
            scenarios.append({**scenario, "stop_after": STOP})
        scenarios.append(scenario)
    ended = threading.Event()
    seen: dict[str, int] = {}
    watcher = threading.Thread(target=watch, args=(place / "swap", ended, seen))
    watcher.start()
    try:
        printed = launching.run_scenarios(RANKS, scenarios, place / "scenarios.json")
    finally:
        ended.set()
        watcher.join()
    (place / "printed.txt").write_text(printed)
    (place / "seen.json").write_text(json.dumps(seen))
    return place


def watch(folder: Path, ended: threading.Event, seen: dict[str, int]) -> None:
    """Notes the size of every swap file that is ever there, by its path below the folder."""
    while not ended.wait(0.05):
        with contextlib.suppress(FileNotFoundError):  # a file or folder removed in between
            for path in folder.glob("**/*.swp"):
                seen[str(path.relative_to(folder))] = path.stat().st_size


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", [case for case in CASES if case != "cpu-resumed"])
def test_the_curve_is_the_one_without_nvme(case, place):
    curve = launching.curve(place / case)
    assert len(curve) == STEPS and max(abs(np.diff(curve))) > 0.005
    np.testing.assert_allclose(curve, launching.curve(place / "cpu-resumed"), rtol=0, atol=1e-5)
    norms = [launching.curve(place / name, "grad_norm") for name in (case, "cpu-resumed")]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_a_resumed_run_is_bit_identical(place):
    """Weights, moments, step count and learning rate of every group, also of the one that is in memory."""
    straight = weights(place / "both-live" / "merged")
    for case in ("both-resumed", "cpu-resumed"):
        assert f"from {place / case}/checkpoints/step-00000{SAVE}" in (place / "printed.txt").read_text()
        assert launching.curve(place / case) == launching.curve(place / "both-live")
        for name, tensor in weights(place / case / "merged").items():
            assert torch.equal(tensor, straight[name]), name


def test_what_was_on_the_drive(place):
    """Parameters of policy and reference, masters, Adam's moments and gradients, of every rank; nothing at the end."""
    seen = json.loads((place / "seen.json").read_text())
    for rank in range(RANKS):
        for kind in ("policy/zero_stage_3/float32params", "reference/zero_stage_3/float32params"):
            sizes = {size for path, size in seen.items() if f"{kind}/rank{rank}/" in path}
            assert sizes == {4 * LARGEST // RANKS}, kind
        states = [path for path in seen if f"policy/zero_stage_3/optimizer/rank{rank}/" in path]
        for state in ("exp_avg-", "exp_avg_sq-", "gradient"):
            assert any(state in path for path in states), state
    assert not [path for path in (place / "swap").glob("**/*") if path.is_file()], "files stayed"


@pytest.mark.parametrize("case", CASES)
def test_exports_agree(case, place):
    """From the live engine, from its checkpoint (one process, which has no NVMe), and without NVMe."""
    from dpo_ds import export

    live, plain = weights(place / case / "merged"), weights(place / "cpu-resumed" / "merged")
    last = place / case / "checkpoints" / f"step-{STEPS:06d}"
    again = weights(export.export_checkpoint(last, place / f"{case}-again"))
    assert set(live) == set(again) == set(plain)
    for name, tensor in live.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(tensor, plain[name], atol=1e-5, rtol=0)


def test_traces_are_never_invalidated(place):
    assert "nvalidate trace" not in (place / "printed.txt").read_text()
