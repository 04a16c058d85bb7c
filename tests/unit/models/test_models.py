"""Models by their config: the twelve, their twins, and which other architectures score packed pairs exactly."""

import json
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from dpo_ds.engine.tiers import load_tier
from dpo_ds.errors import UserError
from dpo_ds.models.find import find_model, known_model, known_models
from dpo_ds.scoring import attention, scorer, twin
from dpo_ds.scoring.twin import require_exact

# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("model_id", tiny.TWELVE, ids=tiny.short)
def test_parameters_and_class(model_id):
    """Parameters are counted on the meta device. The model's tiers exist and have the stage that their names say."""
    model = known_model(model_id)
    counted = sum(p.numel() for p in model.skeleton.parameters())
    assert counted == model.parameters == known_models()[model_id].parameters
    for tier in (model.tier, model.lora_tier):
        assert load_tier(tier)["zero_optimization"]["stage"] == int(tier[4])


PECULIARITIES = {
    "gpt2": dict(tie_word_embeddings=True),
    "stabilityai/stablelm-2-1_6b-chat": dict(use_qkv_bias=True),
    "microsoft/Phi-3-mini-4k-instruct": dict(sliding_window=9),
    "meta-llama/Meta-Llama-3-8B-Instruct": dict(num_key_value_heads=2),
    "mistralai/Mistral-7B-Instruct-v0.3": dict(num_key_value_heads=2, sliding_window=None),
    "google/gemma-7b-it": dict(head_dim=32, hidden_size=64, num_attention_heads=4, tie_word_embeddings=True),
    "Qwen/Qwen2-7B-Instruct": dict(num_key_value_heads=2),
    "CohereForAI/c4ai-command-r-v01": dict(logit_scale=0.0625, tie_word_embeddings=True),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": dict(num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("model_id", PECULIARITIES, ids=tiny.short)
def test_twins_keep_what_is_peculiar(model_id):
    config = tiny.config(model_id)
    for key, value in PECULIARITIES[model_id].items():
        assert getattr(config, key) == value, key
    if "stablelm" in model_id:
        assert config.rope_parameters["partial_rotary_factor"] == 0.25


@pytest.mark.launch
def test_the_command_prints_the_table():
    out = subprocess.run(
        [sys.executable, "-m", "dpo_ds.models"], env=launching.environment(), capture_output=True, text=True, check=True
    ).stdout
    for model_id in tiny.TWELVE:
        model = known_model(model_id)
        (line,) = [line for line in out.splitlines() if f"`{model_id}`" in line]
        assert f"{model.parameters:,}" in line and f"`{model.tier}`" in line and f"{model.context:,}" in line
    assert known_model("CohereForAI/c4ai-command-r-v01").context == 131_072


# ------------------------------------------------------------------------------------------------- other architectures

EXACT = [
    "nemotron",
    "qwen3",
    "gemma3_text",
    "olmo2",
    "granite",
    "qwen3_moe",
    "deepseek_v3",
    "longcat_flash",
    "gpt_neox",
    "starcoder2",
    "cohere2",
]
NOT_EXACT = {
    "minimax": "does not keep packed pairs apart",  # linear attention, though transformers says that it can be packed
    "rwkv": "does not keep packed pairs apart: it has layers with a running state",
    "qwen3_next": "does not keep packed pairs apart",
    "roberta": "does not keep packed pairs apart",  # attends to later tokens as well
    "gpt_oss": "attention sinks",
    "bloom": "cannot be shown",
    "gpt_neo": "cannot be shown .* does not go through transformers' attention interface",
    "electra": "cannot be shown .* its head takes 128 numbers, but its body gives 64",
    "llama4_text": "cannot be shown .* returns logits, not hidden states",
    "mamba": "layers with a running state",
    "jamba": "layers with a running state",
    "falcon_h1": "layers with a running state",
}
TRANSFORMERS = Version(transformers.__version__)
if TRANSFORMERS < Version("5.13"):  # its attention had code of its own
    EXACT.remove("nemotron")
    NOT_EXACT["nemotron"] = "cannot be shown .* does not go through transformers' attention interface"
if TRANSFORMERS < Version("5.15"):  # its linear attention took the segments for a mask of padding, and failed
    NOT_EXACT["minimax"] = "cannot be shown"


@pytest.fixture(autouse=True)
def nothing_known():
    """What a process knows of a model's twin would hide what a test changes in it."""
    twin._difference.cache_clear()
    yield
    twin._difference.cache_clear()


def default_config(model_type: str):
    return next(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.model_type == model_type)()


@pytest.mark.parametrize("model_type", EXACT)
def test_other_architectures_are_proven_exact(model_type):
    require_exact("x", default_config(model_type))


@pytest.mark.parametrize("model_type", NOT_EXACT)
def test_what_cannot_be_packed_is_refused_by_name(model_type):
    with pytest.raises(UserError, match=NOT_EXACT[model_type]) as error:
        require_exact("some/model", default_config(model_type))
    message = str(error.value)
    assert "some/model" in message and "\n" not in message and "choose a model" in message


MODEL_FAILS = {
    "in its own code": (LlamaMLP, lambda self, x: {}["no such key"]),
    "in torch, called by it": (LlamaMLP, lambda self, x: self.up_proj(x[..., :-1])),
    "by its arguments": (LlamaModel, lambda self, input_ids: None),
}


@pytest.mark.parametrize("how", MODEL_FAILS)
def test_a_model_whose_code_fails_cannot_be_shown_exact(how, monkeypatch):
    owner, forward = MODEL_FAILS[how]
    monkeypatch.setattr(owner, "forward", forward)
    with pytest.raises(UserError, match="Llama cannot be shown to score packed pairs exactly"):
        require_exact("some/model", default_config("llama"))


OWN_BUGS = {
    "in our code": (twin, "pack", lambda _: {}["no such key"], KeyError),
    "in our attention, called by the model": (attention, "layout_of", lambda *_: {}["no such key"], KeyError),
    "in torch, called by us": (attention, "is_segments", lambda _: torch.nn.Linear(2, 1)(torch.ones(3)), RuntimeError),
    "a name that the model does not have": (scorer, "replace_head", lambda model: model.no_head, AttributeError),
}


@pytest.mark.parametrize("where", OWN_BUGS)
def test_a_bug_of_ours_is_not_the_models_fault(where, monkeypatch):
    module, name, bug, kind = OWN_BUGS[where]
    monkeypatch.setattr(module, name, bug)
    with pytest.raises(kind):
        require_exact("some/model", default_config("llama"))


@pytest.mark.launch
def test_a_refusal_comes_before_anything_else(tmp_path):
    """With a model of such an architecture, the command ends with exit code 2 and one line, and makes no folder."""
    folder = tmp_path / "bloom"
    default_config("bloom").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BloomForCausalLM"], "n_layer": 2}
    (folder / "config.json").write_text(json.dumps(config))
    done = launching.run(
        1, "-m", "dpo_ds.train", "--model", folder, "--dataset", "sample", "--output_dir", tmp_path / "out", check=False
    )
    assert done.returncode == 2, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if "dpo_ds: error:" in line]
    assert "Bloom" in line and "Traceback" not in done.stdout and not (tmp_path / "out").exists()


def test_a_folder_of_the_same_name_is_the_users_own(tmp_path, monkeypatch):
    """A folder `gpt2` in the working folder is not the hub's gpt2."""
    monkeypatch.chdir(tmp_path)
    known_model.cache_clear()
    tiny.make("llama", Path("gpt2"))
    assert known_model("gpt2").config.model_type == "llama" == find_model("gpt2").config.model_type
    known_model.cache_clear()
