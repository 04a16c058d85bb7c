"""The slow, obvious DPO that the fast one is compared with: two plain forwards for a pair, full logits, plain torch."""

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_scheduler

from dpo_ds.losses import formulas
from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.table import losses_of


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


def train(
    folder, steps, weights=None, *, learning_rate, warmup, beta=0.1, max_grad_norm=1.0, models=None, moving=None
) -> list[float]:
    """Trains plain DPO with AdamW on a list of pairs for each step, with the weights of each. Returns each step's loss
    before its update.

    models: policy and reference, by default two of the folder's. moving: (n, alpha), TR-DPO's update of the reference
    after every n steps.
    """
    policy, reference = models or (load(folder), load(folder))
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
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
        if moving and len(curve) % moving[0] == 0:
            with torch.no_grad():
                for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    old.copy_(moving[1] * new + (1 - moving[1]) * old)
    return curve


def train_with(options, folder, pairs, steps, *, learning_rate, warmup, max_grad_norm=1.0) -> list[float]:
    """Like `train`, with the losses that a run's options name, each applied to a whole step at once. With --adapter,
    its weights alone are trained.

    pairs: a PairSet; steps: for each step, the places of its pairs. Every answer is scored once for each of its pairs.
    """
    policy, reference = load(folder), load(folder)
    if options.adapter is not None:
        policy, reference = (
            PeftModel.from_pretrained(model, options.adapter, is_trainable=True) for model in (policy, reference)
        )
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=len(steps))
    terms, running, curve = losses_of(options), Running(), []
    for step in steps:
        logps = [side for i in step for side in _two_sides(policy, pairs, i)]
        with torch.no_grad():
            fixed = [side for i in step for side in _two_sides(reference, pairs, i)]
        if options.reference == "none" or not any(term.loss.reference for term in terms):
            fixed = [torch.zeros_like(side) for side in fixed]
        lengths = torch.tensor([len(side) for side in logps]).view(-1, 2)
        weights = torch.tensor(pairs.weights[step])
        x = Compared(
            policy=_pairs_of(logps, lengths, options.ld_alpha),
            reference=_pairs_of(fixed, lengths, options.ld_alpha),
            lengths=lengths,
            answers=torch.tensor(pairs.pairs[step]),
            rankings=torch.tensor(pairs.rows[step]),
            margins=torch.tensor(pairs.margins[step]),
            weights=weights,
            mean_length=float((weights * lengths[:, 0]).sum() / weights.sum()),
            running=running,
        )
        losses = sum(term.weight * getattr(formulas, term.name)(x, term.settings) for term in terms)
        if options.wpo:
            losses = losses * torch.stack([_wpo_weight(policy, pairs, i) for i in step])
        loss = (weights * losses).sum() / weights.sum()
        loss.backward()
        momentum = next((term.settings.beta_momentum for term in terms if term.name == "beta_dpo"), 0.0)
        running = formulas.after(x, momentum)
        torch.nn.utils.clip_grad_norm_(learned, max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def _two_sides(model, pairs, i) -> list[torch.Tensor]:
    """The logps of each token of the chosen and of the rejected answer of pair i."""
    prompt, chosen, rejected = pairs.pair(i)
    return [token_logps(model, prompt, chosen), token_logps(model, prompt, rejected)]


def _pairs_of(sides, lengths, ld_alpha) -> torch.Tensor:
    """The logps of the pairs' answers, [B, 2]; the tokens beyond the shorter one's length count ld_alpha (LD-DPO)."""
    sums = []
    for n, side in enumerate(sides):
        shared = int(lengths[n // 2].min())
        sums.append(side[:shared].sum() + (1.0 if ld_alpha is None else ld_alpha) * side[shared:].sum())
    return torch.stack(sums).view(-1, 2)


@torch.no_grad()
def _wpo_weight(model, pairs, i) -> torch.Tensor:
    """WPO's weight of a pair: for each answer, exp of the mean of log p(token) - log sum p^2 over its tokens."""
    prompt, *answers = pairs.pair(i)
    weight = torch.ones(())
    for answer in answers:
        ids = torch.tensor([[*map(int, prompt), *map(int, answer)]])
        rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        picked = rows.gather(1, torch.tensor([int(t) for t in answer])[:, None])[:, 0]
        weight = weight * (picked - (2 * rows).logsumexp(-1)).mean().exp()
    return weight
