"""Mixtures of experts: the load-balancing loss on packed rows, and ranks whose tokens go to different experts."""

import json

import launching
import numpy as np
import oracle
import pytest
import tiny
import torch
from packed_pairs import packed_model, random_groups
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_ds.config import parse_options
from dpo_ds.engine.tiers import fill_tier
from dpo_ds.errors import UserError
from dpo_ds.models.find import known_model
from dpo_ds.plan.choose import decide
from dpo_ds.scoring.packed import pack

MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(MIXTRAL, tmp_path_factory.mktemp("moe"))


def plain_loss(model, pair) -> torch.Tensor:
    """transformers' own, over the pair's tokens: prompt's and chosen's from one forward, rejected's from another."""
    prompt, chosen, rejected = pair

    def logits(response):
        ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
        return model.model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits

    layers = zip(logits(chosen), logits(rejected), strict=True)
    tokens = tuple(torch.cat([first, second[len(prompt) :]]) for first, second in layers)
    return load_balancing_loss_func(tokens, model.config.num_local_experts, model.config.num_experts_per_tok)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_loss_on_packed_rows_is_the_plain_one(folder, checkpointing):
    groups = random_groups()
    pairs = [(g.prompt, g.answers[chosen], g.answers[rejected]) for g in groups for chosen, rejected in g.pairs]
    plain = oracle.load(folder)
    expected = torch.stack([plain_loss(plain, pair) for pair in pairs])
    expected.sum().backward()
    scorer = packed_model(folder)
    scorer.balance = True
    scorer.train()
    if checkpointing:
        scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scored = scorer(pack(groups))
    logps, losses = scored.answers, scored.balance
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    (losses.sum() + 0 * logps.sum()).backward()
    ours = dict(scorer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert expected.std() > 1e-3, "pairs that are balanced alike would hide a mix-up"


def test_evaluation_and_other_models_have_none_of_it(folder):
    scorer = packed_model(folder)
    scorer.balance = True
    scorer.eval()
    assert scorer(pack(random_groups())).balance is None
    options = parse_options(["--model", "gpt2", "--router_aux_loss_coef", "0.1"])
    with pytest.raises(UserError, match="gpt2 is no mixture of experts"):
        decide(options, known_model("gpt2"), False)
    with pytest.raises(UserError, match="must be 0, a number above it, or model"):
        parse_options(["--model", "gpt2", "--router_aux_loss_coef", "much"])
    asked = parse_options(["--model", MIXTRAL, "--router_aux_loss_coef", "model"])
    assert decide(asked, known_model(MIXTRAL), True).router_aux_loss_coef == "0.02"


def test_experts_are_leaf_modules_in_every_stage_3_tier():
    options = parse_options(["--model", MIXTRAL, "--precision", "bf16", "--learning_rate", "1e-7"])
    model = known_model(MIXTRAL)
    block = "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock"
    for tier in ("zero3_offload_moe", "zero3_standard", "zero3_lora_large"):
        zero = fill_tier(tier, options, model, ranks=8, on_gpu=True)["zero_optimization"]
        assert zero["leaf_module"] == {"classes": [block]}
        assert zero["stage3_max_live_parameters"] == 2 * model.largest_block == 2 * 1_409_318_912


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("moe-runs")
    for stage in (0, 3):
        (place / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    cases = {
        "one": (1, 0, {"router_aux_loss_coef": "1.0"}, {}),
        "two": (2, 3, {"router_aux_loss_coef": "1.0", "gradient_checkpointing": "on"}, {}),
        "off": (2, 3, {}, {}),
        # The table of a reference knows nothing of what these runs do to the router.
        "uneven": (2, 3, {"loss": "simpo"}, {"uneven_routing": True}),
        "uneven-eager": (2, 3, {"loss": "simpo"}, {"uneven_routing": True, "experts_implementation": "eager"}),
    }
    scenarios: dict[int, list] = {1: [], 2: []}
    for case, (ranks, stage, extra, scenario) in cases.items():
        options = {
            "model": folder, "dataset": "sample", "ds_config": place / f"stage{stage}.json",
            "output_dir": place / case, "cache_dir": place / "cache", "max_steps": 5, "global_batch_pairs": 8,
            "learning_rate": 4e-4, "max_length": 96, "eval_pairs": 6, "generations": 0, "precision": "fp32",
            "export": "none", **extra,
        }  # fmt: skip
        scenarios[ranks].append({"argv": [f"--{key}={value}" for key, value in options.items()], **scenario})
    for ranks, runs in scenarios.items():
        # A rank that waited for the other would wait until the time is up.
        place.joinpath(f"{ranks}.out").write_text(launching.run_scenarios(ranks, runs, place / f"{ranks}.json"))
    return place


def test_the_curve_with_the_loss_is_the_same_on_two_ranks(place):
    for key in ("loss", "aux_loss"):
        one, two = launching.curve(place / "one", key), launching.curve(place / "two", key)
        assert len(one) == 5
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5, err_msg=key)
    assert abs(launching.curve(place / "one")[0] - 0.693147) < 1e-5, "the loss proper is logged without it"
    off = launching.curve(place / "off")
    assert max(abs(a - b) for a, b in zip(off, launching.curve(place / "one"), strict=True)) > 1e-4
    assert not launching.curve(place / "off", "aux_loss")


@pytest.mark.parametrize("case", ["uneven", "uneven-eager"])
def test_ranks_that_route_to_different_experts_go_on(case, place):
    """Rank 0's tokens all go to experts 0 and 1, rank 1's to 2 and 3: five steps, none waits for ever."""
    assert len(launching.curve(place / case)) == 5
    out = (place / "2.out").read_text()
    assert "rank 0 routed to [0, 1]" in out and "rank 1 routed to [2, 3]" in out
    assert "nvalidate trace" not in out
