"""Compares each attention kernel of this machine and the fused head with plain forwards; then measures their costs.

    python benchmarks/gpu_check.py [--models gpt2 ...] [--small] [--output FILE]     (bash benchmarks/gpu_run.sh first)

The tiny twin of each of the twelve models is scored with packed pairs and each kernel, in fp32 and bf16. Its
log-probabilities and gradients are compared with those of two plain fp32 forwards for each pair, which compute all
logits. A bf16 kernel's error may be 1.5 times that of a plain bf16 forward. A broken layout must not pass. Without a
GPU, the CPU's kernels are checked. --small takes small shapes for the timings.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import work
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(work.ROOT))
sys.path.insert(0, str(work.ROOT / "tests" / "tools"))

import oracle

from dpo_ds.models.find import known_models
from dpo_ds.scoring import attention, head
from dpo_ds.scoring.packed import PackedBatch, layout_of
from dpo_ds.scoring.scorer import Scorer
from dpo_ds.scoring.twin import randomise, twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = ((37, 11, 23), (64, 30, 9), (5, 40, 41), (90, 1, 17))
FP32 = {"logps": 2e-3, "gradients": 1e-3}  # for sums of up to 41 log-probabilities; nothing here may use TF32
SLACK = 1.5  # a packed bf16 run's allowed error, over a plain one's
FLOOR = {"logps": 2e-2, "gradients": 1e-2}
BROKEN = 0.05  # a broken layout moves log-probabilities by more; the twins' are one to five a token


def some_pairs(vocabulary: int) -> list:
    generator = np.random.default_rng(1)
    return [tuple(generator.integers(1, vocabulary, n).astype(np.int32) for n in lengths) for lengths in LENGTHS]


def graded(model, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logps, and the gradient of the sum of their margins as one vector, both fp32 on the host."""
    model.zero_grad()
    (logps[:, 0] - logps[:, 1]).sum().backward()
    flat = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
    return logps.detach().float().cpu(), flat


def difference(found, expected) -> dict:
    """The largest difference of a log-probability, and the gradient's relative error in the 2-norm."""
    (logps, gradient), (logps_0, gradient_0) = found, expected
    return {
        "logps": float((logps - logps_0).abs().max()),
        "gradients": float((gradient - gradient_0).norm() / gradient_0.norm()),
    }


def build(config, dtype, device, implementation: str):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    model = model.to(device=device, dtype=dtype)
    model.set_attn_implementation(implementation)
    return model


def plain(config, pairs, dtype, device):
    model = build(config, dtype, device, "eager")
    with torch.device(device):
        logps = oracle.pairs_logps(model, pairs)
    return graded(model, logps)


def packed(config, pairs, dtype, kernel: str, broken: bool = False):
    model = build(config, dtype, DEVICE, attention.implementation(kernel))
    batch = work.pack_pairs(pairs)
    if broken:  # rejected's positions continue after chosen's
        batch.position_ids = torch.arange(batch.input_ids.shape[1])[None]
    return graded(model, Scorer(model)(batch.to(DEVICE)).answers.view(-1, 2))


def kernels(config, dtype) -> list[str]:
    return attention.usable("auto", config, dtype, attention.capability())


def check_model(name: str, results: work.Results) -> None:
    config = twin(known_models()[name].config)
    if getattr(config, "num_local_experts", None):
        # Use all experts: with fewer, bf16's rounding would decide which of them a token goes to.
        config.num_experts_per_tok = config.num_local_experts
    pairs = some_pairs(config.get_text_config().vocab_size)
    expected = plain(config, pairs, torch.float32, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        allowed = FP32
        if dtype == torch.bfloat16:
            own = difference(plain(config, pairs, dtype, DEVICE), expected)
            allowed = {key: SLACK * own[key] + FLOOR[key] for key in own}
        for kernel in kernels(config, dtype):

            def measure(dtype=dtype, kernel=kernel, allowed=allowed) -> dict:
                error = difference(packed(config, pairs, dtype, kernel), expected)
                return {**error, "allowed": allowed, "passed": all(error[key] <= allowed[key] for key in error)}

            results.attempt("checks", {"model": name, "kernel": kernel, "dtype": str(dtype)}, measure)
    if torch.cuda.is_available():  # the kernel and torch's own, both in bf16, differ only by rounding
        torchs = packed(config, pairs, torch.bfloat16, attention.SDPA)
        for kernel in kernels(config, torch.bfloat16)[:-1]:
            results.attempt(
                "beside sdpa in bf16",
                {"model": name, "kernel": kernel},
                lambda kernel=kernel: difference(packed(config, pairs, torch.bfloat16, kernel), torchs),
            )

    def control() -> dict:
        moved = difference(packed(config, pairs, torch.float32, attention.SDPA, broken=True), expected)
        return {**moved, "passed": moved["logps"] > BROKEN}

    results.attempt("checks", {"model": name, "kernel": "broken layout"}, control)


def check_head(dtype, allowed: float) -> dict:
    """Compares the fused head's sum over 128 tokens, and its gradients, with fp64."""
    torch.manual_seed(0)
    hidden = torch.randn(128, 256).to(dtype)
    weight = (torch.randn(8192, 256) / 8).to(dtype)
    targets = torch.randint(0, 8192, (128,))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, targets[:, None]).sum()
    truth.backward()
    fast = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    inputs = head.HeadInputs(*fast, targets.to(DEVICE), budget=head.LogitBudget(2**16))
    found = head.fused_logps(inputs).sum()
    found.backward()
    gaps = [float((f.grad.cpu() - e.grad).norm() / e.grad.norm()) for f, e in zip(fast, exact, strict=True)]
    error = {"logps": abs(float(found.detach()) - float(truth.detach())), "gradients": max(gaps)}
    fine = error["logps"] < allowed and error["gradients"] < (1e-4 if dtype == torch.float32 else 2e-2)
    return {**error, "passed": fine}


# ---------------------------------------------------------------------------------------------------------------- costs


def timed(call, repeats: int = 5) -> float:
    """Seconds of the fastest call of several."""
    best = float("inf")
    for _ in range(repeats + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def batch_of(lengths: tuple[int, int, int], tokens: int) -> PackedBatch:
    pairs = max(1, tokens // sum(lengths))
    return work.pack_pairs([tuple(np.ones(n, dtype=np.int32) for n in lengths)] * pairs).to(DEVICE)


def attention_costs(small: bool, results: work.Results) -> None:
    """Times one layer's attention with Llama-3-8B's heads, forward and backward, and the gathering of keys and
    values alone."""
    heads, key_heads, width, tokens = (4, 2, 16, 512) if small else (32, 8, 128, 8192)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    config = next(iter(known_models().values())).config
    shapes = {"hh": (124, 41, 51), "ultrafeedback": (180, 350, 300), "long": (2048, 100, 100)}
    for name, lengths in shapes.items():
        lengths = tuple(max(1, n // 16) for n in lengths) if small else lengths
        batch = batch_of(lengths, tokens)
        T = batch.input_ids.shape[1]
        query, key, value = (
            torch.randn(1, T, n, width, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
            for n in (heads, key_heads, key_heads)
        )
        weight = torch.randn(1, T, heads, width, device=DEVICE, dtype=dtype)

        def both(kernel, query=query, key=key, value=value, batch=batch, weight=weight):
            call = attention.KERNELS[kernel].call
            out, _ = attention.packed_attention(call, None, query, key, value, batch.segments)
            out.backward(weight)

        def gather(key=key, value=value, batch=batch):
            rows = layout_of(batch.segments, DEVICE).key_rows
            sum(x[0].transpose(0, 1).index_select(0, rows).sum() for x in (key, value)).backward()

        facts = {"lengths": name, "tokens": T}
        for kernel in kernels(config, dtype):
            call = functools.partial(both, kernel)
            results.attempt("attention", {**facts, "kernel": kernel}, lambda call=call: {"ms": 1e3 * timed(call)})
        results.attempt(
            "attention", {**facts, "kernel": "gather alone"}, lambda gather=gather: {"ms": 1e3 * timed(gather)}
        )


def head_costs(small: bool, results: work.Results, rows: int) -> None:
    """Times the head at Llama-3-8B's shape, forward and backward, for each tile size, and measures its memory."""
    N, H, V = (64, 32, 2048) if small else (rows, 4096, 128256)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    hidden = torch.randn(N, H, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, dtype=dtype).mul_(0.02).requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    for tile in [2**n for n in ((14, 16) if small else (22, 23, 24, 25, 26, 27, 28))]:

        def both(tile=tile):
            inputs = head.HeadInputs(hidden, weight, targets, budget=head.LogitBudget(tile))
            head.fused_logps(inputs).sum().backward()
            hidden.grad = weight.grad = None

        def measure(both=both) -> dict:
            row = {"ms": 1e3 * timed(both, 3)}
            if DEVICE.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                both()
                row["MiB above inputs"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            return {**row, "TFLOP/s": 3 * 2 * N * H * V / row["ms"] / 1e9}

        results.attempt("head", {"rows": N, "tile": tile}, measure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(known_models()), help="of the twelve")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=work.RESULTS / "gpu_check.json")
    options = parser.parse_args()
    results = work.Results(options.output)
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        facts = {"model": "head", "kernel": "fused", "dtype": str(dtype)}
        results.attempt("checks", facts, lambda dtype=dtype, allowed=allowed: check_head(dtype, allowed))
    for name in options.models:
        try:
            check_model(name, results)
        except Exception as error:  # in the plain forwards; the next model is still checked
            results.note("checks", {"model": name, "passed": False, "error": f"{type(error).__name__}: {error}"[:600]})
    attention_costs(options.small, results)
    for rows in (4096,) if options.small else (2048, 4096, 16384):
        head_costs(options.small, results, rows)
    return 0 if all(row["passed"] for row in results.facts["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
