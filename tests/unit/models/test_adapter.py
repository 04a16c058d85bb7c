"""Adapters that others trained: what is read of them, and which are refused."""

import json
import shutil

import adapters
import oracle
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dpo_ds.config import Options, parse_options, to_yaml
from dpo_ds.errors import UserError
from dpo_ds.models.adapter import CONFIG, WEIGHTS, find_adapter, load_adapter
from dpo_ds.models.lora import add_lora


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    tiny.make("llama", place / "llama")
    tiny.make("gpt2", place / "gpt2")
    adapters.make(place / "llama", place / "sft")
    return place


def found(place, name: str, model: str = "llama"):
    return find_adapter("--adapter", str(place / name), str(place / model), False)


MADE = {
    "names": ("llama", {}, "down_proj,q_proj", 2.0),
    "rank-stabilised": ("llama", {"r": 4, "use_rslora": True}, "down_proj,q_proj", 3.0),
    "by a pattern": ("llama", {"target_modules": r".*\.1\..*v_proj"}, "model.layers.1.self_attn.v_proj", 2.0),
    "one layer": ("llama", {"layers_to_transform": [0]}, None, 2.0),
    "all": ("llama", {"target_modules": "all-linear"}, None, 2.0),
    "conv": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, None, 2.0),
}


@pytest.mark.parametrize("name", MADE)
def test_an_adapter_computes_what_peft_says(name, place):
    base, config, targets, scale = MADE[name]
    folder = adapters.make(place / base, place / name, **config)
    adapter = find_adapter("--adapter", str(folder), str(place / base), False)
    assert targets in (None, adapter.targets) and adapter.alpha / adapter.r == pytest.approx(scale)
    options = Options(model=base, lora=True, lora_r=adapter.r, lora_alpha=adapter.alpha, lora_targets=adapter.targets)
    model = add_lora(oracle.load(place / base), options)
    load_adapter(model, folder)
    peft = PeftModel.from_pretrained(oracle.load(place / base), folder)
    own, theirs = dict(model.named_parameters()), dict(peft.named_parameters())
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert adapter.numbers == sum(p.numel() for key, p in own.items() if ".lora_" in key)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model.eval()(ids).logits, peft.eval()(ids).logits)


def config_with(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def tensors_with(change):
    def changed(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def first(tensors):
    return sorted(tensors)[0]


REFUSED = {
    "another base": (config_with(base_model_name_or_path="meta-llama/Llama-3"), "is an adapter of meta-llama/Llama-3"),
    "another kind": (config_with(peft_type="IA3"), "is a IA3 adapter; only LoRA is supported"),
    "DoRA": (config_with(use_dora=True), "has use_dora, which is not supported: merge it"),
    "whole modules": (config_with(modules_to_save=["lm_head"]), "has modules_to_save"),
    "several ranks": (config_with(rank_pattern={"q_proj": 8}), "has rank_pattern"),
    "biases": (config_with(bias="all"), "trains biases (bias is all)"),
    "PiSSA": (config_with(init_lora_weights="pissa_niter_4"), "changes the base weights too"),
    "no rank": (config_with(r=None), "has r None and lora_alpha 6"),
    "another rank": (config_with(r=2), "has the shape [3, 80], but"),
    "another width": (
        tensors_with(lambda t: t.update({first(t): torch.zeros(3, 7)})), "has the shape [3, 7], but"),
    "another module": (
        tensors_with(lambda t: t.update({first(t).replace("layers.0", "layers.9"): t.pop(first(t))})),
        "has no linear module: it is of another base",
    ),
    "half of it": (tensors_with(lambda t: t.pop(first(t))), "lacks tensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "is damaged"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_exactly_is_refused(name, place, tmp_path):
    change, words = REFUSED[name]
    folder = shutil.copytree(place / "sft", tmp_path / "adapter")
    change(folder)
    with pytest.raises(UserError) as refused:
        find_adapter("--adapter", str(folder), str(place / "llama"), False)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"--adapter {folder}")


def test_a_base_that_moved_is_known_by_its_name(place, tmp_path):
    for base in ("meta/Llama", "/gone/llama/", "/x/models--meta--llama/snapshots/0123", None):
        folder = shutil.copytree(place / "sft", tmp_path / str(base).replace("/", "_"))
        config_with(base_model_name_or_path=base)(folder)
        assert find_adapter("--adapter", str(folder), str(place / "llama"), False).r == 3


@pytest.mark.parametrize("flag", ["lora_r=16", "lora_alpha=32", "lora_targets=all-linear"])
def test_what_an_adapter_decides_is_not_given(flag, tmp_path):
    name, _, value = flag.partition("=")
    (tmp_path / "run.yaml").write_text(f"{name}: {value}")
    for words in ([f"--{flag}"], [f"--{name}", value], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(UserError, match=f"--adapter a brings its own --{name}: leave out one of them"):
            parse_options(["--model=m", "--adapter=a", *words])


def test_an_adapter_means_lora_and_its_options_are_read_back(tmp_path):
    options = parse_options(["--model=m", "--adapter=a", "--lora_dropout=0.1"])
    assert options.lora and options.lora_dropout == 0.1
    (tmp_path / "options.yaml").write_text(to_yaml(options.replace(lora_r=3, lora_alpha=6.0, lora_targets="q_proj")))
    assert parse_options(["--config", str(tmp_path / "options.yaml")]) == options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--reference_adapter a --reference none --loss simpo", "--reference none scores no --reference_adapter"),
        ("--reference_adapter a --reference base --lora", "--reference base scores no --reference_adapter"),
    ],
)
def test_a_reference_adapter_needs_a_reference(flags, words):
    with pytest.raises(UserError, match=words):
        parse_options(["--model=m", *flags.split()])
