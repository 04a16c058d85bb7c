"""The slow, obvious DPO that the fast one is compared with: two plain forwards for a pair, full logits, plain torch."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, get_scheduler


def load(folder, dtype=torch.float32):
    """The model as plain transformers loads it, without dropout."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def token_logps(model, prompt, response) -> torch.Tensor:
    """log p of each response token, from one forward over prompt and response: fp32 [len(response)]."""
    ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor([int(t) for t in response])[:, None])[:, 0]


def pair_logps(model, pair) -> torch.Tensor:
    """[2]: summed logps of chosen and rejected."""
    prompt, chosen, rejected = pair
    return torch.stack([token_logps(model, prompt, chosen).sum(), token_logps(model, prompt, rejected).sum()])


def pairs_logps(model, pairs) -> torch.Tensor:
    return torch.stack([pair_logps(model, pair) for pair in pairs])


def answers_logps(model, groups) -> torch.Tensor:
    """[A]: the summed logps of every answer's learned tokens, one forward over prompt and answer each."""
    logps = []
    for group in groups:
        for answer, scored in zip(group.answers, group.scored, strict=True):
            tokens = token_logps(model, group.prompt, answer)
            logps.append((tokens if scored is None else tokens[torch.from_numpy(scored)]).sum())
    return torch.stack(logps)


def losses(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    margins = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return F.softplus(-beta * margins)


def train(folder, steps, weights=None, *, learning_rate, warmup, beta=0.1, max_grad_norm=1.0) -> list[float]:
    """Trains plain DPO with AdamW on a list of pairs for each step, with the weights of each. Returns each step's loss
    before its update."""
    policy, reference = load(folder), load(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=len(steps))
    curve = []
    for pairs, weight in zip(steps, weights or [[1.0] * len(pairs) for pairs in steps], strict=True):
        with torch.no_grad():
            fixed = pairs_logps(reference, pairs)
        weight = torch.tensor(weight)
        loss = (weight * losses(pairs_logps(policy, pairs), fixed, beta)).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve
