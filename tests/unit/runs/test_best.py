"""--keep_best: which checkpoint is the best, and when none can be."""

import json

import pytest

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.runs.checkpoint import best_checkpoint
from dpo_ds.runs.prepare import _require_judged

LOSSES = {2: 0.7, 4: 0.5, 6: 0.5, 8: 0.6, 9: 0.1, 10: None}


@pytest.fixture
def folder(tmp_path):
    for step in (2, 4, 6, 8, 10, 12):  # step 9 has no checkpoint, step 12 no evaluation
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    lines = [{"step": step, "eval/loss": loss, "eval/rewards/margins": loss} for step, loss in LOSSES.items()]
    lines += [{"step": 12, "loss": 0.0, "rewards/margins": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_best_is_the_lowest_loss_or_the_largest_margin_and_the_newest_of_equals(folder):
    assert best_checkpoint(folder, "eval/loss").name == "step-000006"
    assert best_checkpoint(folder, "eval/rewards/margins").name == "step-000002"
    assert best_checkpoint(folder, "eval/rewards/accuracies") is None


@pytest.mark.parametrize(
    ("options", "held_out", "said"),
    [
        ({"keep_last": None}, 5, "without --keep_last keeps all checkpoints"),
        ({}, 0, "needs held-out pairs"),
        ({"save_every": 5}, 5, "--save_every is 5 and --eval_every 2: make --save_every a multiple of it"),
        ({"eval_every": 0}, 5, "--save_every is 4 and --eval_every 0"),
        ({}, 5, None),
        ({"save_every": 0}, 5, None),
        ({"keep_best": None, "save_every": 5}, 0, None),
    ],
)
def test_a_run_whose_checkpoints_cannot_be_judged_is_refused(options, held_out, said):
    given = Options(model="m", **{"keep_last": 1, "keep_best": "eval/loss", "save_every": 4, "eval_every": 2} | options)
    if said is None:
        _require_judged(given, held_out)
        return
    with pytest.raises(UserError, match=said):
        _require_judged(given, held_out)
