"""The memory of activations: what is counted on a few layers holds for a model with more of them."""

import pytest
import tiny
import torch
from transformers import AutoConfig

from dpo_ds.config import Options
from dpo_ds.plan import activations
from dpo_ds.plan.activations import Activations, Counter
from dpo_ds.scoring.head import KEPT_ON_CPU, LogitBudget

LAYERS, TOKENS, PAIR = 7, 600, 150
BUDGET = LogitBudget(2**14, KEPT_ON_CPU)


@pytest.mark.parametrize("name", ["gpt2", "llama", "google/gemma-7b-it"])
@pytest.mark.parametrize("recomputed", [0, 1, 3, 6, 7])
def test_a_part_of_the_layers_recomputes(name, recomputed, tmp_path):
    config = AutoConfig.from_pretrained(tiny.make(name, tmp_path / name))
    config.num_hidden_layers = LAYERS
    counter = Counter(config, Options(), torch.float32, experts=False)
    whole = counter._scorer(config, LAYERS, torch.float32)
    kept, again = (counter.count(TOKENS, PAIR, recompute, BUDGET) for recompute in (False, True))
    real = activations.passes(whole, activations._batch(TOKENS, PAIR), recomputed, BUDGET).peak
    assert Activations.mixed(kept, again, recomputed) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("name", ["gpt2", "llama", "google/gemma-7b-it"])
def test_scoring_keeps_no_activations(name, tmp_path):
    config = AutoConfig.from_pretrained(tiny.make(name, tmp_path / name))
    config.num_hidden_layers = LAYERS
    counter = Counter(config, Options(), torch.float32, experts=False)
    whole = counter._scorer(config, LAYERS, torch.float32)
    scored = counter.count(TOKENS, PAIR, False, BUDGET, learns=False)
    real = activations.passes(whole, activations._batch(TOKENS, PAIR), 0, BUDGET, learns=False).peak
    assert scored.bytes == pytest.approx(real, rel=0.03) and scored.per_layer == 0
    recomputed = counter.count(TOKENS, PAIR, True, BUDGET)
    assert scored.bytes < recomputed.bytes
