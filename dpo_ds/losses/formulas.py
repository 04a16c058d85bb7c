"""The losses: pure functions from compared pairs to one loss per pair. table.py says where each is from.

Every function takes `x`, the pairs, and `s`, the loss's settings, and returns [B]. Names: w and l stand for the chosen
(winning) and the rejected (losing) answer; a reward is beta * log(policy / reference). What reads the whole step says
so in the table and gets all its pairs in `x`; means over the step carry no gradient, as in the papers.
"""

import math

import torch
from torch.nn.functional import logsigmoid

from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.table import Settings

LEAST_BETA = 1e-3  # of beta_dpo
MOST_EXPONENT = 700  # exp of it fits into float64


def sigmoid(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (w - l)) of the log-ratios w, l. With label_smoothing e, the label is wrong with that
    probability: -(1 - e) log sigmoid(h) - e log sigmoid(-h)."""
    return _smoothed(s.beta * _margin(_scores(x.log_ratios, s)), s.label_smoothing)


def hinge(x: Compared, s: Settings) -> torch.Tensor:
    """max(0, 1 - beta * (w - l))."""
    return torch.relu(1 - s.beta * _margin(_scores(x.log_ratios, s)))


def ipo(x: Compared, s: Settings) -> torch.Tensor:
    """(w / |w| - l / |l| - 1 / (2 beta))^2: the log-ratios are divided by the answers' lengths."""
    return (_margin(_scores(x.log_ratios, s) / x.lengths) - 1 / (2 * s.beta)) ** 2


def exo_pair(x: Compared, s: Settings) -> torch.Tensor:
    """KL(p || q) of p = sigmoid(±h), the policy's preference, from q = (1 - e, e), the smoothed label."""
    h = s.beta * _margin(_scores(x.log_ratios, s))
    right = h.sigmoid() * (logsigmoid(h) - math.log1p(-s.label_smoothing))
    return right + (-h).sigmoid() * (logsigmoid(-h) - math.log(s.label_smoothing))


def nca_pair(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)."""
    chosen, rejected = (s.beta * x.log_ratios).unbind(1)
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


def robust(x: Compared, s: Settings) -> torch.Tensor:
    """DPO's loss without the bias of labels that are wrong with probability e:
    (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)."""
    h, e = s.beta * _margin(_scores(x.log_ratios, s)), s.label_smoothing
    return (e * logsigmoid(-h) - (1 - e) * logsigmoid(h)) / (1 - 2 * e)


def bco_pair(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(r_w - d) - log sigmoid(-(r_l - d)); d is the mean reward of all answers so far, this step's too."""
    now = after(x)
    shift = s.beta * now.log_ratios / now.pairs
    chosen, rejected = (s.beta * x.log_ratios - shift).unbind(1)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(x: Compared, s: Settings) -> torch.Tensor:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 of the log-ratios."""
    chosen, rejected = x.log_ratios.unbind(1)
    return (chosen - 0.5 / s.beta) ** 2 + (rejected + 0.5 / s.beta) ** 2


def aot(x: Compared, s: Settings) -> torch.Tensor:
    """The policy's margins against the reference's, both sorted over the step; then as DPO. [B] in the sorted order."""
    policy, reference = _margin(x.policy).sort().values, _margin(x.reference).sort().values
    return _smoothed(s.beta * (policy - reference), s.label_smoothing)


def aot_unpaired(x: Compared, s: Settings) -> torch.Tensor:
    """The chosen log-ratios against the rejected ones, each sorted over the step; then as DPO. [B] in that order."""
    chosen, rejected = x.log_ratios.sort(dim=0).values.unbind(1)
    return _smoothed(s.beta * (chosen - rejected), s.label_smoothing)


def apo_zero(x: Compared, s: Settings) -> torch.Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l)."""
    chosen, rejected = (s.beta * x.log_ratios).sigmoid().unbind(1)
    return 1 - chosen + rejected


def apo_down(x: Compared, s: Settings) -> torch.Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l)."""
    rewards = s.beta * x.log_ratios
    return rewards[:, 0].sigmoid() + 1 - _margin(rewards).sigmoid()


def discopop(x: Compared, s: Settings) -> torch.Tensor:
    """(1 - m) * -log sigmoid(h) + m * exp(-h), with m = sigmoid(h / tau)."""
    h = s.beta * _margin(_scores(x.log_ratios, s))
    mix = (h / s.discopop_tau).sigmoid()
    # Where h is far below 0, mix is 0 and exp(-h) may be infinite: their product is exp(-h + log mix).
    return -logsigmoid(h) * (1 - mix) + torch.exp(logsigmoid(h / s.discopop_tau) - h)


def sigmoid_norm(x: Compared, s: Settings) -> torch.Tensor:
    """DPO's loss of log-ratios that are divided by the answers' lengths."""
    return _smoothed(s.beta * _margin(_scores(x.log_ratios, s) / x.lengths), s.label_smoothing)


def sft(x: Compared, s: Settings) -> torch.Tensor:
    """-log policy(w) / the mean length. Its mean over the step is the mean over the step's chosen tokens."""
    return -x.policy[:, 0] / x.mean_length


def simpo(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (log policy(w) / |w| - log policy(l) / |l|) - gamma)."""
    return _smoothed(s.beta * _margin(x.means) - s.simpo_gamma, s.label_smoothing)


def orpo(x: Compared, s: Settings) -> torch.Tensor:
    """sft - lambda * log sigmoid(log odds(w) - log odds(l)); odds(p) = p / (1 - p),
    and log p is the mean over the tokens."""
    odds = x.means - torch.log(-torch.expm1(x.means.clamp(max=-torch.finfo(x.means.dtype).tiny)))
    return sft(x, s) - s.orpo_lambda * logsigmoid(_margin(odds))


def cpo(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (log policy(w) - log policy(l))) + alpha * sft."""
    return _smoothed(s.beta * _margin(x.policy), s.label_smoothing) + s.cpo_alpha * sft(x, s)


def dpop(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (w - l - lambda * max(0, -w))): a chosen answer must not fall below the reference."""
    penalty = s.dpop_lambda * torch.relu(-x.log_ratios[:, 0])
    return -logsigmoid(s.beta * (_margin(x.log_ratios) - penalty))


def rdpo(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (w - l) + alpha * (|w| - |l|)): being longer explains a part of the preference."""
    longer = _margin(x.lengths).to(x.policy.dtype)
    return _smoothed(s.beta * _margin(x.log_ratios) + s.length_alpha * longer, s.label_smoothing)


def beta_dpo(x: Compared, s: Settings) -> torch.Tensor:
    """DPO's loss with beta * (1 + alpha * (the step's mean of w - l, less its moving average)), at least LEAST_BETA.
    The moving average has seen this step too. The paper's alpha is for log-ratios, not for rewards: so is its code."""
    gap = x.mean(_margin(x.log_ratios)).detach()
    beta = s.beta * (1 + s.beta_alpha * (gap - after(x, s.beta_momentum).gap))
    return -logsigmoid(beta.clamp(min=LEAST_BETA) * _margin(x.log_ratios))


def kto_pair(x: Compared, s: Settings) -> torch.Tensor:
    """1/2 (d * (1 - sigmoid(r_w - z_l)) + u * (1 - sigmoid(z_w - r_l))). z is the other side's mean reward over the
    step, 0 at least: an estimate of KL(policy || reference)."""
    rewards = s.beta * x.log_ratios
    chosen_kl, rejected_kl = x.mean(rewards).detach().clamp(min=0)
    desirable = 1 - (rewards[:, 0] - rejected_kl).sigmoid()
    undesirable = 1 - (chosen_kl - rewards[:, 1]).sigmoid()
    return (s.desirable_weight * desirable + s.undesirable_weight * undesirable) / 2


def odpo(x: Compared, s: Settings) -> torch.Tensor:
    """-log sigmoid(beta * (w - l) - alpha * log margin): the reward's margin should be at least the data's."""
    return -logsigmoid(s.beta * _margin(x.log_ratios) - s.offset_alpha * x.margins.log())


def plackett_luce(x: Compared, s: Settings) -> torch.Tensor:
    """log(1 + sum of exp(r - r_w) over the answers below w), r being their rewards. Summed over a ranking, this is its
    negative log-likelihood. With two answers it is DPO's loss."""
    rewards = s.beta * x.log_ratios
    chosen, rejected = x.answers.unbind(1)
    place = torch.arange(len(chosen), device=chosen.device)
    ranking = x.rankings[:, None] == x.rankings
    same = ranking & (chosen[:, None] == chosen)  # where answers are tied, the one above is chosen in several pairs
    first = same.int().argmax(1)
    # An answer that is rejected in several of the ranking's pairs counts once: in the last of them.
    again = ranking & (rejected[:, None] == rejected) & (place[:, None] < place)
    below = ranking & (place >= first[:, None]) & ~again.any(1)
    behind = torch.where(below, rewards[:, 1] - rewards[:, :1], -torch.inf)
    return torch.cat([torch.zeros_like(rewards[:, :1]), behind], dim=1).logsumexp(1) / same.sum(1)


def after(x: Compared, momentum: float = 0.0) -> Running:
    """What is remembered after the step `x`."""
    ratios = x.log_ratios.detach().double()
    weights = x.weights.double()
    total = float(weights.sum())
    gap = float((weights * _margin(ratios)).sum()) / total
    return Running(
        x.running.pairs + total,
        x.running.log_ratios + float((weights * ratios.mean(1)).sum()),
        momentum * x.running.gap + (1 - momentum) * gap,
    )


def _margin(values: torch.Tensor) -> torch.Tensor:
    return values[:, 0] - values[:, 1]


def _smoothed(h: torch.Tensor, e: float) -> torch.Tensor:
    return -logsigmoid(h) if e == 0 else -(1 - e) * logsigmoid(h) - e * logsigmoid(-h)


def _scores(log_ratios: torch.Tensor, s: Settings) -> torch.Tensor:
    """f'(policy / reference), up to a constant, for the f-divergence that holds the policy to the reference: Wang et
    al. 2023 (arXiv 2309.16240). Reverse KL gives the log-ratios themselves, which is DPO. The others are float64: below
    -88, exp of a log-ratio does not fit into fp32, and the difference of two such scores would not be a number."""
    if s.f_divergence == "reverse_kl" or (s.f_divergence == "alpha" and s.f_alpha == 0):
        return log_ratios
    wide = log_ratios.double()
    if s.f_divergence == "js":
        return math.log(2) + logsigmoid(wide)
    alpha = 1.0 if s.f_divergence == "forward_kl" else s.f_alpha
    return -torch.expm1((-alpha * wide).clamp(max=MOST_EXPONENT)) / alpha
