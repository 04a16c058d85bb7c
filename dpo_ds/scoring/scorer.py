"""Scorer, the module inside DeepSpeed's engines: a packed batch in, the answers' log-probabilities out.

One forward scores all answers together. The body of the language model runs once on every token, its head only
on the rows that predict learned tokens.
"""

import torch

from dpo_ds.models.lora import LanguageModel, plain_model
from dpo_ds.scoring import attention
from dpo_ds.scoring.embedding import TiedGradient, replace_embedding
from dpo_ds.scoring.head import LogitBudget, replace_head
from dpo_ds.scoring.packed import CannotPack, PackedBatch
from dpo_ds.scoring.router import router_loss


class Scorer(torch.nn.Module):
    """Wraps a causal LM of transformers (or peft's wrapper of one), loaded with attention.implementation(kernel).

    With `balance`, forward also returns a mixture's load-balancing loss in training. `budget` limits the logits that
    the head may hold; None: by the device.
    """

    def __init__(self, model: LanguageModel, balance: bool = False, budget: LogitBudget | None = None):
        super().__init__()
        self.model, self.balance, self.budget = model, balance, budget
        # The language model without peft's wrapper; its LoRA layers are inside it. It is kept in a list, so that torch
        # does not register it as a second child.
        self.causal_lm = [plain_model(model)]
        attention.require_packed(self.causal_lm[0])
        self.tied_embedding = [replace_embedding(self.causal_lm[0])]
        replace_head(self.causal_lm[0])

    def forward(self, batch: PackedBatch) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """logps [A] fp32: the sum over each answer's learned tokens of log p(token). With `balance`, in training also
        the router's loss [B], fp32."""
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
        logps_N = head(hidden_NH, targets=batch.targets, budget=self.budget, tied=tied)
        logps = torch.zeros(batch.answers, dtype=torch.float32, device=logps_N.device)
        logps = logps.index_add(0, batch.token_answers, logps_N)
        if not balance:
            return logps
        top_k = causal_lm.config.get_text_config().num_experts_per_tok
        return logps, router_loss(outputs.router_logits, batch, top_k)

    def _inputs(self, input_ids: torch.Tensor) -> tuple[TiedGradient | None, dict[str, torch.Tensor]]:
        """The inputs of the model's body: token ids, or, for a tied model, their embeddings. This is the same with and
        without a gradient, so that ZeRO-3 sees modules in the same order."""
        (embedding,) = self.tied_embedding
        if embedding is None:
            return None, {"input_ids": input_ids}
        tied = TiedGradient() if torch.is_grad_enabled() and embedding.weight.requires_grad else None
        return tied, {"inputs_embeds": embedding(input_ids, tied)}
