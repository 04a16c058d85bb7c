"""--report_to: names, refusals, secrets, what a tracker is told. tests/launches/test_trackers.py has real ones."""

import sys
from types import SimpleNamespace

import pytest

from dpo_ds.config import NOT_IDENTITY, TRACKERS, parse_options, trackers_of
from dpo_ds.errors import UserError
from dpo_ds.reports import trackers
from dpo_ds.reports.record import NEVER, Recorder


def options_of(*words: str):
    return parse_options(["--model=gpt2", *words])


def test_names():
    assert trackers_of(options_of()) == []
    assert trackers_of(options_of("--report_to=wandb, mlflow,wandb")) == ["wandb", "mlflow"]
    assert {*TRACKERS} == {*trackers.KINDS} and "report_to" in NOT_IDENTITY
    for wrong in ("tensorbord", "none,wandb", "wandb,", ""):
        with pytest.raises(UserError, match=r"--report_to has no .*It takes none, or tensorboard"):
            options_of(f"--report_to={wrong}")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_refused(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"--report_to {name} needs its library.*pip install {name}"):
        trackers.require_trackers(options_of(f"--report_to={name}"))


def test_a_folder_of_its_name_is_no_library(tmp_path, monkeypatch):
    """W&B writes to ./wandb, which Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.require_trackers(options_of("--report_to=wandb"))


@pytest.mark.parametrize(
    ("known", "mode", "refused"), [(False, "online", True), (False, "offline", False), (True, "online", False)]
)
def test_wandb_without_login_is_refused(known, mode, refused, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: SimpleNamespace(origin="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: known))
    options = options_of("--report_to=wandb")
    if refused:
        with pytest.raises(UserError, match="wandb login, or set WANDB_MODE=offline"):
            trackers.require_trackers(options)
    else:
        trackers.require_trackers(options)


def test_secrets_are_left_out():
    token = "hf_" + "a" * 34
    found = {"dataset": f"https://me:{token}@host/a.jsonl?token=abc&b=1", "model": f"/home/{token}/x", "seed": 7}
    facts = trackers.without_secrets(options_of().replace(**found))
    assert facts["dataset"] == "https://host/a.jsonl?token=***&b=1"
    assert facts["model"] == "/home/***/x" and facts["seed"] == 7
    assert trackers.without_secrets(options_of())["model"] == "gpt2"


def test_metrics_are_named_as_transformers_does():
    training = {"step": 3, "loss": 0.5, "rewards/chosen": 1, "applied": True, "grad_norm": None}
    assert trackers.numbers(training, False) == {"train/loss": 0.5, "train/rewards/chosen": 1.0, "train/applied": 1.0}
    assert trackers.numbers({"step": 3, "eval/loss": 0.5}, True) == {"eval/loss": 0.5}
    names = {"train/loss": "loss", "eval/loss": "eval_loss", "eval/rewards/chosen": "eval_rewards/chosen",
             "train/loss/sft": "loss_sft", "eval/loss/sft": "eval_loss_sft"}  # fmt: skip
    assert {name: trackers.mlflow_name(name) for name in names} == names


class Kept(trackers.Tracker):
    name = "kept"

    def __init__(self, folder, options, held):
        super().__init__(folder, options)
        self.before, self.told = held, []

    def open(self, kept):
        return self.before

    def write(self, step, values):
        self.told.append((step, *values))


def test_a_tracker_gets_what_it_does_not_hold(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.starting(0, 9)
    recorder.evaluated({"step": 0, "eval/loss": 1.0})
    for number in (1, 2, 3):
        recorder.step_ended({"step": number, "loss": 1.0})
    tracker = Kept(tmp_path, options_of(), {False: 1, True: NEVER})
    recorder = Recorder(tmp_path, [tracker])
    recorder.starting(2, 9)
    for number in (3, 4):
        recorder.step_ended({"step": number, "loss": 1.0})
    assert tracker.told == [(0, "eval/loss"), (2, "train/loss"), (3, "train/loss"), (4, "train/loss")]


def test_the_trackers_names_of_a_run_are_kept(tmp_path):
    first = Kept(tmp_path, options_of(), {})
    assert first.known() == {} and first.known(id="a") == {"id": "a"}
    assert Kept(tmp_path, options_of(), {}).known(id="b") == {"id": "a"}
