"""The module that DeepSpeed's engines hold: a packed batch in, the responses' log-probabilities out.

One forward scores chosen and rejected together; the language model's body runs on every token once, its head on the
response rows only.
"""

import torch

from dpo_ds.scoring.head import replace_head
from dpo_ds.scoring.packed import PackedBatch


class PairScorer(torch.nn.Module):
    """Wraps a causal LM of transformers (or peft's wrapper of one), loaded with attention.NAME."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # peft's wrapper holds the language model at base_model.model; LoRA layers are inside of it.
        self.causal_lm = [model.get_base_model() if hasattr(model, "get_base_model") else model]
        replace_head(self.causal_lm[0])

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """logps [B, 2] fp32: the sum over each response's tokens of log p(token), chosen and rejected."""
        causal_lm = self.causal_lm[0]
        hidden_1TH = causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.layout,
            use_cache=False,
        ).last_hidden_state
        hidden_NH = hidden_1TH[0].index_select(0, batch.rows)
        logps_N = causal_lm.get_output_embeddings()(hidden_NH, targets=batch.targets)
        logps = torch.zeros(2 * batch.pairs, dtype=torch.float32, device=logps_N.device)
        return logps.index_add(0, batch.responses, logps_N).view(-1, 2)
