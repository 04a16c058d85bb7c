"""Runs dpo_ds.train on this machine: the tiny model at every ZeRO stage, then six layers of Llama-3-8B's shape.

    python benchmarks/gpu_train.py [--small] [--output FILE]

Each run is a process. Its exit code, losses, speed and MFU are kept, the GPU memory by the plan, and the most that
nvidia-smi saw. Six layers (2.4 B parameters, all weights, ZeRO-3) are the most that 128 GiB of host memory allow.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import work
from gpu_bench import SHAPE_8B, TINY, make_model, write_texts

TINY_RUN = "--model=tiny-gpt2 --dataset=sample --max_steps=4 --eval_pairs=20 --host_memory=100".split()
TIERS = ("zero2_small", "zero3_standard", "zero3_offload_large")
SIX_RUN = (
    "--max_length=1024 --chat_template=none --truncation=keep_start --global_batch_pairs=32 --eval_pairs=0 "
    "--loss=simpo --ds_config=zero3_standard --host_memory=100 --export=none --generations=0"
).split()


def gpu_memory_used() -> int:
    """MiB in use on the first GPU; 0 without a GPU."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, ValueError):
        return int(subprocess.run(words, capture_output=True, text=True).stdout)
    return 0


def train(folder: Path, words: list[str], seconds: float) -> dict:
    """Runs dpo_ds.train for at most that many seconds. Returns what is kept of it."""
    started, most, done = time.perf_counter(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], gpu_memory_used())

    if shutil.which("nvidia-smi"):
        threading.Thread(target=watch, daemon=True).start()
    command = [sys.executable, "-m", "dpo_ds.train", f"--output_dir={folder}", *words]
    process = subprocess.Popen(command, cwd=work.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    done.set()
    lines = []
    if (folder / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    later = steps[1:] or steps
    speeds = [key for key in ("pairs/s", "mfu") if later and key in later[0]]
    planned = [line for line in output.splitlines() if line.startswith("| **gpu**")]
    return {
        "passed": process.returncode == 0 and bool(steps),
        "exit code": process.returncode,
        "seconds": time.perf_counter() - started,
        "losses": [line["loss"] for line in steps],
        **{key: statistics.median(line[key] for line in later) for key in speeds},
        "MiB used at most": most[0] or None,
        "planned": planned[0] if planned else None,
        "end of output": None if process.returncode == 0 else output[-1500:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=90, help="for each run")
    parser.add_argument("--output", type=Path, default=work.RESULTS / "gpu_train.json")
    options = parser.parse_args()
    results = work.Results(options.output)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        cache = f"--cache_dir={place / 'cache'}"

        def attempt(title: str, *words: str) -> None:
            folder = place / title.replace(" ", "-")
            results.attempt("runs", {"run": title}, lambda: train(folder, [cache, *words], options.seconds))

        attempt("stage 0, checkpoint, export, generations", *TINY_RUN, "--save_every=2")
        for tier in TIERS:
            attempt(tier, *TINY_RUN, f"--ds_config={tier}", "--export=none", "--generations=0")
        from transformers import AutoTokenizer

        from dpo_ds.embedded import model_folder

        words = AutoTokenizer.from_pretrained(model_folder())
        model = make_model(place / "six", TINY if options.small else {**SHAPE_8B, "num_hidden_layers": 6}, words)
        lengths = (20, 20, 20) if options.small else (180, 350, 300)
        pairs = write_texts(lengths, 1024, 96 if options.small else 640, place / "six.jsonl", words)
        attempt("six layers of 8B", *SIX_RUN, f"--model={model}", f"--dataset={pairs}", "--max_steps=3" if options.small
                else "--max_steps=20", "--micro_batch_tokens=16384")  # fmt: skip
    return 0 if all(row["passed"] for row in results.facts["runs"]) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(work.ROOT))
    raise SystemExit(main())
