"""Compiled norms, rotations and gated activations compute what transformers' own do, for all twelve models."""

import copy
import functools

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_ds.config import parse_options
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_models
from dpo_ds.plan.choose import choose
from dpo_ds.plan.machine import GIB, Machine
from dpo_ds.runs.loadable import fused_where_it_works
from dpo_ds.scoring import fuse

# Modules that change, in a twin of two layers. GPT-2 and StableLM have torch's own LayerNorm, which is one kernel.
CHANGED = {"gpt2": 2, "stablelm": 4, "cohere": 7, "mixtral": 9}


@pytest.mark.parametrize("name", known_models())
def test_it_computes_what_transformers_does(name, tmp_path, monkeypatch):
    """Captured whole. Kernels, for which the C++ compiler takes seconds each, are made in test_curves."""
    captured = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(fuse, "_compiled", functools.cache(captured))
    monkeypatch.setattr(fuse, "_GATED", {})
    plain = AutoModelForCausalLM.from_pretrained(tiny.make(name, tmp_path / "model"))
    fused = copy.deepcopy(plain)
    changed = fuse.parts(fused)
    assert len(changed) == CHANGED.get(plain.config.model_type, 9), [type(module).__name__ for module, _ in changed]
    counters.clear()
    fuse.fuse(fused)
    graphs = []
    for tokens in (24, 17):  # any number of tokens
        ids = torch.arange(tokens).view(1, tokens)
        expected, found = plain(ids).logits, fused(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1], "another number of tokens is compiled again"
    for logits in (expected, found):
        logits.square().sum().backward()
    for (parameter, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        assert (other.grad - one.grad).abs().max() <= 1e-5 * scale, parameter
    assert not counters["graph_break"]


def test_the_norms_compute_by_their_own_weight(monkeypatch):
    """A compiled function must not keep the first module's weight."""
    x, norms = torch.randn(5, 16), [LlamaRMSNorm(16, eps) for eps in (1e-6, 1e-6, 0.5)]
    for number, norm in enumerate(norms):
        norm.weight.data.fill_(number + 1.0)
    expected = [norm(x) for norm in norms]
    monkeypatch.setattr(fuse, "_compiled", functools.cache(functools.partial(torch.compile, backend="aot_eager")))
    for norm in norms:
        fuse._norm(norm)
    for norm, result in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm(x), result, rtol=1e-6, atol=1e-6)


def plan(model, *words: str, gpu: bool = True):
    return choose(parse_options(["--model", str(model), *words]), Machine(1, 1, 80 * GIB if gpu else None, 200 * GIB))


def test_on_a_gpu_it_is_the_default():
    assert plan("meta-llama/Meta-Llama-3-8B-Instruct").options.fuse == "on"
    assert plan("gpt2", gpu=False).options.fuse == "off" and plan("gpt2", "--fuse", "off").options.fuse == "off"


def test_an_architecture_without_a_rule(tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    ).save_pretrained(tmp_path)
    assert plan(tmp_path).options.fuse == "off"
    with pytest.raises(
        UserError, match=r"--fuse on knows the layers of the twelve .*, but not those of gpt_neox: leave it out"
    ):
        plan(tmp_path, "--fuse", "on")


def test_what_is_wrong_here_is_not_used(monkeypatch, capsys, tmp_path):
    """A compiler that fails, or computes something else: with auto it is left out, and said."""

    def broken(function):
        return lambda *args: function(*args) * 1.5 if "norm" in function.__name__ else function(*args)

    monkeypatch.setattr(fuse, "_compiled", broken)
    options = plan(tiny.make("llama", tmp_path / "model"), "--precision", "fp32").options
    assert fused_where_it_works(options, "auto").fuse == "off"
    assert "the layers' small functions are not compiled: that gives wrong log-probabilities" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--fuse on: on this machine it gives wrong log-probabilities .*; leave it out"
    ):
        fused_where_it_works(options, "on")
    monkeypatch.setattr(fuse, "_compiled", lambda function: function)
    assert fused_where_it_works(options, "on") is options
