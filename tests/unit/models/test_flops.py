"""The FLOPs that are counted are those of a real packed forward."""

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_ds.config import Options
from dpo_ds.data.pairs import Group
from dpo_ds.models.flops import Flops
from dpo_ds.models.model import Model
from dpo_ds.scoring import attention
from dpo_ds.scoring.packed import pack
from dpo_ds.scoring.scorer import Scorer

LENGTHS = ((17, 7, 12), (31, 14, 5, 9))  # of a prompt and of its answers
PROMPTS = [prompt for prompt, *_ in LENGTHS]
ANSWERS = [length for _, *answers in LENGTHS for length in answers]
GROUPS = np.array([0, 0, 1, 1, 1])  # the prompt of each answer


def groups() -> list[Group]:
    return [
        Group(ones[0], ones[1:], np.array([[0, 1]]), [None] * len(ones[1:]))
        for ones in ([np.ones(n, dtype=np.int32) for n in lengths] for lengths in LENGTHS)
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-v0.1", "google/gemma-7b-it"])
def test_products_of_a_forward(name):
    config = tiny.config(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.implementation(attention.SDPA))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Scorer(model)(pack(groups()))
    products = sum(
        count
        for kind, count in counter.get_flop_counts()["Global"].items()
        if kind in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    )
    flops = Flops(Model(name, name, config), Options(model=name))
    tokens, responses = sum(map(sum, LENGTHS)), sum(ANSWERS)
    # Rotary positions add a small product.
    assert products == pytest.approx(2 * flops.body * tokens + 2 * flops.head * responses, rel=2e-3)


@pytest.mark.parametrize("name", ["llama", "mistral-v0.1", "gemma2"])
def test_attention_counts_the_keys_that_are_seen(name):
    config = tiny.config(name)
    flops = Flops(Model(name, name, config), Options(model=name))
    seen = 0
    for window in flops.windows:
        for P, first, *others in LENGTHS:
            for queries, keys in ((P + first, P + first), *((R, P + R) for R in others)):
                seen += int(attention.visible(queries, keys, window, "cpu").sum())
    assert (
        flops._attention(np.array(PROMPTS), np.array(PROMPTS)[GROUPS], np.array(ANSWERS))
        == 4 * flops.attention_width * seen
    )
    assert (None in flops.windows) == (name != "mistral-v0.1") and len(flops.windows) == config.num_hidden_layers


def test_a_step_is_forward_and_backward_and_the_references_forward_where_it_is_made():
    model = Model("llama", "llama", tiny.config("llama"))
    lengths = np.array(PROMPTS), np.array(ANSWERS), GROUPS
    table, live = (
        Flops(model, Options(model="llama", reference=kind)).step(*lengths) for kind in ("precomputed", "live")
    )
    assert live == pytest.approx(table * 4 / 3)
    lora = Flops(model, Options(model="llama", lora=True, lora_r=1)).step(*lengths)
    assert 2 / 3 < lora / table < 1, "frozen weights have no gradient; adapters are small"
