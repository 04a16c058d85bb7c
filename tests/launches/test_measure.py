"""--plan measure: real ranks train a few layers, say how long a step takes, and leave nothing behind."""

import re

import launching
import pytest
import tiny

from dpo_ds.runs.measure import Times


@pytest.mark.parametrize(
    ("ranks", "model", "more"),
    [
        (1, "gpt2", []),
        (2, "mistralai/Mixtral-8x7B-Instruct-v0.1", ["--ds_config=zero3_standard", "--recomputed_layers=1"]),
        (2, "gemma2", ["--lora", "--ds_config=zero3_lora_large", "--precision=bf16"]),
    ],
)
def test_it_says_how_long_a_step_takes(ranks, model, more, tmp_path):
    tiny.make(model, tmp_path / "model")
    words = ["--model", tmp_path / "model", "--plan", "measure", "--pair_tokens", "60", "--global_batch_pairs", "8",
             "--max_length", "64", "--micro_batch_tokens", "127", "--output_dir", tmp_path / "out",
             "--cache_dir", tmp_path / "cache"]  # fmt: skip
    said = launching.run(ranks, "-m", "dpo_ds.train", *words, *more).stdout
    (line,) = [line for line in said.splitlines() if "dpo_ds: measured with" in line]
    found = re.search(
        r"(\d) and (\d) of (\d) layers: ([\d.]+) s a step of 8 pairs of 60 tokens \((\d) micro-batch\(es\) a rank", line
    )
    few, many, layers, seconds, micro_batches = found.groups()
    assert 0 < int(few) < int(many) <= int(layers) and float(seconds) > 0
    assert int(micro_batches) == 4 / ranks, "two pairs of 60 tokens in each"
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").glob("measure-*"))


KNOWN = """
import dataclasses, sys
from dpo_ds.plan import seconds
from dpo_ds.plan.machine import Machine
from dpo_ds.plan.speeds import named
from dpo_ds.train import main

class Known(Machine):
    @classmethod
    def of(cls, options):
        return dataclasses.replace(Machine.of(options), speeds=named("a100-80"))

seconds.Machine = Known
main(sys.argv[1:])
"""


def test_a_run_says_what_is_expected(tmp_path):
    """As on a machine whose speeds are known; the steps' time on this one is another."""
    tiny.make("gpt2", tmp_path / "model")
    (tmp_path / "known.py").write_text(KNOWN)
    options = {
        "model": tmp_path / "model", "dataset": "sample", "max_steps": 2, "export": "none", "precision": "fp32",
        "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "max_length": 128, "eval_pairs": 0,
        "price_per_gpu_hour": 2,
    }  # fmt: skip
    said = launching.run(1, tmp_path / "known.py", *(f"--{key}={value}" for key, value in options.items())).stdout
    (line,) = [line for line in said.splitlines() if "dpo_ds: estimated for pairs of" in line]
    lengths = [line["tokens/s"] / line["pairs/s"] for line in launching.metrics(tmp_path / "out") if "pairs/s" in line]
    assert int(re.search(r"pairs of (\d+) tokens", line)[1]) == pytest.approx(sum(lengths) / len(lengths), rel=0.2)
    assert "64 pairs, 2 steps: " in line and " at 2 each (" in line


def test_the_line_through_two_models():
    two, four = Times(3.0, 4.0, 1.0, 0.5), Times(5.0, 7.0, 1.5, 0.4)
    assert two.at(0, four) == two and two.at(3, four) == Times(9.0, 13.0, 2.5, 0.5), "a line that falls is level"
