"""The record, metrics.jsonl: what is written, what a run that goes on keeps, and readers that fail."""

import math

import pytest

from dpo_ds.reports.record import Reader, Recorder


class Seen(Reader):
    name = "seen"

    def __init__(self):
        self.lines, self.ends = [], []

    def begin(self, kept, steps):
        self.lines = [*kept.lines()]

    def read(self, line):
        self.lines.append(line)

    def end(self, finished):
        self.ends.append(finished)


class Broken(Seen):
    name = "broken"

    def read(self, line):
        raise OSError("no space left")


def step(number: int, **more) -> dict:
    return {"step": number, "loss": 0.5, **more}


def evaluation(number: int) -> dict:
    return {"step": number, "eval/loss": 0.5}


def started(folder, done: int, steps: int = 4, readers=()) -> Recorder:
    recorder = Recorder(folder, readers)
    recorder.starting(done, steps)
    return recorder


def test_readers_get_what_the_file_holds(tmp_path):
    reader = Seen()
    recorder = started(tmp_path, 0, readers=[reader])
    recorder.evaluated(evaluation(0))
    recorder.step_ended(step(1, grad_norm=math.inf))
    assert reader.lines == [*recorder.record.lines()] == [evaluation(0), step(1, grad_norm=None)]


@pytest.mark.parametrize(("done", "kept"), [(0, 0), (2, 4), (3, 5)])
def test_steps_that_run_again_are_forgotten(tmp_path, done, kept):
    recorder = started(tmp_path, 0)
    lines = [evaluation(0), step(1), step(2), evaluation(2), step(3)]
    for line in lines:
        (recorder.evaluated if "eval/loss" in line else recorder.step_ended)(line)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    reader = Seen()
    started(tmp_path, done, readers=[reader])
    assert reader.lines == lines[:kept]


def test_the_last_evaluation_is_recorded_once(tmp_path):
    """A run that was killed after its last step, before the export, evaluates again."""
    recorder = started(tmp_path, 0, steps=1)
    recorder.step_ended(step(1))
    recorder.evaluated(evaluation(1))
    recorder = started(tmp_path, 1, steps=1)
    recorder.evaluated(evaluation(1))
    assert [*recorder.record.lines()] == [step(1), evaluation(1)]


def test_readers_learn_whether_the_run_finished(tmp_path):
    reader = Seen()
    recorder = started(tmp_path, 0, steps=2, readers=[reader])
    recorder.step_ended(step(1))
    recorder.ended()
    recorder.step_ended(step(2))
    recorder.ended()
    assert reader.ends == [False, True]


def test_a_reader_that_fails_is_dropped_and_said_once(tmp_path, capsys):
    healthy = Seen()
    recorder = started(tmp_path, 0, readers=[Broken(), healthy])
    for number in (1, 2):
        recorder.step_ended(step(number))
    said = capsys.readouterr().out
    assert said == "dpo_ds: broken: OSError: no space left; the run goes on without it\n"
    assert len(healthy.lines) == 2
