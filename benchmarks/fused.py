"""Compares layers with compiled small functions (--fuse on) with plain ones, on this machine.

    python benchmarks/fused.py [--seconds 30]

Forward and backward of Llamas of 17 and 78 M parameters and of a small GPT-2 on eight pairs, fp32, one way after the
other in turn. Written to results/fused.json.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
import work

sys.path.insert(0, str(work.ROOT))

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpo_ds.scoring import attention
from dpo_ds.scoring.scorer import Scorer

LARGER = {"hidden_size": 768, "intermediate_size": 2048}
MODELS = {
    "Llama, 17 M": LlamaConfig(**work.SHAPE, vocab_size=50257, tie_word_embeddings=True),
    "Llama, 78 M": LlamaConfig(**{**work.SHAPE, **LARGER}, vocab_size=50257, tie_word_embeddings=True),
    "GPT-2, 82 M": GPT2Config(n_layer=6),
}
LENGTHS = (64, 40, 36)  # of a prompt and its answers, near HH's means


def compared(name: str, seconds: float) -> dict:
    generator = np.random.default_rng(0)
    pairs = [tuple(generator.integers(0, 50257, n).astype(np.int32) for n in LENGTHS) for _ in range(8)]
    batch, scorers = work.pack_pairs(pairs), []
    for fused in (False, True):
        torch.manual_seed(0)
        kernel = attention.implementation(attention.SDPA)
        model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation=kernel)
        scorers.append(Scorer(model.train(), fused=fused))
    times: list[list[float]] = [[], []]
    end = None
    while end is None or time.monotonic() < end:
        for scorer, took in zip(scorers, times, strict=True):
            began = time.perf_counter()
            scorer(batch).answers.sum().backward()
            took.append(time.perf_counter() - began)
            scorer.zero_grad()
        if end is None:
            compiling = times[1].pop() - times[0].pop()
            end = time.monotonic() + seconds
    plain, fused = map(statistics.median, times)
    return {"model": name, "plain s": plain, "fused s": fused, "ratio": plain / fused, "compiling s": compiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each model")
    seconds = parser.parse_args().seconds
    results = work.Results(work.RESULTS / "fused.json")
    for name in MODELS:
        results.note("fused", compared(name, seconds))


if __name__ == "__main__":
    main()
