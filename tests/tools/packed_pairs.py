"""Random groups, and a model folder's PairScorer."""

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.data.pairs import Group
from dpo_ds.scoring import attention
from dpo_ds.scoring.scorer import Scorer

PACKED = attention.implementation(attention.SDPA)
LENGTHS = [(17, 7, 12), (31, 14, 5), (1, 3, 4), (24, 1, 1)]
GROUPS = [(17, 7, 12), (31, 14, 5, 9, 3), (1, 3, 4, 2), (24, 1, 1)]  # of a prompt and of its answers


def random_tokens(sizes, seed=3) -> list[list[np.ndarray]]:
    """Sequences of these lengths, in groups."""
    generator = np.random.default_rng(seed)
    return [[generator.integers(1, tiny.VOCABULARY, n).astype(np.int32) for n in group] for group in sizes]


def random_pairs(lengths=LENGTHS, seed=3):
    return [tuple(group) for group in random_tokens(lengths, seed)]


def random_groups(lengths=GROUPS, seed=3) -> list[Group]:
    """Every answer but the first is rejected once. Of each third answer only every other token is learned."""
    groups = []
    for prompt, *answers in random_tokens(lengths, seed):
        pairs = np.array([[0, other] for other in range(1, len(answers))])
        scored = [np.arange(len(answer)) % 2 == 1 if n % 3 == 2 else None for n, answer in enumerate(answers)]
        groups.append(Group(prompt, answers, pairs, scored))
    return groups


def packed_model(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=PACKED)
    return Scorer(model.eval())
