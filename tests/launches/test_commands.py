"""The main job as users start it: every launcher, the same run; and what a fresh user's run leaves behind."""

import json
import math
import sys
from pathlib import Path

import launching
import numpy as np
import pytest
import tiny

from dpo_ds.config import parse_options

OPTIONS = [
    "--dataset=sample", "--max_steps=3", "--global_batch_pairs=8", "--max_length=96", "--eval_pairs=8",
    "--learning_rate=1e-3", "--export=none", "--precision=fp32",
]  # fmt: skip
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("commands")
    tiny.make("llama", place / "llama")
    return place


def started(place, name: str, *words) -> list[float]:
    options = [*OPTIONS, f"--output_dir={place / name}", f"--cache_dir={place / 'cache'}"]
    launching.execute([*map(str, words), *options], env=launching.environment(), cwd=place)
    return launching.curve(place / name)


def test_every_launcher_starts_the_same_run(place):
    model, shared = place / "llama", Path("/dev/shm")
    before = set(shared.glob("deepspeed_*"))
    script = launching.ROOT / "launch" / "train_dpo.py"
    command = [sys.executable, "-m", "dpo_ds.deepspeed_command", "--master_port", launching.free_port()]
    port = ["--master_port", launching.free_port()]
    curves = {
        "python": started(place, "a", sys.executable, "-m", "dpo_ds.train", "--model", model),
        "python script": started(place, "b", sys.executable, script, "--model_name", model),
        # Three: more than this machine's cores, where ranks wait until rank 0 has planned.
        "deepspeed -m": started(place, "c", *command, "--num_gpus", 3, "-m", "dpo_ds.train", "--model", model),
        "deepspeed --module": started(
            place, "d", *command, "--num_gpus", 1, "--module", "dpo_ds.train", "--model", model
        ),
        "torchrun": started(
            place, "e", BIN / "torchrun", *port, "--nproc_per_node", 2, "-m", "dpo_ds.train", "--model", model
        ),
        "accelerate": started(
            place, "f", BIN / "accelerate", "launch", "--cpu", "--num_processes", 1, "--num_machines", 1,
            "--mixed_precision", "no", "--dynamo_backend", "no", script, "--model_name", model
        ),
    }  # fmt: skip
    for name, curve in curves.items():
        assert abs(curve[0] - math.log(2)) < 1e-5, name
        np.testing.assert_allclose(curve, curves["python"], rtol=0, atol=1e-5, err_msg=name)
    left = set(shared.glob("deepspeed_*")) - before
    assert not left, "memory of the machine that nobody has any more"


def test_the_run_says_what_it_used(place):
    """options.yaml holds every decision and starts the same run again."""
    if not (place / "a").exists():
        started(place, "a", sys.executable, "-m", "dpo_ds.train", "--model", place / "llama")
    options = parse_options(["--config", str(place / "a" / "options.yaml")])
    assert options.micro_batch_tokens and options.precision == "fp32" and options.learning_rate == 1e-3
    record = json.loads((place / "a" / "run.json").read_text())
    assert record["model"] == str(place / "llama") and len(record["train_digest"]) == 64
    line = launching.metrics(place / "a")[-1]
    step = launching.metrics(place / "a")[1]
    assert set(step) == {
        "step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected", "logps_per_token/chosen",
        "logps_per_token/rejected", "log_ratios/chosen", "log_ratios/rejected", "kl", "grad_norm", "learning_rate",
        "clipped", "applied", "tokens/s", "pairs/s", "TFLOP/s a rank",
    }  # fmt: skip
    steps = [line for line in launching.metrics(place / "a") if "grad_norm" in line]
    assert [line["clipped"] for line in steps] == [line["grad_norm"] > options.max_grad_norm for line in steps]
    assert line["step"] == 3 and "eval/rewards/accuracies" in line
