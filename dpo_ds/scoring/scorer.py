"""The module that DeepSpeed's engines hold: a packed batch in, the responses' log-probabilities out.

One forward scores chosen and rejected together; the language model's body runs on every token once, its head on the
response rows only.
"""

import torch

from dpo_ds.scoring.head import replace_head
from dpo_ds.scoring.packed import PackedBatch
from dpo_ds.scoring.router import router_loss


class PairScorer(torch.nn.Module):
    """Wraps a causal LM of transformers (or peft's wrapper of one), loaded with attention.NAME.

    `balance` asks for a mixture's load-balancing loss beside the log-probabilities, in training.
    """

    def __init__(self, model, balance: bool = False):
        super().__init__()
        self.model, self.balance = model, balance
        # peft's wrapper holds the language model at base_model.model; LoRA layers are inside of it.
        self.causal_lm = [model.get_base_model() if hasattr(model, "get_base_model") else model]
        replace_head(self.causal_lm[0])

    def forward(self, batch: PackedBatch) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """logps [B, 2] fp32: the sum over each response's tokens of log p(token), chosen and rejected. With `balance`
        and in training also the router's loss, fp32 [B]."""
        causal_lm = self.causal_lm[0]
        balance = self.balance and self.training
        outputs = causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.layout,
            use_cache=False,
            **({"output_router_logits": True} if balance else {}),
        )
        hidden_NH = outputs.last_hidden_state[0].index_select(0, batch.rows)
        logps_N = causal_lm.get_output_embeddings()(hidden_NH, targets=batch.targets)
        logps = torch.zeros(2 * batch.pairs, dtype=torch.float32, device=logps_N.device)
        logps = logps.index_add(0, batch.responses, logps_N).view(-1, 2)
        if not balance:
            return logps
        top_k = causal_lm.config.get_text_config().num_experts_per_tok
        return logps, router_loss(outputs.router_logits, batch.token_pairs, batch.pairs, top_k)
