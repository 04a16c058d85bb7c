"""How time and memory grow with the work: pairs, prompt length, ranks, model size.

    python benchmarks/scaling.py [pairs rows prompts ranks export]        (about 40 minutes on two cores)

pairs      load, check, tokenise and deal pairs, and write a reference table, for each size in its own process; the
           pairs are real dialogues, repeated with a number in each
rows       the same for 100,000 and a million rows of 2 KB: real dialogues put together, with a number in each
prompts    one step's time and peak memory for each length of prompt
ranks      the same steps on 1, 2 and 4 gloo ranks
export     the merged folder of a checkpoint, for each size of model

Figures and a plot are written to benchmarks/results/scaling_*.json and .png.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import work

sys.path.insert(0, str(work.ROOT / "tests" / "tools"))

from memory import Peak, resident

HERE = Path(__file__).resolve().parent
PAIRS = (100, 1_000, 10_000, 100_000)
ROWS, ROW_BYTES = (100_000, 1_000_000), 2_000
PROMPTS = (128, 256, 512, 1024, 2048)
RANKS = (1, 2, 4)
LAYERS = (6, 24, 96)


def child(task: str, *words) -> dict:
    """Runs `task` of this file in its own process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, *map(str, words)], capture_output=True, text=True, cwd=work.ROOT
    )
    return work.required_result_of(done)


# ---------------------------------------------------------------------------------------------------------------- pairs


def family_resident() -> int:
    """Bytes of this process's memory and its children's. Memory that they share counts once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total


def data_path(file: str, model: str, folder: str) -> dict:
    """Loads, checks and tokenises; deals an epoch; fills a table's file. Returns the seconds of each, and the most
    memory that this process, the child that tokenises and its workers took together."""
    import numpy as np

    from dpo_ds.config import parse_options
    from dpo_ds.data.steps import Schedule, deal
    from dpo_ds.models.files import load_tokenizer
    from dpo_ds.models.find import find_model
    from dpo_ds.ranks.world import from_environment
    from dpo_ds.references.table import Table
    from dpo_ds.runs.data import load_pairs

    options = parse_options(
        ["--model", model, "--dataset", file, "--cache_dir", folder, "--max_length", "1024", "--eval_pairs", "0"]
    )
    tokenizer = load_tokenizer(find_model(model))
    before, peak = family_resident(), Peak(family_resident, every=0.05)
    began = time.perf_counter()
    pairs, _ = load_pairs(options, tokenizer, from_environment(), "2026-01-01")
    tokenised = time.perf_counter()
    again, _ = load_pairs(options, tokenizer, from_environment(), "2026-01-01")
    assert len(again) == len(pairs)
    reopened = time.perf_counter()
    schedule = Schedule.of(pairs.pair_groups, 64, 1.0, None, work.SEED)
    for number in range(schedule.steps):
        deal(pairs.parts(schedule.step(number), 8192), 8, 8192)
    dealt = time.perf_counter()
    table = Table(Path(folder), {"benchmark": len(pairs)}, len(pairs.answers))
    rows = table.open_to_fill(table.read())
    for start in range(0, table.rows, 4096):
        places = np.arange(start, min(start + 4096, table.rows))
        table.write(rows, places, np.full(len(places), -1.0, dtype=np.float32))
    table.close()
    return {
        "pairs": len(pairs),
        "tokenise s": tokenised - began,
        "open again s": reopened - tokenised,
        "deal s": dealt - reopened,
        "table s": time.perf_counter() - dealt,
        "memory MiB": (peak.value - before) / 2**20,
    }


def index_of(count: str) -> dict:
    """The memory of an index of that many pairs: what a run holds of them besides the memory-mapped tokens."""
    import numpy as np

    from dpo_ds.data.held_out import KEYS
    from dpo_ds.data.pairs import PairSet
    from dpo_ds.data.steps import Schedule, deal

    n = int(count)
    before, peak = resident(), Peak()
    lengths = np.random.default_rng(0).integers(20, 300, (n, 3))
    starts = 900 * np.arange(n)[:, None] + np.cumsum(lengths, axis=1) - lengths
    sequences = np.stack([starts, lengths], axis=2)
    pairs = PairSet(
        tokens=np.zeros(0, dtype=np.int32),
        scored=np.zeros(0, dtype=np.uint8),
        prompts=sequences[:, 0].copy(),
        prompt_gaps=np.zeros((n, 2, 2), dtype=np.int32),
        prompt_hashes=np.ones((n, 16), dtype=np.uint8),
        prompt_keys=np.ones((n, KEYS, 16), dtype=np.uint8),
        answers=sequences[:, 1:].reshape(-1, 2).copy(),
        answer_cuts=np.zeros(2 * n, dtype=np.int32),
        answer_groups=np.repeat(np.arange(n), 2),
        answer_ids=np.ones((2 * n, 16), dtype=np.uint8),
        pairs=np.arange(2 * n).reshape(n, 2),
        rows=np.arange(n),
        sources=np.zeros(n, dtype=np.int64),
        weights=np.ones(n, dtype=np.float32),
        margins=np.full(n, np.nan, dtype=np.float32),
        pair_ids=np.ones((n, 16), dtype=np.uint8),
    )
    del lengths, starts, sequences
    schedule = Schedule.of(pairs.pair_groups, 64, 1.0, None, work.SEED)
    began = time.perf_counter()
    for number in range(20):
        deal(pairs.parts(schedule.step(number), 8192), 8, 8192)
    seconds = (time.perf_counter() - began) / 20
    time.sleep(0.02)  # so that the peak is read once more
    return {"pairs": n, "a step's dealing s": seconds, "memory MiB": (peak.value - before) / 2**20}


def grow_pairs(folder: Path) -> list[dict]:
    model = work.make_model(folder / "model", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    real, rows = work.read("hh"), []
    for count in PAIRS:
        file = folder / f"{count}.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for number in range(count):
                row = real[number % len(real)]
                lines.write(json.dumps({**row, "prompt": f"\n\nHuman: {number}.{row['prompt']}"}) + "\n")
        rows.append(child("data_path", file, model, folder / f"cache-{count}"))
        print(json.dumps(rows[-1]), flush=True)
    index = child("index_of", 1_000_000)
    print(json.dumps(index), flush=True)
    return [*rows, {"index": index}]


def grow_rows(folder: Path) -> list[dict]:
    """With a tokenizer of whole words, whose own time is small: GPT-2's takes three quarters of the time with it."""
    model = work.make_model(folder / "model", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    real, rows = work.read("hh"), []
    words_only(real).save_pretrained(model)
    for count in ROWS:
        file = folder / f"{count}.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for number in range(count):
                lines.write(json.dumps(long_row(real, number)) + "\n")
        found = child("data_path", file, model, folder / f"cache-{count}")
        rows.append({"file MiB": file.stat().st_size / 2**20, **found})
        print(json.dumps(rows[-1]), flush=True)
        file.unlink()
    return rows


def words_only(rows: list[dict]):
    """A tokenizer whose tokens are the words of these rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=20_000, special_tokens=["<unk>", "<eos>"])
    backend.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def long_row(real: list[dict], number: int) -> dict:
    """A row of about ROW_BYTES bytes: dialogues one after another as the prompt, the last one's answers."""
    row = real[number % len(real)]
    prompt, at = row["prompt"], number
    while len(prompt) + len(row["chosen"]) + len(row["rejected"]) < ROW_BYTES - 300:
        at += 1
        earlier = real[at % len(real)]
        prompt = earlier["prompt"] + earlier["chosen"] + prompt
    return {**row, "prompt": f"\n\nHuman: {number}.{prompt}"}


# -------------------------------------------------------------------------------------------------------------- prompts


def grow_prompts(folder: Path) -> list[dict]:
    model, words = work.make_model(folder / "model"), work.tokenizer()
    text = words(" ".join(row["prompt"] for row in work.read("hh")[:400]), verbose=False)["input_ids"]
    rows = []
    for length in PROMPTS:
        file = folder / f"{length}.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for n in range(2 * work.BATCH):
                parts = (text[n * 211 :][:length], text[5000 + n * 97 :][:100], text[9000 + n * 89 :][:100])
                row = dict(zip(("prompt", "chosen", "rejected"), map(words.decode, parts), strict=True))
                lines.write(json.dumps(row) + "\n")
        found = work.required_result_of(
            subprocess.run(
                [sys.executable, HERE / "one_ours.py", model, file, "2400", folder / f"run-{length}"],
                capture_output=True, text=True, cwd=work.ROOT,
            )
        )  # fmt: skip
        rows.append(
            {
                "prompt tokens": length,
                "step s": found["step_seconds"][-1],
                "peak MiB": found["peak_memory"] / 2**20,
                "FLOPs of a large product's": found["flops"]
                * 0.75  # the reference's forward, a quarter of the FLOPs, is not in the step
                / found["step_seconds"][-1]
                / found["matmul"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------- ranks


def grow_ranks(folder: Path) -> list[dict]:
    model = work.make_model(folder / "model")
    file, _ = work.write_pairs("hh", 96, folder)
    rows = []
    for ranks in RANKS:
        run = folder / f"run-{ranks}"
        launcher = [sys.executable, "-m", "dpo_ds.deepspeed_command", "--num_gpus", str(ranks), "-m", "dpo_ds.train"]
        launcher = launcher if ranks > 1 else [sys.executable, "-m", "dpo_ds.train"]
        options = (
            f"--model {model} --dataset {file} --output_dir {run} --cache_dir {folder}/cache-{ranks} --eval_pairs 0 "
            "--global_batch_pairs 32 --export none --generations 0 --ds_config zero2_small --max_length 1024"
        )
        done = subprocess.run([*launcher, *options.split()], capture_output=True, text=True, cwd=work.ROOT)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        speeds = [step["pairs/s"] for step in steps[1:]]
        rows.append({"ranks": ranks, "pairs/s": sum(speeds) / len(speeds), "loss": [step["loss"] for step in steps]})
        rows[-1]["over one rank"] = rows[-1]["pairs/s"] / rows[0]["pairs/s"]
        print(json.dumps(rows[-1]), flush=True)
    return rows


# --------------------------------------------------------------------------------------------------------------- export


def export_one(checkpoint: str, folder: str) -> dict:
    from dpo_ds import export

    export.SHARD_BYTES = 50_000_000
    before, peak = resident(), Peak()
    began = time.perf_counter()
    export.main(["--checkpoint", checkpoint, "--output_dir", folder])
    return {"seconds": time.perf_counter() - began, "memory MiB": (peak.value - before) / 2**20}


def grow_export(folder: Path) -> list[dict]:
    file, _ = work.write_pairs("hh", 8, folder)
    rows = []
    for layers in LAYERS:
        model = work.make_model(folder / f"model-{layers}", num_hidden_layers=layers)
        run = folder / f"run-{layers}"
        options = (
            f"--model {model} --dataset {file} --output_dir {run} --cache_dir {folder}/cache --eval_pairs 0 "
            "--global_batch_pairs 8 --export none --generations 0 --ds_config zero2_small --max_length 256 "
            "--max_steps 1"
        )
        subprocess.run([sys.executable, "-m", "dpo_ds.train", *options.split()], check=True, capture_output=True)
        found = child("export_one", next((run / "checkpoints").glob("step-*")), folder / f"merged-{layers}")
        size = sum(file.stat().st_size for file in (folder / f"merged-{layers}").glob("*.safetensors"))
        rows.append({"layers": layers, "model MiB": size / 2**20, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------------- main

# The plots: (x, [y], whether both axes are logarithmic)
PLOTS = {
    "pairs": ("pairs", ["tokenise s", "open again s", "deal s", "table s", "memory MiB"], True),
    "rows": ("pairs", ["tokenise s", "open again s", "deal s", "table s", "memory MiB"], True),
    "prompts": ("prompt tokens", ["step s", "peak MiB"], True),
    "ranks": ("ranks", ["over one rank"], False),
    "export": ("model MiB", ["seconds", "memory MiB"], True),
}
TASKS = {"pairs": grow_pairs, "rows": grow_rows, "prompts": grow_prompts, "ranks": grow_ranks, "export": grow_export}
CHILDREN = {"data_path": data_path, "index_of": index_of, "export_one": export_one}


def plot(name: str, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, columns, logarithmic = PLOTS[name]
    rows = [row for row in rows if x in row]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for column in columns:
        axes.plot([row[x] for row in rows], [row[column] for row in rows], marker="o", label=column)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(work.RESULTS / f"scaling_{name}.png", dpi=110, bbox_inches="tight")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        task, *words = sys.argv[2:]
        print("RESULT " + json.dumps(CHILDREN[task](*words)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    os.environ["PYTHONPATH"] = f"{work.ROOT}:{os.environ.get('PYTHONPATH', '')}"
    work.RESULTS.mkdir(exist_ok=True)
    for name in parser.parse_args().tasks:
        with tempfile.TemporaryDirectory() as folder:
            rows = TASKS[name](Path(folder))
        facts = {"machine": work.machine(), "rows": rows}
        (work.RESULTS / f"scaling_{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        plot(name, rows)


if __name__ == "__main__":
    main()
