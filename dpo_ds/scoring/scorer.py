"""Scorer, the module inside DeepSpeed's engines: a packed batch in, the answers' log-probabilities out.

One forward scores all answers together. The body of the language model runs once on every token, its head only
on the rows that predict learned tokens.
"""

from typing import NamedTuple

import torch

from dpo_ds.models.lora import LanguageModel, plain_model
from dpo_ds.scoring import attention
from dpo_ds.scoring.adapters import replace_adapters
from dpo_ds.scoring.embedding import TiedGradient, replace_embedding
from dpo_ds.scoring.fuse import fuse
from dpo_ds.scoring.head import LogitBudget, replace_head
from dpo_ds.scoring.packed import CannotPack, PackedBatch
from dpo_ds.scoring.router import router_loss


class Scored(NamedTuple):
    """What one forward says about a packed batch. fp32. What was not asked for is None."""

    answers: torch.Tensor  # [A] logps: the sum over each answer's learned tokens of log p(token)
    tokens: torch.Tensor | None = None  # [N] log p(token) of each learned token
    certainty: torch.Tensor | None = None  # [A] see Scorer; without a graph
    balance: torch.Tensor | None = None  # [B] a mixture's load-balancing loss over each pair's tokens


class Scorer(torch.nn.Module):
    """Wraps a causal LM of transformers (or peft's wrapper of one), loaded with attention.implementation(kernel).

    tokens: forward also returns each token's logp. certainty: in training also WPO's factor of each answer, exp of the
    mean over its tokens of log p(token) - log sum over the vocabulary of p^2 (Zhou et al. 2024, arXiv 2406.11827).
    balance: in training also a mixture's load-balancing loss. fused: small functions of the layers are compiled
    (fuse.py). `budget` limits the logits that the head may hold; None: by the device.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: bool = False,
        certainty: bool = False,
        balance: bool = False,
        fused: bool = False,
        budget: LogitBudget | None = None,
    ):
        super().__init__()
        self.model, self.budget = model, budget
        self.tokens, self.certainty, self.balance = tokens, certainty, balance
        # The language model without peft's wrapper; its LoRA layers are inside it. It is kept in a list, so that torch
        # does not register it as a second child.
        self.causal_lm = [plain_model(model)]
        attention.require_packed(self.causal_lm[0])
        self.tied_embedding = [replace_embedding(self.causal_lm[0])]
        if fused:
            fuse(self.causal_lm[0])
        replace_adapters(self.causal_lm[0])
        replace_head(self.causal_lm[0])

    def forward(self, batch: PackedBatch) -> Scored:
        causal_lm = self.causal_lm[0]
        balance = self.balance and self.training
        tied, inputs = self._inputs(batch.input_ids)
        outputs = causal_lm.base_model(
            **inputs,
            position_ids=batch.position_ids,
            attention_mask=batch.segments,
            use_cache=False,
            **({"output_router_logits": True} if balance else {}),
        )
        if not hasattr(outputs, "last_hidden_state"):  # the base model is a whole language model, as in Llama 4
            raise CannotPack(f"{type(causal_lm.base_model).__name__} returns logits, not hidden states")
        hidden_NH = outputs.last_hidden_state[0].index_select(0, batch.rows)
        head = causal_lm.get_output_embeddings()
        certainty = self.certainty and self.training
        collisions_N = torch.empty_like(batch.targets, dtype=torch.float32) if certainty else None
        logps_N = head(hidden_NH, targets=batch.targets, budget=self.budget, tied=tied, collisions=collisions_N)
        top_k = causal_lm.config.get_text_config().num_experts_per_tok if balance else 0
        return Scored(
            _sums(logps_N, batch),
            logps_N if self.tokens else None,
            None if collisions_N is None else (_sums(logps_N.detach() - collisions_N, batch) / batch.lengths).exp(),
            router_loss(outputs.router_logits, batch, top_k) if balance else None,
        )

    def _inputs(self, input_ids: torch.Tensor) -> tuple[TiedGradient | None, dict[str, torch.Tensor]]:
        """The inputs of the model's body: token ids, or, for a tied model, their embeddings. This is the same with and
        without a gradient, so that ZeRO-3 sees modules in the same order."""
        (embedding,) = self.tied_embedding
        if embedding is None:
            return None, {"input_ids": input_ids}
        tied = TiedGradient() if torch.is_grad_enabled() and embedding.weight.requires_grad else None
        return tied, {"inputs_embeds": embedding(input_ids, tied)}


def _sums(values_N: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The sum over each answer's learned tokens, [A]."""
    sums = torch.zeros(batch.answers, dtype=torch.float32, device=values_N.device)
    return sums.index_add(0, batch.token_answers, values_N)
