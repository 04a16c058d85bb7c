"""What makes two starts the same run."""

import pytest

from dpo_ds.config import FIELDS, NOT_IDENTITY, Options
from dpo_ds.errors import UserError
from dpo_ds.runs.identity import (
    CHANGEABLE,
    FREE,
    OF_PAIRS,
    allowed_changes,
    differences,
    hash_of,
    identity,
    require_same,
)

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "betas": [0.9, 0.999], "eps": 1e-8, "fused": True}}}


def run(config=ADAM, train="t", held_out="e", files=None, **options) -> dict:
    options = {"model": "m", "dataset": "d", "learning_rate": 1e-6, "max_steps": 10} | options
    return identity(Options(**options), config, train, held_out, "2026-01-01", files or {"--model": {"w": "1"}})


def adam(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": ADAM["optimizer"]["params"] | params}}


@pytest.mark.parametrize(
    "other",
    [
        {"model": "elsewhere/m", "dataset": "moved/d", "micro_batch_tokens": 3},
        {"gradient_checkpointing": "on", "ds_config": "mine.json", "attention": "eager", "output_dir": "x"},
        {"save_every": 7, "eval_every": 9, "report_to": "wandb", "resume": "never", "export": "none"},
        {"config": adam(fused=False, torch_adam=True, lr=3)},
    ],
)
def test_what_does_not_move_the_curve_may_differ(other):
    assert differences(run(), run(**other)) == {} and hash_of(run()) == hash_of(run(**other))
    require_same("f", run(), run(**other))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"learning_rate": 2e-6}, "learning_rate is 1e-06 there and 2e-06 here"),
        ({"beta": 0.3, "seed": 7}, "beta is not given there and 0.3 here; seed is 42 there and 7 here"),
        ({"config": adam(betas=[0.9, 0.95])}, "the optimizer's betas is [0.9, 0.999] there and [0.9, 0.95] here"),
        ({"train": "x", "dataset": "d2"}, "dataset is d there and d2 here"),
        (
            {"train": "x", "held_out": "y", "eval_pairs": 3},
            "eval_pairs is not given there and 3 here",
        ),
        ({"train": "x"}, "the training pairs are others"),
        ({"held_out": "x"}, "the held-out pairs are others"),
        ({"files": {"--model": {"w": "2"}}}, "--model: w changed since"),
        (
            {"files": {"--model": {"w": "1"}, "--adapter": {"a": "1", "b": "2"}}},
            "--adapter: a and 1 more changed since",
        ),
    ],
)
def test_what_moves_the_curve_is_named(other, said):
    assert hash_of(run()) != hash_of(run(**other))
    with pytest.raises(UserError) as error:
        require_same("f", run(), run(**other))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_longer_named_are_missed():
    both = run(files={"--model": {"w": "1"}, "--adapter": {"a": "1"}})
    with pytest.raises(UserError, match="--adapter: a changed since"):
        require_same("f", both, run())


def test_only_the_schedule_may_change_from_another_runs_checkpoint():
    before = run() | {"parent": {"run": "older", "step": 3, "optimizer": True}}
    now = run(learning_rate=2e-6, max_steps=30) | {"parent": {"run": "x", "step": 3, "optimizer": True}}
    assert allowed_changes("c", before, now) == [
        "learning_rate is 1e-06 there and 2e-06 here",
        "max_steps is 10 there and 30 here",
    ]
    with pytest.raises(UserError, match=r"--resume c is of another run \(beta is not given there and 1.0 here\): only"):
        allowed_changes("c", before, now | {"beta": 1.0})
    with pytest.raises(UserError, match="other files of --model: w differs"):
        allowed_changes("c", before, run(files={"--model": {"w": "2"}}))
    with pytest.raises(UserError, match="began from a checkpoint of another run"):
        require_same("f", before, now | {"learning_rate": 1e-6, "max_steps": 10})


def test_every_option_is_known_to_decide_or_not():
    assert OF_PAIRS | CHANGEABLE | (FREE - {"date"}) <= FIELDS.keys()
    assert not OF_PAIRS & FREE and not (OF_PAIRS | FREE | CHANGEABLE) & NOT_IDENTITY
