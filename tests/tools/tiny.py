"""Tiny models with random weights and every peculiarity that matters here, made by code: no downloads.

The report's twelve models have a twin each, by their hub id, with a tokenizer and chat template like that model's. A
few further shapes have the embedded tokenizer.
"""

from pathlib import Path

import templates
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config, LlamaConfig, MistralConfig

from dpo_ds.embedded import model_folder
from dpo_ds.models.find import known_models
from dpo_ds.scoring.twin import randomise, twin

VOCABULARY = 1024  # no tokenizer here has more tokens
CONTEXT = 512
WINDOW = 9  # shorter than the prompts

COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
    tie_word_embeddings=False,
)
TIED = {**COMMON, "tie_word_embeddings": True}
OTHERS = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied": LlamaConfig(**TIED),
    "mistral-v0.1": MistralConfig(**COMMON, sliding_window=WINDOW),
    "command-r-plus": CohereConfig(**TIED, logit_scale=0.25, use_qk_norm=True),
    "gemma2": Gemma2Config(
        **TIED, head_dim=12, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
}
TWELVE = list(known_models())
NAMES = [*TWELVE, *OTHERS]


def config(name: str):
    if name in OTHERS:
        return OTHERS[name]
    small = twin(known_models()[name].config, VOCABULARY)
    small.max_position_embeddings = CONTEXT
    return small


def make(name: str, folder: Path, dtype=torch.float32) -> Path:
    """Saves the tiny model and its tokenizer to a folder, as a user would have them."""
    model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder()) if name in OTHERS else templates.tokenizer(name)
    tokenizer.save_pretrained(folder)
    return folder


def short(model_id: str) -> str:
    """A hub id without its owner, to name a folder or a test."""
    return model_id.rpartition("/")[2]
