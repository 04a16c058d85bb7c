"""Random pairs, and a model folder's PairScorer."""

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.scoring import attention
from dpo_ds.scoring.scorer import PairScorer

PACKED = attention.implementation(attention.SDPA)
LENGTHS = [(17, 7, 12), (31, 14, 5), (1, 3, 4), (24, 1, 1)]


def random_pairs(lengths=LENGTHS, seed=3):
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(1, tiny.VOCABULARY, n).astype(np.int32) for n in sizes) for sizes in lengths]


def packed_model(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=PACKED)
    return PairScorer(model.eval())
