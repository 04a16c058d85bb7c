"""A model's tiny twin, with which a run checks that packed pairs get the same scores as with plain forwards.

No flag of transformers says whether an architecture can be packed: StableLM's says no, but its scores are exact;
MiniMax's says yes, but its scores are wrong (its linear attention continues across segments). So before a run begins, a
twin of the same config class, a fraction of a megabyte, is scored both ways.
"""

import contextlib
import copy
import functools
import traceback
from types import FrameType

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_ds.data.pairs import Group
from dpo_ds.errors import UserError, one_line
from dpo_ds.scoring import attention
from dpo_ds.scoring.packed import CannotPack, pack
from dpo_ds.scoring.rotary import fix_frequencies
from dpo_ds.scoring.scorer import Scorer

HEADS, HEAD_DIM, EXPERTS = 4, 16, 4
ORIGINAL_CONTEXT = 40  # shorter than one of the pairs below and longer than the others
MAX_LENGTH = 64  # longer than all of them
WINDOW = 9  # shorter than the prompts below, so that a window has an effect
VOCABULARY = 512
LENGTHS = ((17, 7, 12), (31, 14, 5, 9))  # of a prompt and its answers
# Of transformers 5.23's causal language models, those that respect the segments differ by at most 3e-5 (rounding of
# sums of a dozen fp32 log-probabilities), the others by more than 0.1.
TOLERANCE = 1e-3
# Config keys of models with state-space or recurrent layers: Mamba, its hybrids with attention, Griffin, RWKV.
STATE_KEYS = ("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_dim", "lru_width", "rescale_every")
INSTEAD = "choose a model of another architecture, such as one that python -m dpo_ds.models lists"
# The allowed error of a bf16 kernel on the twin: SLACK times the error of torch's own attention in bf16, plus FLOOR.
# Both round the same sums. A kernel that sees tokens of other segments differs by more than 0.1.
KERNEL_SLACK, KERNEL_FLOOR = 2.0, 0.03


def _sizes(head_dim: int) -> dict[str, int]:
    """The twin's values for config keys; only keys that a config has are changed."""
    hidden = HEADS * head_dim
    return {
        "hidden_size": hidden,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * hidden,
        "ffn_dim": 2 * hidden,
        "moe_intermediate_size": hidden,
        "shared_expert_intermediate_size": 2 * hidden,
        "num_local_experts": EXPERTS,
        "num_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "sliding_window": WINDOW,
        "q_lora_rank": hidden,
        "kv_lora_rank": head_dim,
        "qk_nope_head_dim": head_dim,
        "v_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "qk_head_dim": head_dim + head_dim // 2,  # some models read this sum from the config
        "n_group": 1,
        "topk_group": 1,
    }


def twin(config: PreTrainedConfig, vocabulary: int = VOCABULARY, head_dim: int = HEAD_DIM) -> PreTrainedConfig:
    """A config of the same class with tiny sizes. It keeps every special feature: windows, shared key heads, wide
    heads, kinds of layers, tied or scaled embeddings, experts."""
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
        **_sizes(head_dim),
        "vocab_size": vocabulary,
        "num_hidden_layers": max(2, len(kinds), dense + 1),
        "head_dim": head_dim // 2 if latent else 2 * head_dim if wide else head_dim,
        "num_key_value_heads": HEADS if key_heads == heads else 1 if key_heads == 1 else HEADS // 2,
        "num_experts_per_tok": min(2, get("num_experts_per_tok") or 2),
    }
    if hasattr(text, "num_key_value_heads") and key_heads is None:  # None means as many as heads
        sizes["num_key_value_heads"] = text.num_key_value_heads = HEADS
    for key, value in sizes.items():
        if get(key) is not None:
            with contextlib.suppress(AttributeError):  # a property that follows from other keys
                setattr(text, key, value)
    if kinds:
        with contextlib.suppress(AttributeError):
            text.layer_types = (kinds * get("num_hidden_layers"))[: get("num_hidden_layers")]
    _shrink_rope(text, head_dim)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if get(key) is not None:
            setattr(text, key, 0)
    return small


def _shrink_rope(text: PreTrainedConfig, head_dim: int) -> None:
    """Shrinks the original context of rotary positions, so that some of the twin's pairs are longer than it."""
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            parameters["original_max_position_embeddings"] = ORIGINAL_CONTEXT
            for key in ("short_factor", "long_factor"):
                parameters[key] = (list(parameters[key]) * head_dim)[: head_dim // 2]
        if "dynamic" in kind:
            text.max_position_embeddings = ORIGINAL_CONTEXT


def randomise(model: torch.nn.Module) -> None:
    """Gives a model larger random weights than usual, so that attention and positions have an effect."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)


def require_exact(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Checks on the config's twin that packed pairs get the same scores as with plain forwards.

    Raises UserError with the reason if the scores differ, or if the model's code fails on the twin. An exception of
    dpo_ds's own code is a bug, and is raised as it is.
    """
    architecture = type(config).__name__.removesuffix("Config")
    if any(getattr(config.get_text_config(), key, None) for key in STATE_KEYS):
        raise UserError(
            f"--model {name}: {architecture} does not keep packed pairs apart: it has layers with a running state, "
            f"which carry it from one response into the next; {INSTEAD}"
        )
    try:
        difference = _difference(_Like(config), trust_remote_code)
    except Exception as error:  # a model's code may raise anything on packed inputs
        if not (isinstance(error, CannotPack) or _from_model(error)):
            raise
        raise UserError(
            f"--model {name}: {architecture} cannot be shown to score packed pairs exactly (its tiny twin "
            f"failed: {one_line(error, 200)}); {INSTEAD}"
        ) from error
    if not difference < TOLERANCE:
        raise UserError(
            f"--model {name}: {architecture} does not keep packed pairs apart (log-probabilities of its tiny twin "
            f"are wrong by {difference:.2g}); {INSTEAD}"
        )


def _from_model(error: BaseException) -> bool:
    """Whether an exception was raised in the model's code, or in what that code called, dpo_ds excepted."""
    inner: list[FrameType] = []  # the calls inside dpo_ds's last
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inner = [] if _package(frame) == "dpo_ds" else [*inner, frame]
    return any(_package(frame).startswith("transformers") or _calls_model(frame) for frame in inner)


def _package(frame: FrameType) -> str:
    """A model's remote code is in the package transformers_modules."""
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _calls_model(frame: FrameType) -> bool:
    """Whether torch calls a module of the model there. This frame is the last if the module takes no such argument."""
    called = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
    return isinstance(called, torch.nn.Module) and type(called).__module__.partition(".")[0] not in ("dpo_ds", "torch")


@functools.cache
def _groups() -> list[Group]:
    generator = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return generator.integers(1, VOCABULARY, count).astype(np.int32)

    return [
        Group(tokens(prompt), [tokens(n) for n in answers], np.array([[0, 1]]), [None] * len(answers))
        for prompt, *answers in LENGTHS
    ]


class _Like:
    """A config, equal to another one of its class with the same values."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.key = config, (type(config), config.to_json_string(use_diff=False))

    def __eq__(self, other) -> bool:
        return self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.cache  # the plan asks, and the run's preparation does
@torch.no_grad()
def _difference(like: _Like, trust_remote_code: bool) -> float:
    """The largest difference between the packed and the plain log-probability of a response."""
    model = _build(twin(like.config), trust_remote_code)
    plain = torch.stack([_plain(model, group.prompt, answer) for group in _groups() for answer in group.answers])
    kernel = attention.implementation(attention.SDPA)
    model.set_attn_implementation(kernel)  # warns and changes nothing where a model has attention code of its own
    if model.config._attn_implementation != kernel:
        raise CannotPack("its attention does not go through transformers' attention interface")
    return float((Scorer(model)(pack(_groups())).answers - plain).abs().max())


def _build(config: PreTrainedConfig, trust_remote_code: bool):
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        ).eval()
        randomise(model)
    fix_frequencies(model, MAX_LENGTH)
    return model


def _plain(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """log p(response | prompt) from one plain forward with the whole matrix of logits."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, ids[0, len(prompt) :, None]).sum()


# ------------------------------------------------------------------------------------------------- attention's kernel


def choose_kernel(
    wanted: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> tuple[str, list[str]]:
    """The fastest kernel that scores the model's twin correctly on this device, and why each faster one does not.

    Raises UserError if the wanted one does not.
    """
    failed: list[str] = []
    capability = attention.capability() if device.type == "cuda" else None
    for name in attention.usable(wanted, config, dtype, capability):
        problem = None if name == attention.SDPA else _kernel_problem(name, config, dtype, device, trust_remote_code)
        if problem is None:
            return name, failed
        failed.append(f"attention kernel {name} {problem}")
    raise UserError(f"--attention {wanted}: on this machine the {failed[-1]}; use --attention auto")


def _kernel_problem(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> str | None:
    """What is wrong with a kernel on a twin with the model's own head dimension; None if nothing is."""
    return _problem(config, name, dtype, device, trust_remote_code, fused=False)


def fused_problem(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> str | None:
    """What is wrong with the compiled functions of scoring/fuse.py, likewise."""
    return _problem(config, attention.SDPA, dtype, device, trust_remote_code, fused=True)


def _problem(
    config: PreTrainedConfig,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    fused: bool,
) -> str | None:
    """What is wrong with the twin's scores by a kernel, with compiled functions or without; None if nothing is."""
    small = twin(config, head_dim=attention.head_dim_of(config.get_text_config()))
    if getattr(small.get_text_config(), "num_experts_per_tok", None):
        # Use all experts: with fewer, bf16's rounding would decide which of them a token goes to.
        small.get_text_config().num_experts_per_tok = EXPERTS
    try:
        truth = _scored(small, attention.SDPA, torch.float32, device, trust_remote_code)
        torchs = _scored(small, attention.SDPA, dtype, device, trust_remote_code)
        found = _scored(small, kernel, dtype, device, trust_remote_code, fused)
    except Exception as error:  # what was built for another torch, GPU or CUDA, or a compiler, may raise anything
        return f"stops: {one_line(f'{type(error).__name__}: {error}', 200)}"
    for what, exact, plain, fast in zip(("log-probabilities", "gradients"), truth, torchs, found, strict=True):
        off, allowed = float((fast - exact).abs().max()), KERNEL_SLACK * float((plain - exact).abs().max())
        allowed += KERNEL_FLOOR * float(exact.abs().max() if what == "gradients" else 1.0)
        if not off <= allowed:
            return f"gives wrong {what} (off by {off:.2g}, where torch's own is allowed {allowed:.2g})"
    return None


def _scored(
    config: PreTrainedConfig,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin's logps [A] and the gradient of its embedding [V, H], both fp32."""
    model = _build(config, trust_remote_code).to(device, dtype)
    model.set_attn_implementation(attention.implementation(kernel))
    logps = Scorer(model, fused=fused)(pack(_groups()).to(device)).answers
    (logps * torch.arange(1, 1 + len(logps), device=device)).sum().backward()
    return logps.detach().float(), model.get_input_embeddings().weight.grad.float()
