"""What the doctor finds in a run's figures: each finding in figures that were made for it, and none in healthy ones."""

import json

import pytest

from dpo_ds.config import parse_options
from dpo_ds.doctor.curve import LOOKS, CurveReader
from dpo_ds.reports.record import Record, Recorder

STEPS, EVERY = 40, 4


def healthy(step: int) -> tuple[dict, dict]:
    """A training step's figures and a held-out evaluation's."""
    done = step / STEPS
    train = {"step": step, "loss": 0.693 - 0.3 * done, "clipped": step < 5, "grad_norm": 0.6}
    held_out = {
        "step": step,
        "eval/loss": 0.693 - 0.2 * done,
        "eval/rewards/margins": 0.5 * done,
        "eval/rewards/accuracies": 0.5 + 0.3 * done,
        "eval/logps_per_token/chosen": -2.0 + 0.01 * done,
        "eval/length_correlation": 0.3 if step else None,
    }
    return train, held_out


def lines(train: dict | None = None, held_out: dict | None = None) -> list[dict]:
    """A run's record. `train` and `held_out` give functions of the step in place of healthy figures."""
    found = []
    for step in range(STEPS + 1):
        own, evaluation = healthy(step)
        own |= {name: value(step) for name, value in (train or {}).items()}
        evaluation |= {name: value(step) for name, value in (held_out or {}).items()}
        found += ([own] if step else []) + ([evaluation] if step % EVERY == 0 else [])
    return found


def run(folder, capsys, record: list[dict]) -> tuple[CurveReader, list[str]]:
    """The record as a run writes it. Returns the reader, and the lines that it said."""
    reader = CurveReader(parse_options(["--model=tiny-gpt2", "--learning_rate=1e-3"]))
    recorder = Recorder(folder, [reader])
    recorder.starting(0, STEPS)
    for step in range(STEPS + 1):
        for line in (line for line in record if line["step"] == step):
            recorder.evaluated(line) if "eval/loss" in line else recorder.step_ended(line)
        if step:
            recorder.step_settled(step)
    recorder.ended()
    return reader, capsys.readouterr().out.splitlines()


MADE = {
    "loss_stands": ({"loss": lambda step: 0.693 - 1e-5 * step}, None),
    "clipped": ({"clipped": lambda step: True, "grad_norm": lambda step: 7.0}, None),
    "chosen_falls": (None, {"eval/logps_per_token/chosen": lambda step: -2.0 - step / 100}),
    "margins_without_accuracy": (None, {"eval/rewards/accuracies": lambda step: 0.7 - step / 1000}),
    "margin_turned": (None, {"eval/rewards/margins": lambda step: 0.1 + min(step, 40 - step) / 40}),
    "held_out_worse": (None, {"eval/loss": lambda step: 0.693 + step / 100}),
    "rewards_by_length": (None, {"eval/length_correlation": lambda step: -0.8 if step else None}),
}


def test_a_healthy_run_is_silent(tmp_path, capsys):
    reader, said = run(tmp_path, capsys, lines())
    assert reader.findings == [] and said == []
    looked = {check.kind for check in reader.checks(STEPS)}
    assert looked == set(MADE) - {"margins_without_accuracy"}, "accuracy has risen"
    assert reader.clipped == 4 / STEPS


@pytest.mark.parametrize("kind", MADE)
def test_what_is_made_for_it_is_found_and_said_once(kind, tmp_path, capsys):
    reader, said = run(tmp_path, capsys, lines(*MADE[kind]))
    [finding] = reader.findings
    assert finding.kind == kind
    assert said == [f"dpo_ds: {finding.line}"] and finding.line.startswith(f"doctor: step {finding.step}: ")
    assert json.loads(json.dumps(finding.as_json()))["value"] == finding.value
    assert finding.step % (STEPS // LOOKS) == 0


def test_a_run_that_goes_on_does_not_say_it_again(tmp_path, capsys):
    record = lines(*MADE["chosen_falls"])
    first, said = run(tmp_path, capsys, record)
    assert len(said) == 1
    again = CurveReader(parse_options(["--model=tiny-gpt2", "--learning_rate=1e-3"]))
    again.begin(Record(tmp_path), STEPS)
    assert again.findings == first.findings and capsys.readouterr().out == ""


def test_without_held_out_pairs_training_alone_is_looked_at(tmp_path, capsys):
    record = [line for line in lines(*MADE["clipped"]) if "eval/loss" not in line]
    reader, _ = run(tmp_path, capsys, record)
    assert [finding.kind for finding in reader.findings] == ["clipped"]


def test_figures_that_are_not_finite_are_no_finding(tmp_path, capsys):
    record = lines({"loss": lambda step: None}, {"eval/rewards/margins": lambda step: None})
    reader, said = run(tmp_path, capsys, record)
    assert reader.findings == [] and said == []
