"""Whether figures that are finite make sense, and what becomes of the folder of a run that they have stopped."""

import json
import math

import pytest

from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.runs import stopped
from dpo_ds.runs.folders import open_folder
from dpo_ds.runs.sense import Sense

VOCABULARY = 50_000
BLIND = math.log(VOCABULARY)


def line(begin="", step=1, chosen=-2.0, rejected=-2.1, loss=0.69, norm=3.0):
    figures = {"loss": loss, "logps_per_token/chosen": chosen, "logps_per_token/rejected": rejected}
    return {"step": step, **{begin + name: value for name, value in figures.items()}, "grad_norm": norm}


def begun(largest=1.0) -> Sense:
    """A run's sense after a healthy start."""
    sense = Sense(VOCABULARY, largest)
    sense.remember([line("eval/", 0), *(line(step=step) for step in (1, 2, 3, 4))])
    return sense


# A sentence that must be part of the message, or None for a healthy line.
LINES = {
    "healthy": ({}, None),
    "chosen answers fall, as with too much DPO": ({"chosen": -8.0, "rejected": -19.0, "loss": 1e-4}, None),
    "chosen answers are as good as drawn blindly": ({"chosen": -BLIND}, "tokens that are drawn blindly have -10.8"),
    "rejected answers vanish": ({"rejected": -300.0, "loss": 0.0}, None),
    "chosen answers are nonsense": ({"chosen": -2.1 * BLIND}, "chosen answers have -22.72 nats a token, and had -2 at"),
    "wrong answers are preferred": ({"chosen": -10.5, "rejected": 0.5}, "rejected answers have 11 nats a token more"),
    "a loss that is high": ({"loss": 30.0}, None),
    "a loss that has exploded": ({"loss": 2e6}, "loss is 2e+06, and was 0.69 at the start"),
    "a loss that has exploded downwards": ({"loss": -2e6}, "loss is -2e+06, and was 0.69 at the start"),
    "figures that are not finite": ({"chosen": None, "loss": None}, None),
}  # fmt: skip


@pytest.mark.parametrize("begin", ["", "eval/"])
@pytest.mark.parametrize("name", LINES)
def test_figures(name, begin):
    changed, words = LINES[name]
    sense = begun()
    judge = sense.of_evaluation if begin else sense.of_step
    found = judge(line(begin, 9, **changed))
    assert found is None if words is None else words in found
    assert judge(line(begin, 10)) is None, "the start's figures are still those of the start"


def test_gradients_are_compared_with_the_first_steps():
    assert begun().of_step(line(norm=20_000.0)) is None
    assert begun().of_step(line(norm=40_000.0)) == (
        "the gradients' norm is 4e+04, and was at most 3 in the first 3 steps"
    )
    assert Sense(VOCABULARY, 1.0).of_step(line(norm=40_000.0)) is None, "there is nothing to compare it with"
    assert begun().of_step(line(norm=math.inf)) is None, "such a step changes nothing"
    flat = Sense(VOCABULARY, 1.0)
    flat.remember(line(step=step, norm=0.0) for step in (1, 2, 3))
    assert flat.of_step(line(norm=1.0)) is None, "a hinge that no pair had reached"


def test_weights_are_compared_with_the_start():
    assert begun(largest=2.0).of_weights(199.0) is None
    assert begun(largest=2.0).of_weights(1e9) == "the largest weight is 1e+09, and was 2 before training"
    assert begun().of_weights(math.nan) is not None


def test_chosen_answers_before_a_checkpoint():
    assert begun().of_chosen(-9.0) is None
    assert "the step's chosen answers have -108 nats a token, and had -2 at the start" in begun().of_chosen(-108.0)
    assert Sense(VOCABULARY, 1.0).of_chosen(-108.0) is None, "a run that starts so has not become so"


def test_a_start_that_is_worse_than_blind_is_no_alarm():
    """A model with random weights."""
    sense = Sense(VOCABULARY, 1.0)
    for begin, judge in (("eval/", sense.of_evaluation), ("", sense.of_step)):
        assert judge(line(begin, chosen=-40.0, rejected=-40.0)) is None
        assert judge(line(begin, chosen=-45.0, rejected=-45.0)) is None
        assert judge(line(begin, chosen=-51.0, rejected=-45.0)) is not None


def test_a_run_that_goes_on_knows_its_start():
    sense = Sense(VOCABULARY, 1.0)
    sense.remember([line("eval/", 0), line(norm=None, loss=None), line(step=2, norm=5.0)])
    assert sense.norms == [5.0] and sense.first["eval/"].chosen == -2.0 and sense.first[""].loss == 0.69
    assert sense.of_evaluation(line("eval/", 30, chosen=-30.0)) is not None


# ------------------------------------------------------------------------------------------------------ the same folder


def opened(folder, **identity):
    options = Options(model="x", export="none")
    return open_folder(folder, options, {"seed": 1, **identity, "files": {}}, 1)


def test_another_run_takes_the_place_of_a_stopped_one_and_deletes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    opened(folder, rate=1e9).lock.release()
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds another run"):
        opened(folder, rate=1e-6)
    stopped.mark(folder, "nonsense")
    found = opened(folder, rate=1e-6)
    assert found.resume_from is None and not found.finished and not stopped.is_stopped(folder)
    assert f"its files are now in {folder}/stopped" in capsys.readouterr().out
    there = {path.name for path in (folder / "stopped").iterdir()}
    assert there == {"run.json", "options.yaml", "metrics.jsonl", "checkpoints"}
    assert json.loads((folder / "stopped" / "run.json").read_text())["rate"] == 1e9
    assert {path.name for path in folder.iterdir()} == {
        "stopped", "run.json", "options.yaml", "running.lock", "running.json",
    }  # fmt: skip
    stopped.mark(folder, "nonsense")
    found.lock.release()
    opened(folder, rate=1e-7)
    assert (folder / "stopped-2" / "options.yaml").is_file() and (folder / "stopped" / "metrics.jsonl").is_file()


def test_the_stopped_run_itself_goes_on_where_it_was(tmp_path):
    opened(tmp_path / "run", rate=1e9).lock.release()
    stopped.mark(tmp_path / "run", "nonsense")
    opened(tmp_path / "run", rate=1e9).lock.release()
    assert not stopped.is_stopped(tmp_path / "run") and not (tmp_path / "run" / "stopped").exists()


def test_a_start_that_is_killed_while_it_puts_files_aside_is_done_again(tmp_path):
    folder = tmp_path / "run"
    opened(folder, rate=1e9).lock.release()
    (folder / "metrics.jsonl").write_text("{}\n")
    stopped.mark(folder, "nonsense")
    stopped.put_aside(folder)
    assert stopped.is_stopped(folder) and (folder / "run.json").is_file()
    opened(folder, rate=1e-6)
    assert (folder / "stopped" / "metrics.jsonl").is_file() and not stopped.is_stopped(folder)
