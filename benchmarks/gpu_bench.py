"""dpo_ds against TRL at Llama-3-8B's shape on one GPU; then the 70B shape's layers, and an estimate for 8 GPUs.

    python benchmarks/gpu_bench.py [--small] [--minutes 9] [--parts trl layers] [--sets hh …] [--output FILE]

Weights are random. Texts are random words, as long as those of HH, of UltraFeedback, and of a set with long prompts.
LoRA comes first, then all weights with the optimizer in host memory, if there is enough of it. --small does the same
with tiny shapes, also on a CPU. Runs that do not end within --minutes are named and left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import work

HERE = Path(__file__).resolve().parent
SHAPE_8B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    vocab_size=128256,
)  # fmt: skip
SHAPE_70B = dict(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
    vocab_size=128256,
)  # fmt: skip
TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    vocab_size=2048,
)  # fmt: skip
# Mean tokens of prompt, chosen, rejected; max_length. HH's are measured (../shared/data/README.md), UltraFeedback's are
# our guess.
SETS = {"hh": ((124, 41, 51), 1024), "ultrafeedback": ((180, 350, 300), 1024), "long": ((2048, 100, 100), 2300)}
GOALS = {"hh": 2.0, "ultrafeedback": 1.3, "long": 2.0}
HOST_FOR_FULL = 8.03e9 * 22.4 + 30 * 2**30  # bytes: Adam, masters and gradients; the process


def make_model(folder: Path, shape: dict, tokenizer) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    on_gpu = torch.cuda.is_available()
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if on_gpu:
        torch.cuda.empty_cache()
    return folder


def write_texts(lengths: tuple[int, int, int], longest: int, pairs: int, file: Path, tokenizer) -> Path:
    """Writes pairs of random words. Lengths follow a gamma distribution of shape 2, like real ones, but all long
    prompts have the mean length."""
    generator = np.random.default_rng(0)
    ids = [
        i
        for i in range(len(tokenizer))
        if tokenizer.decode([i]).startswith(" ") and tokenizer.decode([i]).strip().isalpha()
    ]
    rows = []
    for _ in range(pairs):
        row = {}
        for key, mean in zip(("prompt", "chosen", "rejected"), lengths, strict=True):
            count = mean if mean > 1000 else int(np.clip(generator.gamma(2.0, mean / 2), 4, longest // 3))
            row[key] = tokenizer.decode(generator.choice(ids, count).tolist())
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def one(script: str, words: list, seconds: float) -> dict:
    try:
        done = subprocess.run(
            [sys.executable, HERE / script, *map(str, words)], capture_output=True, text=True, timeout=max(1, seconds)
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time left"}
    found = work.result_of(done)
    if found is None:
        return {"failed": (done.stdout[-500:] + done.stderr[-1500:]).strip()}
    found["pairs/s"] = work.pairs_per_second(found)
    if "flops" in found:
        seconds = (found["pairs"] - work.BATCH) / found["pairs/s"]
        found["TFLOP/s"] = found["flops"] / seconds / 1e12
        found["mfu"] = found["peak_flops"] and found["flops"] / seconds / found["peak_flops"]
    return found


def against_trl(folder: Path, small: bool, until: float, sets: list[str], results: work.Results) -> None:
    import torch
    from transformers import AutoTokenizer

    from dpo_ds.embedded import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = make_model(folder / "model", TINY if small else SHAPE_8B, tokenizer)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    enough = work.memory() > HOST_FOR_FULL and not small
    for how in ("lora", *(["full"] if enough else [])):
        for name in sets:
            lengths, longest = SETS[name]
            if small:
                lengths, longest = tuple(max(6, n // 16) for n in lengths), 160
            pairs = (2 if small else 4) * work.BATCH
            file = write_texts(lengths, longest, pairs, folder / f"{name}.jsonl", tokenizer)
            ours = ["--precision", precision, "--micro_batch_tokens", "16384", "--chat_template", "none"]
            ours += ["--lora", "--reference", "base"] if how == "lora" else ["--ds_config", "zero3_offload_large"]
            theirs = [f"bf16={precision == 'bf16'}", f"lora={how == 'lora'}"]
            place = folder / f"{how}-{name}"
            a = one("one_ours.py", [model, file, longest, place / "ours", *ours], until - time.monotonic())
            b = {"failed": "needs the optimizer on the GPU"}
            if how == "lora":
                words = [model, file, longest, place / "trl", "live", "recompute", *theirs]
                b = one("one_trl.py", words, until - time.monotonic())
            row = {"how": how, "lengths": name, "ours": a, "trl": b}
            if "failed" not in a and "failed" not in b:
                row["speed over TRL"] = a["pairs/s"] / b["pairs/s"]
            print(json.dumps({**row, "ours": short(a), "trl": short(b)}), flush=True)
            results.note("against TRL", row)


def short(found: dict) -> dict:
    keys = ("pairs/s", "mfu", "TFLOP/s", "peak_memory", "gpu_memory", "failed")
    return {key: found[key] for key in keys if key in found}


# ------------------------------------------------------------------------------------------------------- the 70B layers


def layer_times(small: bool) -> dict:
    """Seconds of one layer and of all else, for a micro-batch of 1,024-token pairs with recomputed activations."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_ds.scoring import attention
    from dpo_ds.scoring.scorer import Scorer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, pairs = (TINY, 2) if small else (SHAPE_70B, 8)
    lengths = (16, 24, 24) if small else (256, 384, 384)
    times, forwards = {}, {}
    for layers in (1, 3):
        config = LlamaConfig(**{**shape, "num_hidden_layers": layers}, tie_word_embeddings=False)
        kernel = attention.usable("auto", config, dtype, attention.capability())[0]
        torch.set_default_dtype(dtype)
        with device:
            model = LlamaForCausalLM._from_config(config, attn_implementation=attention.implementation(kernel))
        torch.set_default_dtype(torch.float32)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer = Scorer(model)
        batch = work.pack_pairs([tuple(np.ones(n, dtype=np.int32) for n in lengths)] * pairs).to(device)

        def learn(scorer=scorer, batch=batch, model=model):
            scorer(batch).answers.sum().backward()
            model.zero_grad()

        def score(scorer=scorer, batch=batch):
            with torch.no_grad():
                scorer(batch)

        times[layers], forwards[layers] = fastest(learn), fastest(score)
        del model, scorer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    layer, forward = (times[3] - times[1]) / 2, (forwards[3] - forwards[1]) / 2
    return {
        "tokens": pairs * sum(lengths),
        "pairs": pairs,
        "layer": layer,
        "rest": times[1] - layer,
        "layer forward": forward,
        "rest forward": forwards[1] - forward,
        "measured": {f"{n} layers": {"step": times[n], "forward": forwards[n]} for n in times},
    }


def fastest(call) -> float:
    import torch

    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def predict(found: dict, measured_peak: float, peak: float, pairs: int = 128, gpus: int = 8) -> dict:
    """Estimates the full 70B run from one GPU's layer times. Every assumption is a number here.

    Compute scales with the GPUs' bf16 peaks. ZeRO-3 gathers the weights for forward and again for backward with its
    recomputation, and reduces gradients once. All this goes over NVLink during the computation, so the longer of the
    two counts. The optimizer's step is bound by host memory: it moves 30 bytes a parameter (it reads gradient, weight
    and two moments, and writes weight, two moments and the bf16 weight).
    """
    parameters, layers = 70.55e9, SHAPE_70B["num_hidden_layers"]
    link, host, pcie = 235e9, 250e9, gpus * 20e9  # bytes/s: NVLink 3 in all-gathers; two sockets' memory; PCIe 4
    rounds = pairs / gpus / found["pairs"]
    scale = measured_peak / peak
    compute = scale * (layers * found["layer"] + found["rest"])
    reference = scale * (layers * found["layer forward"] + found["rest forward"])
    gathers = 3 * 2 * parameters * (gpus - 1) / gpus / link
    gather = gathers / 3
    optimizer = 30 * parameters / host + 2 * 2 * parameters / pcie
    seconds = rounds * (max(compute, gathers) + max(reference, gather)) + optimizer
    flops = pairs * found["tokens"] / found["pairs"] * 2 * parameters * 4
    return {
        "pairs a step": pairs,
        "micro-batches a GPU": rounds,
        "compute": compute,
        "gathers": gathers,
        "reference": max(reference, gather),
        "optimizer": optimizer,
        "seconds a step": seconds,
        "pairs/s": pairs / seconds,
        "mfu": flops / seconds / gpus / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", nargs="+", choices=["trl", "layers"], default=["trl", "layers"])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--output", type=Path, default=work.RESULTS / "gpu_bench.json")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    import torch

    from dpo_ds.models.flops import peak_of

    results = work.Results(options.output)
    for part in options.parts:
        if part == "trl":
            with tempfile.TemporaryDirectory() as folder:  # 16 GB: set TMPDIR to a folder in memory
                against_trl(Path(folder), options.small, until, options.sets, results)
            continue
        found = layer_times(options.small)
        results.note("layers of 70B", found)
        peak = peak_of(torch.device("cuda")) if torch.cuda.is_available() else None
        for name, other in (("A100", 312e12), ("H100", 989e12)) if peak else ():
            results.note("8 GPUs on paper", {"gpu": name, **predict(found, peak, other)})


if __name__ == "__main__":
    main()
