"""What the benchmarks share: a model folder, real pairs in a fixed order, measurements, and facts of the machine.

The model is a Llama of 17 M parameters with random weights and GPT-2's vocabulary. The pairs are real. They are read
from ../shared/data; DPO_DS_DATA names another place. The sets are HH harmless, AlpacaEval, and `long`. The last is cut
from HH's dialogues: its prompts have 2,048 tokens, its responses up to 100.
"""

import gzip
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DPO_DS_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results"
LONG_PROMPT, LONG_RESPONSE = 2048, 100
MAX_LENGTH = {"hh": 1024, "alpaca": 1024, "long": LONG_PROMPT + LONG_RESPONSE + 16}
SEED, BATCH, BETA, LEARNING_RATE = 42, int(os.environ.get("BENCH_PAIRS", 8)), 0.1, 1e-5
SHAPE = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704)


def tokenizer():
    from transformers import AutoTokenizer

    if not DATA.is_dir():
        raise SystemExit(f"the benchmarks' pairs are not in {DATA}: name their folder in DPO_DS_DATA")
    return AutoTokenizer.from_pretrained(DATA / "gpt2-tokenizer")


def make_model(folder: Path, **shape) -> Path:
    """A Llama of SHAPE with random, tied weights, and GPT-2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SHAPE, **shape},
        vocab_size=len(words),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def read(name: str) -> list[dict]:
    """Rows of prompt, chosen, rejected, in the file's order."""
    if name == "long":
        return _long_rows()
    file = {"hh": "hh-harmless/test.jsonl.gz", "alpaca": "alpaca-eval/pairs.jsonl.gz"}[name]
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if name == "alpaca":
        return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    return [row for row in map(_split_dialogue, rows) if row]


def _split_dialogue(row: dict) -> dict | None:
    turn = "\n\nAssistant:"
    (prompt, chosen), (same, rejected) = (row[key].rsplit(turn, 1) for key in ("chosen", "rejected"))
    if prompt != same or not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
        return None
    return {"prompt": prompt + turn, "chosen": chosen, "rejected": rejected}


def _long_rows() -> list[dict]:
    """HH's responses of 50 to 100 tokens. The prompt is 2,048 tokens of dialogues, and ends with the pair's own."""
    words = tokenizer()
    rows, before = [], []
    for row in read("hh"):
        prompt, chosen, rejected = (words(row[key], verbose=False)["input_ids"] for key in row)
        before = (before + prompt)[-LONG_PROMPT:]
        if len(before) == LONG_PROMPT and min(len(chosen), len(rejected)) >= LONG_RESPONSE // 2:
            parts = before, chosen[:LONG_RESPONSE], rejected[:LONG_RESPONSE]
            texts = [words.decode(part) for part in parts]
            if texts[1].strip() != texts[2].strip():
                rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        before = before + chosen
    return rows


def write_pairs(name: str, pairs: int, folder: Path) -> tuple[Path, Path]:
    """Writes the set's first rows twice: in the file's order, and in the order in which dpo_ds trains on them."""
    import numpy as np

    from dpo_ds.data.steps import Schedule

    rows = read(name)[:pairs]
    if len(rows) < pairs:
        raise SystemExit(f"{name} has {len(rows)} pairs, not {pairs}")
    schedule = Schedule.of(np.arange(pairs), BATCH, 1.0, None, SEED)
    ordered = [rows[i] for number in range(schedule.steps) for i in schedule.step(number)]
    files = folder / f"{name}.jsonl", folder / f"{name}-ordered.jsonl"
    for file, content in zip(files, (rows, ordered), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return files


def pack_pairs(pairs):
    """Pairs of token ids as one packed batch."""
    from dpo_ds.data.pairs import Group
    from dpo_ds.scoring.packed import pack

    return pack([Group.of_pair(*pair) for pair in pairs])


def result_of(done) -> dict | None:
    """The RESULT that a finished child process printed; None if it failed."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return None if done.returncode or not lines else json.loads(lines[0].removeprefix("RESULT "))


def required_result_of(done) -> dict:
    """The same. If the child failed, this benchmark ends with the child's output."""
    found = result_of(done)
    if found is None:
        raise SystemExit(f"{done.args} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return found


def pairs_per_second(found: dict) -> float:
    """The speed of one run, including the reference's forward. The first step is slower than the others, so it counts
    only if it is the only one."""
    counted = found["step_seconds"][1:] or found["step_seconds"]
    return 1 / (found["reference_seconds"] / found["pairs"] + sum(counted) / len(counted) / BATCH)


def process_age() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Results:
    """A benchmark's figures. Each is printed and written to the file at once, so that a later failure loses none."""

    def __init__(self, file: Path, **facts):
        self.file, self.facts = file, {"machine": machine(), **facts}
        file.parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps(self.facts["machine"]), flush=True)

    def note(self, kind: str, row: dict) -> None:
        self.facts.setdefault(kind, []).append(row)
        print(kind, json.dumps(row), flush=True)
        self.file.write_text(json.dumps(self.facts, indent=1) + "\n")

    def attempt(self, kind: str, facts: dict, measure: Callable[[], dict]) -> None:
        """Notes the facts with what `measure` returns, or with its error."""
        try:
            found = measure()
        except Exception as error:  # the next figure is still measured
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:600]}
        self.note(kind, {**facts, **found})


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_memory() -> int | None:
    """The most bytes that this process's tensors took on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def peak_memory() -> int:
    """The most bytes that this process took. (getrusage's figure begins at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def matmul_speed(seconds: float = 0.5, size: int = 2048) -> float:
    """FLOPs per second of a large fp32 product: the median of those that fit into `seconds`."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    speeds, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        speeds.append(2 * size**3 / (time.perf_counter() - started))
    return statistics.median(speeds)


def machine() -> dict:
    """Hardware and versions, for the results."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def known(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("torch", "deepspeed", "transformers", "peft", "trl", "flash-attn", "triton")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory() / 2**30, 1),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: found for name in packages if (found := known(name))},
    }
