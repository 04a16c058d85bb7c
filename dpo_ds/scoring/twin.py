"""A model's tiny twin, and the proof by it that packed pairs are scored exactly: two plain forwards must agree.

No flag of transformers says whether an architecture can be packed: StableLM calls itself unable and is exact, MiniMax
calls itself able and is wrong (its linear attention runs on across segments). So a twin of the same config class, a
fraction of a megabyte, is scored both ways before a run begins.
"""

import contextlib
import copy
import functools

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_ds.scoring import attention
from dpo_ds.scoring.packed import Pair, pack
from dpo_ds.scoring.scorer import PairScorer

HEADS, HEAD_DIM, EXPERTS = 4, 16, 4
HIDDEN = HEADS * HEAD_DIM
WINDOW = 9  # shorter than the prompts below, so that a window matters
VOCABULARY = 512
LENGTHS = ((17, 7, 12), (31, 14, 5))  # prompt, chosen, rejected
# Of transformers 5.23's causal language models, those that respect the layout came out within 3e-5 (rounding of sums of
# a dozen fp32 log-probabilities), those that do not off by more than 0.1.
TOLERANCE = 1e-3

# Config keys, where a config has them, and what they become.
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "ffn_dim": 2 * HIDDEN,
    "moe_intermediate_size": HIDDEN,
    "shared_expert_intermediate_size": 2 * HIDDEN,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "sliding_window": WINDOW,
    "q_lora_rank": HIDDEN,
    "kv_lora_rank": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM // 2,
    "n_group": 1,
    "topk_group": 1,
}


def twin(config, vocabulary: int = VOCABULARY):
    """A config of the same class with every peculiarity (windows, shared key heads, wide heads, kinds of layers, tied
    or scaled embeddings, experts) and tiny sizes."""
    small = copy.deepcopy(config)
    text = small.get_text_config()

    def get(key: str):
        return getattr(text, key, None)

    heads, key_heads = get("num_attention_heads") or 1, get("num_key_value_heads")
    wide = (get("head_dim") or 0) * heads > (get("hidden_size") or 0)  # Gemma: heads wider than hidden size / heads
    latent = get("qk_rope_head_dim") is not None  # DeepSeek: head_dim is the rotary part
    kinds = list(dict.fromkeys(get("layer_types") or []))
    dense = get("first_k_dense_replace") or 0
    sizes = {
        **SIZES,
        "vocab_size": vocabulary,
        "num_hidden_layers": max(2, len(kinds), dense + 1),
        "head_dim": HEAD_DIM // 2 if latent else 2 * HEAD_DIM if wide else HEAD_DIM,
        "num_key_value_heads": HEADS if key_heads == heads else 1 if key_heads == 1 else HEADS // 2,
        "num_experts_per_tok": min(2, get("num_experts_per_tok") or 2),
    }
    for key, value in sizes.items():
        if get(key) is not None:
            with contextlib.suppress(AttributeError):  # a property, derived from the others
                setattr(text, key, value)
    if kinds:
        text.layer_types = (kinds * get("num_hidden_layers"))[: get("num_hidden_layers")]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if get(key) is not None:
            setattr(text, key, 0)
    return small


def randomise(model) -> None:
    """Weights larger than the usual first ones, so that attention and position matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)


def require_exact(name: str, config, trust_remote_code: bool = False) -> None:
    """Scores two pairs on the config's twin, packed and by plain forwards.

    Raises ValueError with the reason if the architecture cannot be packed, cannot be shown to be, or comes out wrong.
    """
    architecture = type(config).__name__.removesuffix("Config")
    try:
        difference = _difference(config, trust_remote_code)
    except Exception as error:  # whatever an architecture's own code raises on what it was not made for
        reason = " ".join(f"{error}".split())[:200]
        raise ValueError(
            f"--model {name}: {architecture} cannot be shown to score packed pairs (a tiny twin of it stopped: "
            f"{reason}); choose a model of another architecture, as of the twelve that python -m dpo_ds.models lists"
        ) from error
    if not difference < TOLERANCE:
        raise ValueError(
            f"--model {name}: {architecture} does not keep packed pairs apart (log-probabilities of a tiny twin are "
            f"off by {difference:.2g}); choose a model of another architecture, as of the twelve that python -m "
            "dpo_ds.models lists"
        )


@functools.cache
def _pairs() -> list[Pair]:
    generator = np.random.default_rng(0)
    return [tuple(generator.integers(1, VOCABULARY, n).astype(np.int32) for n in lengths) for lengths in LENGTHS]


@torch.no_grad()
def _difference(config, trust_remote_code: bool) -> float:
    """The largest difference of a response's log-probability, packed from plain."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            twin(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        ).eval()
        randomise(model)
    plain = torch.stack([torch.stack([_plain(model, prompt, r) for r in responses]) for prompt, *responses in _pairs()])
    model.set_attn_implementation(attention.NAME)
    return float((PairScorer(model)(pack(_pairs())) - plain).abs().max())


def _plain(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """log p(response | prompt) by one forward over both and the whole matrix of logits."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, ids[0, len(prompt) :, None]).sum()
