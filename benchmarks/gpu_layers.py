"""Times one decoder layer at Llama-3-8B's shape, and measures how far packing moves bf16 log-probabilities.

    python benchmarks/gpu_layers.py [--small] [--output FILE]

A layer is timed with eager norms, rotary positions and SwiGLU, with compiled ones (scoring/fuse.py) and with Liger's,
and with activations kept or recomputed. The speeds of a large product and of copying memory are measured too.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import work

sys.path.insert(0, str(work.ROOT))
from gpu_bench import SHAPE_8B, TINY, fastest
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from dpo_ds.models.flops import peak_of
from dpo_ds.scoring import attention
from dpo_ds.scoring.scorer import Scorer

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
CLASSES = llama.LlamaRMSNorm, llama.LlamaMLP  # Liger replaces them by its own
PLAIN = llama.LlamaRMSNorm.forward, llama.apply_rotary_pos_emb, llama.LlamaMLP.forward


def take_liger_out() -> None:
    llama.LlamaRMSNorm, llama.LlamaMLP = CLASSES
    llama.LlamaRMSNorm.forward, llama.apply_rotary_pos_emb, llama.LlamaMLP.forward = PLAIN


def build(shape: dict, layers: int, how: str, recompute: bool) -> Scorer:
    take_liger_out()
    shape = {**shape, "num_hidden_layers": layers, "tie_word_embeddings": False, "max_position_embeddings": 8192}
    config = LlamaConfig(**shape)
    kernel = attention.usable("auto", config, DTYPE, attention.capability())[0]
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention.implementation(kernel))
    torch.set_default_dtype(torch.float32)
    if how == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Scorer(model, fused=how == "fused")


def layer(shape: dict, lengths: tuple[int, int, int], pairs: int, how: str, recompute: bool) -> dict:
    batch = work.pack_pairs([tuple(np.ones(n, dtype=np.int32) for n in lengths)] * pairs).to(DEVICE)
    T, seconds, memory = batch.input_ids.shape[1], {}, None
    for layers in (1, 3):
        scorer = build(shape, layers, how, recompute)

        def learn(scorer=scorer):
            scorer(batch).answers.sum().backward()
            scorer.zero_grad()

        seconds[layers] = fastest(learn)
        del scorer, learn
        if ON_GPU:
            memory = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()
    a_layer = (seconds[3] - seconds[1]) / 2
    H, inter, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"]
    width = H // shape["num_attention_heads"]
    P, C, R = lengths
    seen = pairs * ((P + C) ** 2 + (P + R) ** 2 - P**2) / 2
    flops = 3 * (2 * (2 * H * H + 2 * H * kv * width + 3 * H * inter) * T + 4 * H * seen)
    peak = peak_of(DEVICE)
    return {
        "tokens": T,
        "layer ms": 1e3 * a_layer,
        "rest ms": 1e3 * (seconds[1] - a_layer),
        "TFLOP/s": flops / a_layer / 1e12,
        "mfu": peak and flops / a_layer / peak,
        "GiB": memory,
    }


def product(m: int, k: int, n: int) -> dict:
    a, b = (torch.randn(*shape, device=DEVICE, dtype=DTYPE) for shape in ((m, k), (k, n)))
    return {"TFLOP/s": 10 * 2 * m * n * k / fastest(lambda: [a @ b for _ in range(10)]) / 1e12}


def tile(m: int, k: int, n: int) -> dict:
    """Milliseconds of each operation that the head does with a tile of logits [m, n]."""
    a, b = (torch.randn(*shape, device=DEVICE, dtype=DTYPE) for shape in ((m, k), (k, n)))
    out, total, low = (torch.zeros(m, width, device=DEVICE) for width in (n, k, n))
    low = low.to(DTYPE)
    kinds = {
        "fp32 out": lambda: torch.mm(a, b, out_dtype=torch.float32, out=out),
        "add of a temporary": lambda: total.add_(torch.mm(low, b.t(), out_dtype=torch.float32)),
        "addmm in place": lambda: torch.addmm(total, low, b.t(), out_dtype=torch.float32, out=total),
        "amax, softmax, amax": lambda: (out.amax(-1), torch.softmax(out, -1, out=out).amax(-1)),
        "add, exp, cast": lambda: out.add_(1e-6).exp_().to(DTYPE),
    }
    return {kind: 100 * fastest(lambda call=call: [call() for _ in range(10)]) for kind, call in kinds.items()}


def copy() -> dict:
    x = torch.empty(2**30, device=DEVICE)
    return {"GB/s": 8 * 2**30 / fastest(lambda: x.clone()) / 1e9}


def packing_noise(shape: dict, layers: int, results: work.Results) -> None:
    """Scores the same pairs in micro-batches of several sizes: how far may DPO's first loss be from ln 2?"""
    generator = np.random.default_rng(1)
    sizes = generator.integers(100, 400, (32, 3))
    pairs = [tuple(generator.integers(1, 2000, n).astype(np.int32) for n in row) for row in sizes]
    scorer = build(shape, layers, "eager", False)
    with torch.no_grad():
        found = {
            many: torch.cat(
                [scorer(work.pack_pairs(pairs[i : i + many]).to(DEVICE)).answers for i in range(0, 32, many)]
            )
            for many in (32, 16, 8, 4, 1)
        }
    for many, logps in found.items():
        chosen, rejected = (logps - found[32]).view(-1, 2).unbind(1)
        margin = chosen - rejected
        loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
        row = {
            "pairs a micro-batch": many,
            "rms of margins": float(margin.pow(2).mean().sqrt()),
            "largest logps": float((logps - found[32]).abs().max()),
            "loss - ln 2": float(loss) - math.log(2),
        }
        results.note("packing noise", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=work.RESULTS / "gpu_layers.json")
    options = parser.parse_args()
    results = work.Results(options.output)
    shape, lengths, counts = (TINY, (16, 24, 24), (2,)) if options.small else (SHAPE_8B, (180, 350, 300), (20, 10))
    if ON_GPU:
        for sizes in ((8192, 8192, 8192), (16384, 4096, 14336), (16384, 14336, 4096), (8192, 4096, 14336)):
            results.attempt("product", {"m, k, n": sizes}, lambda sizes=sizes: product(*sizes))
        results.attempt("tile of the head", {"m, k, n": (4096, 4096, 8192)}, lambda: tile(4096, 4096, 8192))
        results.attempt("copy", {}, copy)
    for pairs in counts:
        for how in ("eager", "fused", *(("liger",) if ON_GPU else ())):
            for recompute in (True, False):
                words = shape, lengths, pairs, how, recompute
                facts = {"how": how, "recompute": recompute}
                results.attempt("layers", facts, lambda words=words: layer(*words))
                if ON_GPU:
                    torch.cuda.empty_cache()
    packing_noise(shape if options.small else {**SHAPE_8B, "vocab_size": 32000}, 2 if options.small else 8, results)


if __name__ == "__main__":
    main()
