"""A run's sum of losses: over pieces of a step, over several losses, and what it remembers between steps."""

import math
from dataclasses import fields, replace

import pytest
import torch
from loss_inputs import compared, judged, of_log_ratios, options_of, some_pairs

from dpo_ds.losses.compared import Compared, Running
from dpo_ds.losses.metrics import kl_per_token, names_of, preference_metrics
from dpo_ds.losses.objective import Objective
from dpo_ds.losses.table import LOSSES

BY_SCOPE = {scope: [n for n, loss in LOSSES.items() if loss.scope == scope] for scope in ("pair", "group", "step")}


def piece(x: Compared, places: list[int]) -> Compared:
    """Some of the pairs, as a micro-batch has them: what is known of the whole step stays."""
    of_pairs = {f.name: getattr(x, f.name)[places] for f in fields(x) if isinstance(getattr(x, f.name), torch.Tensor)}
    return replace(x, **of_pairs)


def close(found, expected) -> None:
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.slopes, expected.slopes)


# ------------------------------------------------------------------------------------------------------- several losses


@pytest.mark.parametrize(
    ("losses", "weights"),
    [
        (("sigmoid", "sft"), (1.0, 0.1)),
        (("simpo", "hinge", "kto_pair"), (0.5, 2.0, 3.0)),
        (("bco_pair", "odpo"), (1, 1)),
    ],
    ids=str,
)
def test_a_sum_of_losses_is_the_weighted_sum_of_each(losses, weights):
    x = some_pairs(1)
    alone = [judged(name, x) for name in losses]
    found = judged(",".join(losses), x, loss_weights=",".join(map(str, weights)))
    pairs = list(zip(weights, alone, strict=True))
    torch.testing.assert_close(found.losses, sum(weight * each.losses for weight, each in pairs))
    torch.testing.assert_close(found.slopes, sum(weight * each.slopes for weight, each in pairs))
    torch.testing.assert_close(found.parts, torch.stack([each.losses for each in alone], dim=1))


def test_sft_weight_adds_sft():
    x = some_pairs(2)
    close(judged("ipo", x, sft_weight=0.3), judged("ipo,sft", x, loss_weights="1,0.3"))


def test_each_loss_of_a_sum_has_its_own_default_beta():
    x = some_pairs(3)
    beta_of = {term.name: term.settings.beta for term in Objective(options_of("sigmoid,simpo,sppo_hard")).terms}
    assert beta_of == {"sigmoid": 0.1, "simpo": 2.0, "sppo_hard": 0.001}
    close(judged("sigmoid,simpo", x, beta=0.5), judged("sigmoid,simpo", x, beta=0.5, loss_weights="1,1"))


def test_the_widest_scope_counts():
    scopes = {
        loss: Objective(options_of(loss)).scope for loss in ("sigmoid,sft", "sft,plackett_luce", "sft,aot,sigmoid")
    }
    assert list(scopes.values()) == ["pair", "group", "step"]
    assert Objective(options_of("plackett_luce,bco_pair")).scope == "step"


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.weighted])
def test_a_pairs_weight_multiplies_its_slopes_but_not_its_loss(name):
    x = some_pairs(4)
    if LOSSES[name].scope == "step":  # weights also count in its means over the step: here, by the same factor
        heavy = judged(name, replace(x, weights=3 * x.weights, running=Running()))
        plain = judged(name, replace(x, running=Running()))
        torch.testing.assert_close(heavy.losses, plain.losses)
        torch.testing.assert_close(heavy.slopes, 3 * plain.slopes)
        return
    plain = judged(name, replace(x, weights=torch.ones_like(x.weights)))
    torch.testing.assert_close(judged(name, x).losses, plain.losses)
    torch.testing.assert_close(judged(name, x).slopes, x.weights[:, None] * plain.slopes)


def test_a_pair_twice_is_a_pair_of_weight_2():
    """In losses that read the whole step, too."""
    once = some_pairs(5, count=3, weights=[1.0, 2.0, 1.0])
    twice = replace(piece(once, [0, 1, 1, 2]), weights=torch.ones(4, dtype=torch.float64))
    for name in (name for name, loss in LOSSES.items() if loss.weighted and loss.scope != "group"):
        found, expected = judged(name, twice), judged(name, once)
        torch.testing.assert_close(found.losses, expected.losses[[0, 1, 1, 2]])
        torch.testing.assert_close(found.slopes[1] + found.slopes[2], expected.slopes[1])


def test_certainty_multiplies_losses_and_slopes():
    x = some_pairs(6)
    certainty = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    objective = Objective(options_of("sigmoid,sft"))
    plain, found = objective.judge(x), objective.judge(x, certainty)
    torch.testing.assert_close(found.losses, certainty * plain.losses)
    torch.testing.assert_close(found.slopes, certainty[:, None] * plain.slopes)
    assert torch.equal(found.parts, plain.parts), "a loss alone is shown without it"


# --------------------------------------------------------------------------------------------------------------- pieces

PIECES = ([0, 3], [5], [1, 2, 4])


@pytest.mark.parametrize("name", BY_SCOPE["pair"])
def test_a_step_in_pieces_has_the_same_losses_and_slopes(name):
    x = some_pairs(7)
    whole = judged(name, x)
    for places in PIECES:
        close(judged(name, piece(x, places)), whole.of(torch.tensor(places), 1.0))


@pytest.mark.parametrize("name", BY_SCOPE["step"])
def test_losses_that_read_the_step_cannot_be_judged_in_pieces(name):
    """Negative control: this is why the learner gathers the step's logps first."""
    x = some_pairs(7)
    whole = judged(name, x)
    differences = [
        (judged(name, piece(x, places)).slopes - whole.of(torch.tensor(places), 1.0).slopes).abs().max()
        for places in PIECES
    ]
    assert max(differences) > 1e-4 * whole.slopes.abs().max()


def test_a_ranking_stays_whole():
    facts = {"answers": [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6]], "rankings": [0, 0, 0, 1, 1]}
    logps = [-3.0, -7.0, -5.0, -9.0, -4.0, -2.0, -6.0]
    x = compared([[logps[a], logps[b]] for a, b in facts["answers"]], **facts)
    whole = judged("plackett_luce", x)
    for places in ([0, 1, 2], [3, 4]):
        close(judged("plackett_luce", piece(x, places)), whole.of(torch.tensor(places), 1.0))
    assert not torch.allclose(judged("plackett_luce", piece(x, [0, 1])).losses[0], whole.losses[0])


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_pairs_does_not_count(name):
    x = some_pairs(8)
    order = [4, 1, 5, 0, 3, 2]
    whole, turned = judged(name, x), judged(name, piece(x, order))
    if LOSSES[name].weighted:
        close(turned, whole.of(torch.tensor(order), 1.0))
    else:  # its losses come in the sorted order; each pair has weights of its own here, which these losses do not take
        equal = torch.ones_like(x.weights)
        whole = judged(name, replace(x, weights=equal))
        turned = judged(name, replace(piece(x, order), weights=equal))
        torch.testing.assert_close(turned.losses, whole.losses)
        torch.testing.assert_close(turned.slopes, whole.slopes[order])


def test_judged_of_some_pairs():
    whole = judged("sigmoid,sft", some_pairs(9))
    some = whole.of(torch.tensor([4, 0]), 0.5)
    assert torch.equal(some.losses, whole.losses[[4, 0]]) and torch.equal(some.parts, whole.parts[[4, 0]])
    assert torch.equal(some.slopes, 0.5 * whole.slopes[[4, 0]])
    nothing = whole.of(torch.tensor([1]), 0.0)
    assert not nothing.slopes.any() and torch.equal(nothing.losses, whole.losses[[1]]), "a micro-batch without effect"


# ---------------------------------------------------------------------------------------------------- between the steps


def test_what_is_remembered_over_three_steps():
    """By hand: weights, then the sum of the pairs' mean log-ratios, then the moving average of w - l."""
    steps = [
        of_log_ratios([[1.0, -1.0], [3.0, 1.0]], weights=[1.0, 3.0]),  # means 0 and 2; w - l is 2 and 2
        of_log_ratios([[-4.0, 0.0]]),  # mean -2; w - l is -4
        of_log_ratios([[0.0, 2.0], [5.0, 1.0]], weights=[0.5, 0.5]),  # means 1 and 3; w - l is -2 and 4
    ]
    seen = [(4.0, 6.0, 0.2), (5.0, 4.0, 0.9 * 0.2 - 0.4), (6.0, 6.0, 0.9 * -0.22 + 0.1)]
    objective, running = Objective(options_of("beta_dpo")), Running()
    for x, (pairs, log_ratios, gap) in zip(steps, seen, strict=True):
        running = objective.after(replace(x, running=running))
        assert (running.pairs, running.log_ratios) == (pairs, log_ratios) and math.isclose(running.gap, gap)


def test_the_momentum_is_beta_dpos_wherever_it_stands():
    x = replace(of_log_ratios([[3.0, 1.0]]), running=Running(gap=10.0))
    for loss in ("beta_dpo", "sft,beta_dpo", "bco_pair,beta_dpo"):
        assert Objective(options_of(loss, beta_momentum=0.25)).after(x).gap == 0.25 * 10 + 0.75 * 2
    assert Objective(options_of("bco_pair")).after(x).gap == 2.0


def test_remembering_takes_no_gradient_and_changes_nothing():
    x = some_pairs(10)
    policy = x.policy.clone().requires_grad_()
    running = Objective(options_of("bco_pair")).after(replace(x, policy=policy))
    assert all(isinstance(value, float) for value in vars(running).values())
    assert running == Objective(options_of("bco_pair")).after(x) and x.running != running


def test_bcos_shift_is_the_mean_over_all_steps():
    first, second = (of_log_ratios([[3.0, 1.0]]), of_log_ratios([[6.0, -2.0], [1.0, -3.0]]))
    objective = Objective(options_of("bco_pair", beta=1.0))
    running = objective.after(first)
    found = objective.judge(replace(second, running=running)).losses
    shift = (3.0 + 1.0 + 6.0 - 2.0 + 1.0 - 3.0) / 6
    expected = [
        math.log1p(math.exp(shift - w)) + math.log1p(math.exp(r - shift)) for w, r in ((6.0, -2.0), (1.0, -3.0))
    ]
    assert found.tolist() == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------- rewards and metrics


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("sigmoid", {}, [[0.1, -0.15], [-0.4, 0.15]]),
        ("sigmoid,simpo", {"beta": 0.5}, [[0.5, -0.75], [-2.0, 0.75]]),
        ("nca_pair", {}, [[0.01, -0.015], [-0.04, 0.015]]),
        ("simpo", {}, [[2 * -12 / 6, 2 * -15.5 / 9], [2 * -24 / 15, 2 * -25 / 7]]),
        ("simpo,sigmoid", {}, [[2 * -12 / 6, 2 * -15.5 / 9], [2 * -24 / 15, 2 * -25 / 7]]),
        ("orpo", {}, [[-12 / 6, -15.5 / 9], [-24 / 15, -25 / 7]]),
    ],
)
def test_rewards_are_the_first_losses(loss, options, expected):
    x = compared(
        [[-12.0, -15.5], [-24.0, -25.0]], [[-13.0, -14.0], [-20.0, -26.5]], lengths=[[6, 9], [15, 7]]
    )  # log-ratios 1, -1.5 and -4, 1.5
    rewards = Objective(options_of(loss, **options)).rewards(x)
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))


def metrics_of(objective, x):
    return preference_metrics(x, objective.judge(x), objective.rewards(x), True)


def test_metrics_by_hand():
    x = compared([[-12.0, -15.5], [-24.0, -25.0]], [[-13.0, -14.0], [-20.0, -26.5]], lengths=[[6, 9], [15, 7]])
    objective = Objective(options_of("hinge,sft", loss_weights="1,2"))
    found, names = metrics_of(objective, x), names_of(objective.names, True)
    first = dict(zip(names, found[0].tolist(), strict=True))
    assert first == pytest.approx(
        {
            "loss": 0.75 + 2 * 12 / 10.5,
            "loss/hinge": 0.75,
            "loss/sft": 12 / 10.5,
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.15,
            "rewards/margins": 0.25,
            "rewards/accuracies": 1.0,
            "logps/chosen": -12.0,
            "logps/rejected": -15.5,
            "lengths/chosen": 6.0,
            "lengths/rejected": 9.0,
            "logps_per_token/chosen": -2.0,
            "logps_per_token/rejected": -15.5 / 9,
            "log_ratios/chosen": 1.0,
            "log_ratios/rejected": -1.5,
            "kl": (math.exp(-1 / 6) - 1 + 1 / 6 + math.exp(1.5 / 9) - 1 - 1.5 / 9) / 2,
        }
    )
    assert dict(zip(names, found[1].tolist(), strict=True))["rewards/accuracies"] == 0.0
    assert metrics_of(objective, replace(x, policy=x.reference))[0, 3] == 0.5


def test_one_loss_alone_has_no_part_of_its_own():
    assert "loss/sigmoid" not in names_of(["sigmoid"], True)
    objective = Objective(options_of("sigmoid"))
    assert metrics_of(objective, some_pairs(11)).shape == (6, len(names_of(["sigmoid"], True)))


def test_without_a_reference_there_is_no_kl():
    x, objective = some_pairs(11), Objective(options_of("simpo"))
    names = names_of(["simpo"], False)
    assert "kl" not in names
    found = preference_metrics(x, objective.judge(x), objective.rewards(x), False)
    assert found.shape == (6, len(names))


def test_kl_is_no_more_than_the_tokens_own():
    """k3 of the mean log-ratio of an answer's tokens is at most the mean of k3; equal where all tokens moved alike."""
    per_token = torch.randn(50, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    per_token[0] = 0.3
    x = compared(per_token.sum(2).tolist(), torch.zeros(50, 2).tolist(), lengths=[[7, 7]] * 50)
    found, tokens = kl_per_token(x), (torch.exp(-per_token) - 1 + per_token).mean(2)
    assert (found >= 0).all() and (found <= tokens + 1e-12).all()
    torch.testing.assert_close(found[0], tokens[0])
    assert not kl_per_token(replace(x, policy=x.reference)).any()
