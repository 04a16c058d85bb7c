"""Counts the memory of a forward and backward, beside that of weights and optimizer, and the bytes that they move.

The model's own code (packed attention, fused head, LoRA, recomputation) runs on the meta device, where tensors have
sizes but no content, and the count follows each tensor from its creation to its release. A few layers are enough,
because memory grows linearly with their number.
"""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dpo_ds.config import Options
from dpo_ds.data.pairs import Group
from dpo_ds.models.lora import add_lora
from dpo_ds.models.recompute import recompute
from dpo_ds.scoring import attention
from dpo_ds.scoring.head import LogitBudget
from dpo_ds.scoring.packed import PackedBatch, pack
from dpo_ds.scoring.rotary import fix_frequencies
from dpo_ds.scoring.scorer import Scorer

MOST_COUNTED = 2**18  # tokens


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta tensors that were created inside the block and are alive (`now`), and their maximum
    (`peak`). The tensors in `before`, and views of them, do not count.

    Also counts what operations read and write (`moved`), except matrix products: their time is that of their FLOPs.
    """

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = self.moved = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        written = [tensor for tensor in tree_iter(results) if isinstance(tensor, torch.Tensor) and tensor.is_meta]
        for tensor in written:
            self._count(tensor.untyped_storage())
        product = function.overloadpacket in flop_registry or "grouped_mm" in str(function)  # of a layer's experts
        if not function.is_view and not product:
            read = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)]
            self.moved += sum(tensor.numel() * tensor.itemsize for tensor in (*read, *written))
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch's activations: a part outside the layers (head, embedding) and a part per layer; and
    the bytes that a layer's operations read and write."""

    outside: int
    per_layer: int
    layers: int
    moved: int

    @property
    def bytes(self) -> int:
        return self.outside + self.per_layer * self.layers

    @classmethod
    def mixed(cls, kept: "Activations", recomputed: "Activations", layers: int) -> int:
        """Bytes if the first `layers` layers recompute theirs, and the others, at least one, keep them."""
        first = layers * recomputed.per_layer
        before_backward = kept.outside + first + (kept.layers - layers) * kept.per_layer
        # Later, the first layers work one by one, and what the others kept is gone.
        while_recomputing = recomputed.outside + first
        return max(before_backward, while_recomputing)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of a model's config with so many layers, their kinds in equal parts."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in vars(text).items():
        if name.endswith("_types") and isinstance(value, list) and len(value) == before:
            setattr(text, name, (list(dict.fromkeys(value)) * layers)[:layers])
    return config


class Counter:
    """Counts activations for one model and one set of options. It builds models of a few layers once."""

    def __init__(
        self,
        config: PreTrainedConfig,
        options: Options,
        dtype: torch.dtype,
        experts: bool,
        keep_gradients: bool = False,
    ):
        text = config.get_text_config()
        self.layers = text.num_hidden_layers
        self.kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or [])) or [None]
        self.counts = (1 + len(self.kinds), 1 + 2 * len(self.kinds))
        self.options, self.keep_gradients = options, keep_gradients
        # On the meta device, grouped products exist only in bf16; in fp32 nearly everything takes twice as much.
        self.scale = 1
        if experts and dtype == torch.float32:
            dtype, self.scale = torch.bfloat16, 2
        self.scorers = [self._scorer(config, count, dtype) for count in self.counts]

    def _scorer(self, config: PreTrainedConfig, layers: int, dtype: torch.dtype) -> Scorer:
        config = with_layers(config, layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention.implementation(attention.SIZES_ONLY),
                trust_remote_code=self.options.trust_remote_code,
            )
            fix_frequencies(model, max_length=1)  # on meta the length does not matter
            if self.options.lora:
                model = add_lora(model, self.options)
                for name, parameter in model.named_parameters():
                    if ".lora_" in name:  # off the meta device, peft gives adapters the dtype of their base
                        parameter.data = parameter.data.to(dtype)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for parameter in model.parameters():
            if parameter.requires_grad and not self.keep_gradients:  # ZeRO moves a gradient away as soon as it exists
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return Scorer(model)

    def count(
        self, tokens: int, pair_tokens: int, checkpointing: bool, budget: LogitBudget, learns: bool = True
    ) -> Activations:
        """Counts for a micro-batch of `tokens` packed tokens in pairs of `pair_tokens`. `budget` limits the head's
        logits. Unless it `learns`, it is only scored.

        A micro-batch of more than MOST_COUNTED tokens is taken to need as much for each token as one of that size. Of
        many millions of tokens, the description alone would take minutes and gigabytes.
        """
        if tokens > MOST_COUNTED:
            most = self.count(MOST_COUNTED, pair_tokens, checkpointing, budget, learns)
            sizes = (size * tokens // MOST_COUNTED for size in (most.outside, most.per_layer, most.moved))
            outside, per_layer, moved = sizes
            return Activations(outside, per_layer, self.layers, moved)
        batch = _batch(tokens, pair_tokens)
        few, many = (
            passes(scorer, batch, count if checkpointing else 0, budget, learns)
            for scorer, count in zip(self.scorers, self.counts, strict=True)
        )
        more = self.counts[1] - self.counts[0]
        per_layer, moved = (self.scale * (many.peak - few.peak) // more, self.scale * (many.moved - few.moved) // more)
        return Activations(self.scale * few.peak - per_layer * self.counts[0], per_layer, self.layers, moved)


def _drop_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def _batch(tokens: int, pair_tokens: int) -> PackedBatch:
    pairs: list[Group] = []
    while tokens > 2:
        size = min(tokens, pair_tokens)
        prompt, chosen, rejected = (np.zeros(n, dtype=np.int32) for n in lengths(size))
        pairs.append(Group.of_pair(prompt, chosen, rejected))
        tokens -= size
    return pack(pairs).to("meta")


def lengths(size: int) -> tuple[int, int, int]:
    """A quarter of a pair is its prompt: between HH's half and AlpacaEval's twentieth."""
    prompt = max(1, size // 4)
    chosen = max(1, (size - prompt) // 2)
    return prompt, chosen, max(1, size - prompt - chosen)


def passes(scorer: Scorer, batch: PackedBatch, layers: int, budget: LogitBudget, learns: bool = True) -> LiveBytes:
    """The count of a forward and backward, if so many layers recompute their activations; or of a forward alone, which
    keeps none."""
    model, scorer.budget = scorer.model, budget
    recompute(model, layers)
    before = [
        *scorer.parameters(),
        *scorer.buffers(),
        *(t for t in vars(batch).values() if isinstance(t, torch.Tensor)),
    ]
    with LiveBytes(before) as live, torch.set_grad_enabled(learns):
        logps = scorer(batch).answers
        if learns:
            logps.sum().backward()
        del logps
    return live
