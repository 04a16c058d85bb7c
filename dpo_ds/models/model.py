"""A model as its config describes it, before any weight is read: parameters, size class, tier, context."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dpo_ds.errors import UserError, one_line

if TYPE_CHECKING:  # a command that refuses its options must not wait for these imports
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class SizeClass:
    """Defaults that follow from a model's size."""

    name: str
    below: float  # parameters
    tier: str  # the ds_configs file for full fine-tuning
    learning_rate: float


# Learning rates: 5e-7 is Zephyr's for 7 B (arXiv 2310.16944, section 4); smaller models get more, larger ones less.
# The first row is ours: toy models learn from a thousand pairs in seconds (tests/launches/test_embedded.py).
SIZE_CLASSES = (
    SizeClass("toy", 2e7, "zero0_debug", 2e-4),
    SizeClass("debug", 5e8, "zero0_debug", 5e-6),
    SizeClass("small", 5e9, "zero2_small", 1e-6),
    SizeClass("standard", 2e10, "zero3_standard", 5e-7),
    SizeClass("specialised", 4e10, "zero3_offload_specialised", 5e-7),
    SizeClass("large", float("inf"), "zero3_offload_large", 3e-7),
)


def torch_dtype(precision: str) -> "torch.dtype":
    """torch's dtype for --precision bf16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _path(module: "torch.nn.Module") -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@dataclass(frozen=True)
class Model:
    """A causal language model that has been found, but not loaded."""

    name: str  # as the user gave it
    source: str  # what from_pretrained takes: a folder, or the hub id
    config: "PreTrainedConfig"
    trust_remote_code: bool = False
    known_parameters: int | None = None  # counted before, for the twelve

    @cached_property
    def skeleton(self) -> "PreTrainedModel":
        """The model without weights, on the meta device. Raises UserError if its config describes none."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # transformers builds what the user's file says, so any error is about it
            raise UserError(
                f"--model {self.name}: no model can be built of its config.json ({type(error).__name__}: "
                f"{one_line(error)}): correct it, or copy it again"
            ) from error

    @cached_property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return self.known_parameters or sum(p.numel() for p in self.skeleton.parameters())

    @cached_property
    def size_class(self) -> SizeClass:
        return next(c for c in SIZE_CLASSES if self.parameters < c.below)

    @property
    def is_moe(self) -> bool:
        text = self.config.get_text_config()
        return any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))

    @cached_property
    def moe_blocks(self) -> list[str]:
        """Classes of the modules that hold experts. ZeRO-3 must gather these whole: otherwise ranks whose tokens go to
        different experts would wait for each other for ever."""
        if not self.is_moe:
            return []
        return sorted({_path(module) for module in self.skeleton.modules() if hasattr(module, "experts")})

    @cached_property
    def largest_block(self) -> int:
        """Parameters of the largest block of experts; 0 without any."""
        names = set(self.moe_blocks)
        blocks = (m for m in self.skeleton.modules() if names and _path(m) in names)
        return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)

    @property
    def tier(self) -> str:
        """The ds_configs file of the model's class, for full fine-tuning."""
        return "zero3_offload_moe" if self.is_moe and self.parameters > 5e9 else self.size_class.tier

    @property
    def lora_tier(self) -> str:
        return "zero3_lora_large" if self.tier.startswith("zero3") else self.tier

    @property
    def context(self) -> int | None:
        """The most positions that the model supports; None if its config names no limit."""
        text = self.config.get_text_config()
        # Command-R's config.json has both; the second is the length of its last training.
        limits = [getattr(text, key, None) for key in ("max_position_embeddings", "model_max_length")]
        return max((limit for limit in limits if limit), default=None)

    def max_length(self, asked: int | None) -> int:
        """--max_length, by default 1024 or the context if that is less. Raises UserError if it is above the context."""
        if asked is None:
            return min(1024, self.context or 1024)
        if self.context is not None and asked > self.context:
            raise UserError(f"--max_length {asked} is above the model's context of {self.context}: lower it")
        return asked

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model tells apart."""
        return self.config.get_text_config().vocab_size

    @property
    def layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size
