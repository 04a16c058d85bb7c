"""Tiny models with random weights and every peculiarity that matters here, made by code: no downloads."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)

from dpo_ds.embedded import model_folder

VOCABULARY = 1024  # at least the embedded tokenizer's
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


def configs() -> dict:
    tied = {**COMMON, "tie_word_embeddings": True}
    return {
        "gpt2": GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
        ),
        "llama": LlamaConfig(**COMMON),
        "llama-tied": LlamaConfig(**tied),
        "mistral": MistralConfig(**COMMON, sliding_window=WINDOW),
        "cohere": CohereConfig(**tied, logit_scale=0.25, use_qk_norm=True),
        "gemma2": Gemma2Config(
            **tied, head_dim=12, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
        ),
        "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    }


def make(name: str, folder: Path, dtype=torch.float32) -> Path:
    """Saves the tiny model and the embedded tokenizer to a folder, as a user would have them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[name], dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the usual, so that attention and position matter
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder
