"""Each loss against numbers written out by hand, its gradient's signs, its limits, and numbers at the edge of fp32."""

import math
import random
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from loss_inputs import compared, judged, of_log_ratios, some_pairs

from dpo_ds.losses import formulas
from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.lengths import length_desensitised
from dpo_ds.losses.table import LOSSES
from dpo_ds.scoring.packed import shared_tokens

LN2 = math.log(2)


def log_sigmoid(z: float) -> float:
    return -math.log(1 + math.exp(-z))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# ------------------------------------------------------------------------------------------------------ numbers by hand

# Two pairs. Their log-ratios w, l are 1 and -1.5, and -4 and 1.5; so w - l is 2.5 and -5.5. Sorted, the policy's
# margins 3.5 and 1 meet the reference's 1 and 6.5 in another order. The weights' sum is 4, and the mean length 51/4.
HAND: dict = {
    "policy": [[-12.0, -15.5], [-24.0, -25.0]],
    "reference": [[-13.0, -14.0], [-20.0, -26.5]],
    "lengths": [[6, 9], [15, 7]],
    "margins": [2.0, 0.5],
    "weights": [1.0, 3.0],
    "running": Running(pairs=10.0, log_ratios=-5.0, gap=-5.0),
}


def js(w: float) -> float:
    """f' of the Jensen-Shannon divergence: log(2 u / (1 + u)) at u = exp(w)."""
    return math.log(2 * math.exp(w) / (1 + math.exp(w)))


def kl_from_label(h: float, e: float) -> float:
    """KL of (sigmoid(h), sigmoid(-h)) from (1 - e, e)."""
    p = sigmoid(h)
    return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)


def log_odds(mean: float) -> float:
    p = math.exp(mean)
    return math.log(p / (1 - p))


# (loss, options, the losses of the two pairs)
CASES: list[tuple[str, dict, tuple[float, float]]] = [
    ("sigmoid", {}, (-log_sigmoid(0.25), -log_sigmoid(-0.55))),
    ("sigmoid", {"beta": 0.5}, (-log_sigmoid(1.25), -log_sigmoid(-2.75))),
    (
        "sigmoid",
        {"label_smoothing": 0.2},
        (
            -0.8 * log_sigmoid(0.25) - 0.2 * log_sigmoid(-0.25),
            -0.8 * log_sigmoid(-0.55) - 0.2 * log_sigmoid(0.55),
        ),
    ),
    (
        "sigmoid",
        {"f_divergence": "js"},
        (-log_sigmoid(0.1 * (js(1.0) - js(-1.5))), -log_sigmoid(0.1 * (js(-4.0) - js(1.5)))),
    ),
    (  # f'(u) = -1 / u
        "sigmoid",
        {"f_divergence": "forward_kl"},
        (
            -log_sigmoid(0.1 * (-math.exp(-1.0) + math.exp(1.5))),
            -log_sigmoid(0.1 * (-math.exp(4.0) + math.exp(-1.5))),
        ),
    ),
    (  # f'(u) = (1 - u^-a) / a
        "sigmoid",
        {"f_divergence": "alpha", "f_alpha": 0.25},
        (
            -log_sigmoid(0.1 * (-math.exp(-0.25) + math.exp(0.375)) / 0.25),
            -log_sigmoid(0.1 * (-math.exp(1.0) + math.exp(-0.375)) / 0.25),
        ),
    ),
    ("hinge", {}, (0.75, 1.55)),
    ("hinge", {"beta": 0.5}, (0.0, 3.75)),
    ("ipo", {}, ((1 / 6 + 1.5 / 9 - 5) ** 2, (-4 / 15 - 1.5 / 7 - 5) ** 2)),
    ("exo_pair", {}, (kl_from_label(0.25, 0.001), kl_from_label(-0.55, 0.001))),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.1}, (kl_from_label(2.5, 0.1), kl_from_label(-5.5, 0.1))),
    (
        "nca_pair",
        {},
        (
            -log_sigmoid(0.01) - 0.5 * log_sigmoid(-0.01) - 0.5 * log_sigmoid(0.015),
            -log_sigmoid(-0.04) - 0.5 * log_sigmoid(0.04) - 0.5 * log_sigmoid(-0.015),
        ),
    ),
    (
        "robust",
        {},
        (
            (-0.9 * log_sigmoid(0.25) + 0.1 * log_sigmoid(-0.25)) / 0.8,
            (-0.9 * log_sigmoid(-0.55) + 0.1 * log_sigmoid(0.55)) / 0.8,
        ),
    ),
    (  # the sum of weights is 10 + 4; that of mean log-ratios -5 + 1 * -0.25 + 3 * -1.25 = -9
        "bco_pair",
        {},
        (
            -log_sigmoid(0.01 * (1.0 + 9 / 14)) - log_sigmoid(-0.01 * (-1.5 + 9 / 14)),
            -log_sigmoid(0.01 * (-4.0 + 9 / 14)) - log_sigmoid(-0.01 * (1.5 + 9 / 14)),
        ),
    ),
    ("sppo_hard", {}, (499.0**2 + 498.5**2, 504.0**2 + 501.5**2)),
    ("sppo_hard", {"beta": 0.1}, (4.0**2 + 3.5**2, 9.0**2 + 6.5**2)),
    ("aot", {}, (-log_sigmoid(0.1 * (1.0 - 1.0)), -log_sigmoid(0.1 * (3.5 - 6.5)))),
    ("aot_unpaired", {}, (-log_sigmoid(0.1 * (-4.0 + 1.5)), -log_sigmoid(0.1 * (1.0 - 1.5)))),
    (
        "aot_unpaired",
        {"label_smoothing": 0.3},
        (
            -0.7 * log_sigmoid(-0.25) - 0.3 * log_sigmoid(0.25),
            -0.7 * log_sigmoid(-0.05) - 0.3 * log_sigmoid(0.05),
        ),
    ),
    ("apo_zero", {}, (1 - sigmoid(0.1) + sigmoid(-0.15), 1 - sigmoid(-0.4) + sigmoid(0.15))),
    ("apo_down", {}, (sigmoid(0.1) + 1 - sigmoid(0.25), sigmoid(-0.4) + 1 - sigmoid(-0.55))),
    (
        "discopop",
        {},
        (
            -(1 - sigmoid(2.5)) * log_sigmoid(0.125) + sigmoid(2.5) * math.exp(-0.125),
            -(1 - sigmoid(-5.5)) * log_sigmoid(-0.275) + sigmoid(-5.5) * math.exp(0.275),
        ),
    ),
    ("sigmoid_norm", {}, (-log_sigmoid(5 * (1 / 6 + 1.5 / 9)), -log_sigmoid(5 * (-4 / 15 - 1.5 / 7)))),
    ("sft", {}, (12 / 12.75, 24 / 12.75)),
    (
        "simpo",
        {},
        (-log_sigmoid(2 * (-12 / 6 + 15.5 / 9) - 1), -log_sigmoid(2 * (-24 / 15 + 25 / 7) - 1)),
    ),
    (
        "orpo",
        {},
        (
            12 / 12.75 - 0.1 * log_sigmoid(log_odds(-12 / 6) - log_odds(-15.5 / 9)),
            24 / 12.75 - 0.1 * log_sigmoid(log_odds(-24 / 15) - log_odds(-25 / 7)),
        ),
    ),
    ("cpo", {}, (-log_sigmoid(0.35) + 12 / 12.75, -log_sigmoid(0.1) + 24 / 12.75)),
    ("cpo", {"cpo_alpha": 0.5, "beta": 0.2}, (-log_sigmoid(0.7) + 6 / 12.75, -log_sigmoid(0.2) + 12 / 12.75)),
    ("dpop", {"dpop_lambda": 5.0}, (-log_sigmoid(0.25), -log_sigmoid(0.1 * (-5.5 - 5 * 4)))),
    ("rdpo", {}, (-log_sigmoid(0.25 - 0.03), -log_sigmoid(-0.55 + 0.08))),
    # The step's mean of w - l is (2.5 - 3 * 5.5) / 4 = -3.5; its moving average 0.9 * -5 - 0.1 * 3.5 = -4.85.
    ("beta_dpo", {}, (-log_sigmoid(0.181 * 2.5), -log_sigmoid(0.181 * -5.5))),
    # With momentum 0 the moving average is the step's own.
    ("beta_dpo", {"beta_momentum": 0.0}, (-log_sigmoid(0.25), -log_sigmoid(-0.55))),
    # 1 + 10 * (-3.5 + 3.65): a moving average of 0.1 * -5 - 0.9 * 3.5
    ("beta_dpo", {"beta_momentum": 0.1, "beta_alpha": 10.0}, (-log_sigmoid(0.625), -log_sigmoid(-1.375))),
    # The chosen answers' mean reward is (0.1 - 1.2) / 4 < 0, the rejected ones' (-0.15 + 0.45) / 4 = 0.075.
    (
        "kto_pair",
        {},
        (
            (1 - sigmoid(0.1 - 0.075) + 1 - sigmoid(0.15)) / 2,
            (1 - sigmoid(-0.4 - 0.075) + 1 - sigmoid(-0.15)) / 2,
        ),
    ),
    (
        "kto_pair",
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        (
            0.75 * (1 - sigmoid(0.025)) + 0.25 * (1 - sigmoid(0.15)),
            0.75 * (1 - sigmoid(-0.475)) + 0.25 * (1 - sigmoid(-0.15)),
        ),
    ),
    ("odpo", {}, (-log_sigmoid(0.25 - math.log(2.0)), -log_sigmoid(-0.55 - math.log(0.5)))),
    ("odpo", {"offset_alpha": 0.5}, (-log_sigmoid(0.25 - LN2 / 2), -log_sigmoid(-0.55 + LN2 / 2))),
    ("plackett_luce", {}, (-log_sigmoid(0.25), -log_sigmoid(-0.55))),
]


def test_every_loss_has_a_case():
    assert {name for name, _, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "options", "expected"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_numbers_by_hand(name, options, expected, dtype):
    found = judged(name, compared(**HAND, dtype=dtype), **options)
    assert found.losses.dtype == found.slopes.dtype == dtype
    rtol = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol)


def test_the_least_beta_of_beta_dpo():
    """0.1 * (1 + 0.6 * (-3.5 - (0.9 * 10 - 0.35))) is far below 0."""
    x = compared(**{**HAND, "running": Running(gap=10.0)})
    expected = torch.tensor([-log_sigmoid(0.001 * 2.5), -log_sigmoid(0.001 * -5.5)], dtype=torch.float64)
    torch.testing.assert_close(judged("beta_dpo", x).losses, expected)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.reference])
def test_a_loss_without_a_reference_reads_none(name):
    x = compared(**HAND)
    assert torch.equal(judged(name, x).losses, judged(name, replace(x, reference=7 * x.reference - 3)).losses)


# ------------------------------------------------------------------------------------------------------------ gradients

# Here a chosen answer's loss may rise with its log-probability, as the tests below say; else it never does, and a
# rejected answer's never falls.
TURNING = {"ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_down", "discopop"}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - TURNING))
def test_chosen_answers_are_raised_and_rejected_ones_lowered(name):
    for seed in range(8):
        slopes = judged(name, some_pairs(seed, count=100, spread=1 + 3 * seed)).slopes
        assert (slopes[:, 0] <= 0).all() and (slopes[:, 1] >= 0).all(), seed


def slopes_at(name: str, log_ratios, **options) -> torch.Tensor:
    return judged(name, of_log_ratios(log_ratios), **options).slopes


def test_ipo_draws_the_margin_per_token_to_its_minimum():
    """1 / (2 * 0.1) = 5 a token, 50 for ten tokens."""
    at = [[49.0, 0.0], [50.0, 0.0], [51.0, 0.0]]
    slopes = slopes_at("ipo", at)
    assert (slopes[:, 0].sign() == torch.tensor([-1, 0, 1])).all() and torch.equal(slopes[:, 0], -slopes[:, 1])
    assert judged("ipo", of_log_ratios(at)).losses.tolist()[1] == 0.0


def test_exo_draws_the_margin_to_the_smoothed_label():
    """Its minimum, 0, is where sigmoid(h) = 1 - e."""
    best = math.log(0.9 / 0.1)
    at = [[best - 0.1, 0.0], [best, 0.0], [best + 0.1, 0.0]]
    slopes = slopes_at("exo_pair", at, beta=1.0, label_smoothing=0.1)
    assert slopes[0, 0] < 0 < slopes[2, 0] and abs(slopes[1, 0]) < 1e-12 and torch.equal(slopes[:, 0], -slopes[:, 1])
    assert judged("exo_pair", of_log_ratios(at), beta=1.0, label_smoothing=0.1).losses[1].abs() < 1e-12


def test_nca_raises_the_chosen_answer_until_its_reward_is_ln_2():
    """-log sigmoid(r) - 1/2 log sigmoid(-r) is least where sigmoid(r) = 2/3. The rejected answer is always lowered."""
    slopes = slopes_at("nca_pair", [[LN2 - 0.1, 3.0], [LN2, 0.0], [LN2 + 0.1, -9.0]], beta=1.0)
    assert slopes[0, 0] < 0 < slopes[2, 0] and abs(slopes[1, 0]) < 1e-12 and (slopes[:, 1] > 0).all()


def test_sppo_draws_each_answer_to_its_own_target():
    slopes = slopes_at("sppo_hard", [[4.0, -4.0], [5.0, -5.0], [6.0, -6.0]], beta=0.1)
    assert slopes.tolist() == [[-2.0, 2.0], [0.0, 0.0], [2.0, -2.0]]


def test_apo_down_lowers_both_answers_and_the_rejected_one_more():
    """Where the rejected answer has fallen already, nothing holds the chosen one."""
    slopes = slopes_at("apo_down", [[0.0, 0.0], [0.0, -3.0], [0.5, -2.0]], beta=1.0)
    assert abs(slopes[0, 0]) < 1e-12 and (slopes[1:, 0] > 0).all() and (slopes[:, 1] > 0).all()
    slopes = slopes_at("apo_down", [[-5.0, -4.0]], beta=1.0)
    assert slopes[0, 0] < 0, "a chosen answer that has fallen below the rejected one is raised"


def test_discopop_is_monotone_away_from_0_only():
    """Near 0 it climbs from the logistic loss to the exponential one, which is larger there: it has a local minimum."""
    slopes = slopes_at("discopop", [[-1.0, 0.0], [-0.02, 0.0], [0.02, 0.0], [1.0, 0.0]], beta=1.0)
    assert (slopes[:, 0].sign() == torch.tensor([-1, 1, 1, -1])).all() and torch.equal(slopes[:, 0], -slopes[:, 1])
    values = judged("discopop", of_log_ratios([[h / 10, 0.0] for h in range(-100, 101)]), beta=1.0).losses
    assert values[0] == values.max() and values[-1] == values.min()


def frozen(name: str, x: Compared, beta: float):
    """The loss of new logps with what carries no gradient as it is in `x`."""
    if name == "bco_pair":
        now = formulas.after(x)
        shift = beta * now.log_ratios / now.pairs
        return lambda y: -_ls(beta * _w(y) - shift) - _ls(shift - beta * _l(y))
    if name == "kto_pair":
        zw, zl = (x.weights[:, None] * beta * x.log_ratios).sum(0).div(x.weights.sum()).clamp(min=0)
        return lambda y: 1 - (torch.sigmoid(beta * _w(y) - zl) + torch.sigmoid(zw - beta * _l(y))) / 2
    if name == "beta_dpo":
        gap = float((x.weights * (_w(x) - _l(x))).sum() / x.weights.sum())
        found = beta * (1 + 0.6 * 0.9 * (gap - x.running.gap))
        return lambda y: -_ls(max(found, 1e-3) * (_w(y) - _l(y)))
    return lambda y: judged(name, y).losses


def _ls(z):
    return torch.log(torch.sigmoid(z))


def _w(x):
    return x.log_ratios[:, 0]


def _l(x):
    return x.log_ratios[:, 1]


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_finite_differences(name):
    step = 1e-5
    for seed in range(3):
        x = some_pairs(seed, count=3)
        found = judged(name, x)
        value = frozen(name, x, LOSSES[name].defaults.get("beta", 0.1))
        torch.testing.assert_close(value(x), found.losses, rtol=1e-9, atol=1e-9)
        scale = max(1.0, float(found.losses.abs().max()))
        for place in range(6):
            moved = torch.zeros(6, dtype=torch.float64)
            moved[place] = step
            ends = [value(replace(x, policy=x.policy + sign * moved.view(3, 2))) for sign in (1, -1)]
            slope = (x.weights * (ends[0] - ends[1])).sum() / (2 * step)
            assert abs(float(slope - found.slopes.view(-1)[place])) < 1e-6 * scale, (seed, place)


# --------------------------------------------------------------------------------------------------------------- limits

# The loss where the policy equals the reference, for pairs like those of HAND. `None`: it reads the policy alone.
AT_REFERENCE = {
    "sigmoid": (LN2, LN2),
    "hinge": (1.0, 1.0),
    "ipo": (25.0, 25.0),
    "exo_pair": (kl_from_label(0.0, 0.001),) * 2,
    "nca_pair": (2 * LN2, 2 * LN2),
    "robust": (LN2, LN2),
    "bco_pair": (2 * LN2, 2 * LN2),
    "sppo_hard": (500000.0, 500000.0),
    "aot": (LN2, LN2),
    "aot_unpaired": (LN2, LN2),
    "apo_zero": (1.0, 1.0),
    "apo_down": (1.0, 1.0),
    "discopop": ((LN2 + 1) / 2,) * 2,
    "sigmoid_norm": (LN2, LN2),
    "sft": None,
    "simpo": None,
    "orpo": None,
    "cpo": None,
    "dpop": (LN2, LN2),
    "rdpo": (-log_sigmoid(-0.03), -log_sigmoid(0.08)),
    "beta_dpo": (LN2, LN2),
    "kto_pair": (0.5, 0.5),
    "odpo": (-log_sigmoid(-LN2), -log_sigmoid(LN2)),
    "plackett_luce": (LN2, LN2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_equal_to_the_reference(name):
    x = compared(**{**HAND, "policy": HAND["reference"], "running": Running()})
    found = judged(name, x)
    assert found.losses.isfinite().all() and found.slopes.isfinite().all()
    if AT_REFERENCE[name] is not None:
        assert found.losses.tolist() == pytest.approx(AT_REFERENCE[name], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].beta and LOSSES[name].reference])
def test_beta_towards_0(name):
    """Every reward goes to 0, as where the policy equals the reference. Losses with a target in log-ratios need ever
    more. beta_dpo has a least beta."""
    x = compared(**{**HAND, "running": Running()})
    found = judged(name, x, beta=1e-9)
    if name in ("ipo", "sppo_hard"):
        assert (found.losses > 1e16).all()
        return
    near = 1e-2 if name == "beta_dpo" else 1e-6
    assert found.losses.tolist() == pytest.approx(AT_REFERENCE[name], abs=near)
    assert found.slopes.abs().max() < near


def test_beta_towards_0_without_a_reference():
    x = compared(**HAND)
    assert judged("simpo", x, beta=1e-9, simpo_gamma=0.0).losses.tolist() == pytest.approx([LN2, LN2])
    expected = LN2 + judged("sft", x).losses
    torch.testing.assert_close(judged("cpo", x, beta=1e-9).losses, expected, rtol=1e-7, atol=0)


# Losses of the difference between the two answers alone.
OF_MARGINS = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "aot", "aot_unpaired", "discopop", "sigmoid_norm")
OF_MARGINS += ("simpo", "rdpo", "beta_dpo", "odpo", "plackett_luce")


@pytest.mark.parametrize("name", OF_MARGINS)
def test_equal_answers_teach_nothing(name):
    """What raises the one lowers the other, which is the same: the gradient of their text cancels."""
    for seed in range(5):
        x = some_pairs(seed, count=1)
        same = {field: getattr(x, field)[:, :1].expand(-1, 2) for field in ("policy", "reference", "lengths")}
        found = judged(name, replace(x, **same))
        torch.testing.assert_close(found.slopes[:, 0], -found.slopes[:, 1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"f_divergence": "js"}),
        ("sigmoid_norm", {}),
        ("sigmoid_norm", {"f_divergence": "forward_kl"}),
        ("exo_pair", {}),
        ("rdpo", {}),
        ("aot", {}),
        ("aot_unpaired", {}),
        ("cpo", {"cpo_alpha": 0.0}),
        ("simpo", {"simpo_gamma": 0.0}),
    ],
)
def test_smoothing_of_a_half_knows_no_side(name, options):
    for seed in range(5):
        x = some_pairs(seed, count=1 if LOSSES[name].scope == "step" else 50, spread=2.0)
        turned = replace(x, **{field: getattr(x, field).flip(1) for field in ("policy", "reference", "lengths")})
        one, other = (judged(name, side, label_smoothing=0.5, **options) for side in (x, turned))
        torch.testing.assert_close(one.losses, other.losses)
        torch.testing.assert_close(one.slopes, other.slopes.flip(1))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "f_divergence" in loss.options])
def test_the_alpha_divergence_is_the_reverse_kl_at_0_and_the_forward_kl_at_1(name):
    for seed in range(2):
        x = some_pairs(seed, count=50, spread=2.0)
        plain, forward = judged(name, x), judged(name, x, f_divergence="forward_kl")
        for alpha, expected in ((0.0, plain), (1e-9, plain), (1.0, forward)):
            found = judged(name, x, f_divergence="alpha", f_alpha=alpha)
            torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found.slopes, expected.slopes, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(plain.losses, forward.losses)


@pytest.mark.parametrize("divergence", ["js", "forward_kl", "alpha"])
def test_divergences_agree_where_the_policy_is_near_the_reference(divergence):
    """f''(1) is 1 for all of them but Jensen-Shannon's, where log(2u / (1 + u)) has slope 1/2."""
    near = of_log_ratios([[1e-4, -2e-4]])
    plain, found = (judged("sigmoid", near, **options).slopes for options in ({}, {"f_divergence": divergence}))
    factor = 0.5 if divergence == "js" else 1.0
    torch.testing.assert_close(found, factor * plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("dpop", {"dpop_lambda": 0.0}, {}),
        ("rdpo", {"length_alpha": 0.0}, {}),
        ("odpo", {}, {"margins": [1.0] * 6}),
        ("odpo", {"offset_alpha": 0.0}, {}),
        ("beta_dpo", {"beta_alpha": 0.0}, {}),
        ("plackett_luce", {}, {}),
        ("sigmoid_norm", {"beta": 1.0}, {"lengths": [[10, 10]] * 6}),
        ("aot", {}, {"count": 1}),
        ("aot_unpaired", {}, {"count": 1}),
        ("robust", {"label_smoothing": 0.0}, {}),
    ],
)
def test_losses_that_come_to_dpos(name, options, facts):
    for seed in range(5):
        x = some_pairs(seed, **facts)
        found, expected = judged(name, x, **options), judged("sigmoid", x)
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(found.slopes, expected.slopes)


def test_simpo_without_gamma_is_sigmoid_norm_without_a_reference():
    for seed in range(5):
        x = some_pairs(seed)
        x = replace(x, reference=torch.zeros_like(x.reference))
        found, expected = judged("simpo", x, simpo_gamma=0.0, beta=3.0), judged("sigmoid_norm", x, beta=3.0)
        torch.testing.assert_close(found.losses, expected.losses)


def test_dpop_leaves_a_chosen_answer_alone_that_has_not_fallen():
    x = of_log_ratios([[0.5, 2.0], [-0.5, -2.0]])
    found, plain = judged("dpop", x), judged("sigmoid", x)
    assert found.losses[0] == plain.losses[0] and found.losses[1] > plain.losses[1]
    assert found.slopes[1, 0] < 50 * plain.slopes[1, 0], "it is raised fifty times as much"


def test_bco_takes_away_what_all_answers_have_in_common():
    """A new run: the shift is the step's own mean reward, so a constant added to all log-ratios changes nothing."""
    x = some_pairs(3, running=Running())
    moved = replace(x, policy=x.policy - 2.5)
    torch.testing.assert_close(judged("bco_pair", x).losses, judged("bco_pair", moved).losses)
    late = replace(x, running=Running(pairs=1e9, log_ratios=2.5e9))
    expected = judged("bco_pair", replace(x, policy=x.policy - 2.5, running=Running(pairs=1e9, log_ratios=0.0)))
    torch.testing.assert_close(judged("bco_pair", late).losses, expected.losses)


def test_ktos_reference_point_is_the_other_sides_mean_and_never_below_0():
    """The second pair moves the first one's reference points, but only above 0."""
    below = [judged("kto_pair", of_log_ratios([[1.0, -1.0], [-9.0, other]])).losses[0] for other in (-3.0, -5.0, -50.0)]
    assert below[0] == below[1] == below[2]
    above = [judged("kto_pair", of_log_ratios([[1.0, -1.0], [-9.0, other]])).losses[0] for other in (5.0, 7.0, 9.0)]
    assert below[0] < above[0] < above[1] < above[2], "it rises with the rejected answers' mean"
    weighted = judged("kto_pair", of_log_ratios([[1.0, -1.0], [-9.0, 5.0]], weights=[3.0, 1.0])).losses[0]
    assert below[0] < weighted < above[0], "a weighted mean: (3 * -1 + 5) / 4 is below (-1 + 5) / 2"


def test_the_mean_of_sft_over_a_step_is_the_mean_over_its_chosen_tokens():
    x = some_pairs(4, weights=[1.0] * 6)
    mean = judged("sft", x).losses.mean()
    torch.testing.assert_close(mean, -x.policy[:, 0].sum() / x.lengths[:, 0].sum())


# -------------------------------------------------------------------------------------------------------- Plackett-Luce


def adjacent(levels: list[int]) -> list[tuple[int, int]]:
    """The pairs of --pairs adjacent, the best first. A higher level is better, and answers of one level are tied."""
    order = sorted(range(len(levels)), key=lambda n: -levels[n])
    steps = sorted(set(levels), reverse=True)
    below = dict(pairwise(steps))
    return [(a, b) for a in order for b in order if below.get(levels[a]) == levels[b]]


def product_of_choices(rewards: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """-log of the probability that each answer wins against all that are below it."""
    total = rewards.new_zeros(())
    for a, level in enumerate(levels):
        others = [b for b, other in enumerate(levels) if other < level]
        if others:
            total = total - torch.log_softmax(rewards[[a, *others]], 0)[0]
    return total


RANKINGS = {
    "two": [[2, 1]],
    "four": [[4, 3, 2, 1]],
    "in another order": [[1, 3, 2, 4]],
    "tied at the top": [[3, 3, 1]],
    "tied at the bottom": [[3, 1, 1]],
    "tied in the middle": [[5, 3, 3, 2, 1]],
    "ties meet": [[3, 3, 2, 2, 2, 1]],
    "several rankings": [[3, 2, 1], [2, 1], [4, 3, 3, 1], [1, 2]],
}


@pytest.mark.parametrize("levels_of", RANKINGS.values(), ids=RANKINGS)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "with an answer in all of them"])
def test_plackett_luce_is_the_product_of_choices(levels_of, shared):
    numbers = random.Random(5)
    answers, pairs, rankings, count = [], [], [], 1
    for ranking, levels in enumerate(levels_of):
        own = [0 if shared and n == 1 else count + n for n in range(len(levels))]
        answers.append(own)
        pairs += [[own[a], own[b]] for a, b in adjacent(levels)]
        rankings += [ranking] * len(adjacent(levels))
        count += len(levels)
    logps = torch.tensor([-numbers.uniform(1, 30) for _ in range(count)], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-numbers.uniform(1, 30) for _ in range(count)], dtype=torch.float64)
    places = torch.tensor(pairs)
    x = compared(logps.detach()[places].tolist(), reference[places].tolist(), answers=pairs, rankings=rankings)
    found = judged("plackett_luce", x, beta=0.3)

    rewards = 0.3 * (logps - reference)
    direct = [product_of_choices(rewards[own], levels) for own, levels in zip(answers, levels_of, strict=True)]
    for ranking, expected in enumerate(direct):
        torch.testing.assert_close(found.losses[torch.tensor(rankings) == ranking].sum(), expected.detach())
    (gradient,) = torch.autograd.grad(sum(direct), logps)
    slopes = torch.zeros(count, dtype=torch.float64).index_add(0, places.view(-1), found.slopes.view(-1))
    torch.testing.assert_close(slopes, gradient)


# --------------------------------------------------------------------------------------------------------------- LD-DPO


def test_ld_dpo_by_hand():
    """Three answers of 3, 5 and 2 tokens. Beyond the shorter answer's length, tokens count alpha."""
    tokens = torch.tensor([-1.0, -2.0, -4.0, -0.5, -0.25, -3.0, -8.0, -16.0, -7.0, -9.0], dtype=torch.float64)
    of_token = torch.tensor([0] * 3 + [1] * 5 + [2] * 2)
    pairs = torch.tensor([[0, 1], [1, 2], [2, 0]])
    shared = torch.from_numpy(shared_tokens(torch.tensor([3, 5, 2]).numpy(), pairs.numpy()))

    def logps(alpha: float) -> list[list[float]]:
        return length_desensitised(tokens, of_token, 3, shared, pairs, alpha).tolist()

    assert logps(1.0) == [[-7.0, -27.75], [-27.75, -16.0], [-16.0, -7.0]], "plain sums"
    assert logps(0.0) == [[-7.0, -3.75], [-0.75, -16.0], [-16.0, -3.0]], "as many tokens as the shorter answer has"
    assert logps(0.25) == [[-7.0, -3.75 - 6], [-0.75 - 6.75, -16.0], [-16.0, -4.0]]


def test_ld_dpos_gradient_reaches_each_token_with_its_weight():
    tokens = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([[0, 1]])
    shared = torch.from_numpy(shared_tokens(torch.tensor([2, 3]).numpy(), pairs.numpy()))
    found = length_desensitised(tokens, torch.tensor([0, 0, 1, 1, 1]), 2, shared, pairs, 0.25)
    (found @ torch.tensor([2.0, 3.0], dtype=torch.float64)).sum().backward()
    assert tokens.grad.tolist() == [2.0, 2.0, 3.0, 3.0, 0.75]


# ------------------------------------------------------------------------------------------------- at the edge of fp32

FAR = list(product((-1000.0, 0.0, 1000.0), repeat=2))


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}], ids=str)
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reference])
def test_log_ratios_of_1000(name, options):
    """fp32 gives finite numbers, and those of fp64."""
    facts = {"lengths": [[100, 300]] * len(FAR)}
    exact, found = (
        judged(name, of_log_ratios(FAR, dtype, **facts), **options) for dtype in (torch.float64, torch.float32)
    )
    assert found.losses.isfinite().all() and found.slopes.isfinite().all()
    torch.testing.assert_close(found.losses.double(), exact.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.slopes.double(), exact.slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.reference])
def test_logps_far_apart_without_a_reference(name):
    far = list(product((-1e5, -1000.0, -1e-3, 0.0), repeat=2))
    found = judged(name, compared(far, dtype=torch.float32, lengths=[[100, 100]] * len(far)))
    assert found.losses.isfinite().all() and found.slopes.isfinite().all()


@pytest.mark.parametrize("far", [100.0, 700.0, 1000.0])
@pytest.mark.parametrize(
    "options", [{"f_divergence": "forward_kl"}, {"f_divergence": "alpha"}, {"f_divergence": "js"}], ids=str
)
def test_divergences_far_below_the_reference(options, far):
    """Both answers may have fallen so far that exp of the log-ratio does not fit into fp32, or into any number. Their
    difference is what counts."""
    x = of_log_ratios([[-far, -far], [far, -far], [0.0, -far], [far, far]], torch.float32)
    found = judged("sigmoid", x, **options)
    assert not found.losses.isnan().any() and not found.slopes.isnan().any()
    assert found.losses[[0, 3]].tolist() == pytest.approx([LN2, LN2])
    if options["f_divergence"] != "js":
        assert (found.losses[[1, 2]] < 1e-6).all() and (found.slopes[[1, 2]] == 0).all()


def test_rewards_that_are_not_known_are_not_hidden():
    """Negative control: a logp that is not a number makes its own pair's loss not a number, and no other one's."""
    x = compared(**{**HAND, "policy": [[math.nan, -15.5], [-24.0, -25.0]]})
    for name, loss in LOSSES.items():
        if loss.scope == "pair":
            assert judged(name, x).losses.isnan().tolist() == [True, False], name
