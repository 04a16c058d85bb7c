"""LoRA's layers as scoring/adapters.py computes them, beside peft's own."""

import copy

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_ds.config import Options
from dpo_ds.models.lora import add_lora
from dpo_ds.scoring.adapters import left_out, replace_adapters

IDS = torch.arange(24).view(1, 24)


@pytest.fixture(params=["gpt2", "llama"])
def both(request, tmp_path):
    """A model with adapters that change something, with peft's layers and with ours; and the base."""
    base = AutoModelForCausalLM.from_pretrained(tiny.make(request.param, tmp_path / "model"))
    theirs = add_lora(copy.deepcopy(base), Options(model="x", lora_r=4, lora_dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    ours = copy.deepcopy(theirs)
    replace_adapters(ours)
    return theirs, ours, base.eval()


def test_the_results_and_gradients_are_pefts(both):
    theirs, ours, _ = both
    logits = [model(IDS).logits for model in both]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6)
    assert (logits[0] - logits[2]).abs().max() > 1e-3, "the adapters change nothing: the test shows nothing"
    for result in logits[:2]:
        result.square().mean().backward()
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.abs().max() > 0, name
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-8, msg=lambda text, n=name: n + text)


def test_adapters_that_are_left_out_are_called_and_compute_nothing(both):
    _, ours, base = both
    called = []
    for module in ours.modules():
        module.register_forward_pre_hook(lambda module, _: called.append(module))

    def counted(model) -> tuple[torch.Tensor, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            return model(IDS).logits, flops.get_total_flops()

    logits, most = counted(ours)
    order, called[:] = list(called), []
    with left_out(ours):
        found, fewer = counted(ours)
    expected, least = counted(base)
    assert torch.equal(found, expected) and fewer == least < most
    assert called == order, "ZeRO-3 would see another order of modules"
    assert torch.equal(counted(ours)[0], logits), "the adapters are back"
