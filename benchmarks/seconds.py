"""How long a step takes by `--plan measure`, beside real runs: four of the twins, and three sizes of Llama.

    python benchmarks/seconds.py [--models gpt2 17 …] [--steps 8]

Two ranks on the CPU, pairs of HH. A real run comes first; the median of its steps, the first left out, is what is
compared. `--plan measure` is then asked about pairs of its mean length. Written to results/seconds.json.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import work

sys.path.insert(0, str(work.ROOT / "tests" / "tools"))

import launching
import tiny

TWINS = ("gpt2", "Qwen/Qwen2-7B-Instruct", "google/gemma-7b-it", "mistralai/Mixtral-8x7B-Instruct-v0.1")
SIZES = {"17": (256, 704, 6), "78": (768, 2048, 6), "155": (768, 2048, 18)}  # hidden size, intermediate size, layers
RANKS = 2


def argv(place: Path, model: Path, tier: str, **more: object) -> list[str]:
    options = {
        "model": model, "dataset": place / "hh.jsonl", "ds_config": tier, "output_dir": place / "run",
        "cache_dir": place / "cache", "global_batch_pairs": 16, "max_length": 256, "eval_pairs": 0, "export": "none",
        "precision": "fp32", "loss": "simpo", **more,
    }  # fmt: skip
    return ["-m", "dpo_ds.train", *(f"--{name}={value}" for name, value in options.items())]


def compared(name: str, place: Path, steps: int) -> dict:
    model = place / "model"
    steps *= 1 if name in SIZES else 5  # a twin's step takes a fifth of a second
    work.write_pairs("hh", 16 * steps, place)
    if name in SIZES:
        hidden, intermediate, layers = SIZES[name]
        work.make_model(model, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    else:
        tiny.make(name, model)
    tier = "zero3_standard"
    launching.execute(launching.command(RANKS, *argv(place, model, tier, max_steps=steps)), env=launching.environment())
    lines = [line for line in launching.metrics(place / "run") if "pairs/s" in line][1:]
    real = statistics.median(16 / line["pairs/s"] for line in lines)
    tokens = round(statistics.mean(line["tokens/s"] / line["pairs/s"] for line in lines))
    words = argv(place, model, tier, plan="measure", pair_tokens=tokens)
    said = launching.execute(launching.command(RANKS, *words), env=launching.environment()).stdout
    (line,) = [line for line in said.splitlines() if "dpo_ds: measured with" in line]
    measured = float(re.search(r"layers: ([\d.]+) s a step", line)[1])
    return {"model": name, "pair_tokens": tokens, "real": real, "measured": measured, "said": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=(*TWINS, *SIZES), default=[*TWINS, *SIZES])
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as place:
            rows.append(compared(name, Path(place), arguments.steps))
        row = rows[-1]
        print(
            f"{name}: {row['measured']:.3f} s by --plan measure, {row['real']:.3f} s in a run: "
            f"{row['measured'] / row['real']:.2f}",
            flush=True,
        )
        result = {"machine": work.machine(), "ranks": RANKS, "rows": rows}
        (work.RESULTS / "seconds.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
