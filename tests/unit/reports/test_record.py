"""The record, metrics.jsonl: what is written, what a run that goes on keeps, and readers that fail."""

import math
import os
import resource
import signal

import pytest

from dpo_ds.reports import record
from dpo_ds.reports.record import Reader, Record, Recorder


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


def started(folder, done: int, steps: int = 4, readers=(), checkpoint=None) -> Recorder:
    recorder = Recorder(folder, readers, checkpoint)
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


# -------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def file_limit():
    """Returns a function that limits how large a file this process may write."""
    kept, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept if size is None else (size, kept[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_cannot_be_written_wait_and_none_is_lost(tmp_path, file_limit, capsys):
    reader = Seen()
    recorder = started(tmp_path, 0, steps=9, readers=[reader])
    recorder.step_ended(step(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    file_limit(size + 10)  # half of a line
    for number in (2, 3, 4):
        recorder.step_ended(step(number))
        assert (tmp_path / "metrics.jsonl").stat().st_size == size, "no half of a line is left"
    file_limit(None)
    recorder.step_ended(step(5))
    assert [*recorder.record.lines()] == reader.lines == [step(number) for number in range(1, 6)]
    said = capsys.readouterr()
    assert said.err == (
        f"dpo_ds: {tmp_path}/metrics.jsonl cannot be written: File too large; the run goes on, and keeps its lines in "
        "memory until there is room\n"
    )
    assert said.out == f"dpo_ds: {tmp_path}/metrics.jsonl is written again; 4 lines had waited\n"


def test_lines_wait_as_well_where_the_file_cannot_be_opened(tmp_path):
    recorder = started(tmp_path, 0)
    (tmp_path / "metrics.jsonl").mkdir()
    recorder.step_ended(step(1))
    (tmp_path / "metrics.jsonl").rmdir()
    recorder.ended()
    assert [*recorder.record.lines()] == [step(1)]


def test_more_lines_than_memory_may_hold_are_said_to_be_lost(tmp_path, file_limit, monkeypatch, capsys):
    monkeypatch.setattr(record, "MOST_WAITING", 4)
    recorder = started(tmp_path, 0, steps=9)
    file_limit(0)
    for number in range(1, 8):
        recorder.step_ended(step(number))
    file_limit(None)
    recorder.ended()
    assert [*recorder.record.lines()] == [step(number) for number in (5, 6, 7)]
    assert capsys.readouterr().err.count("2 lines that waited are lost\n") == 2
    started(tmp_path, 7)
    assert "metrics.jsonl has no line of 4 of 7 steps, from step 1 to 4" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- damage


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"0.5")] ^= 1  # a number that is as good as the right one
    file.write_bytes(content)


HARM = {
    "flipped": flip,
    "no JSON": lambda file: file.write_text("?" + file.read_text()),
    "cut": lambda file: os.truncate(file, 50),
    "cut at a line": lambda file: file.write_text(file.read_text().splitlines(keepends=True)[0]),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": lambda file: file.unlink(),
    "of another run": lambda file: file.write_text('{"step": 1, "loss": 0.25}\n{"step": 2, "loss": 0.25}\n'),
    "bytes that are no text": lambda file: file.write_bytes(b"\xff\xfe\n" + file.read_bytes()),
}


def with_checkpoint(folder):
    """A record of three steps, and its copy in a checkpoint of step 2."""
    recorder = started(folder, 0)
    for number in (1, 2, 3):
        recorder.step_ended(step(number))
        if number == 2:
            recorder.evaluated(evaluation(2))
            (folder / "checkpoint").mkdir()
            recorder.record.copy_to(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_record_is_taken_from_the_checkpoint(harm, tmp_path, capsys):
    checkpoint = with_checkpoint(tmp_path)
    HARM[harm](tmp_path / "metrics.jsonl")
    recorder = started(tmp_path, 2, checkpoint=checkpoint)
    assert [*recorder.record.lines()] == [step(1), step(2), evaluation(2)]
    (said,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/metrics.jsonl is damaged (" in said and f"its lines are taken from {checkpoint}" in said


def test_a_whole_record_is_kept_in_silence(tmp_path, capsys):
    """Also one that has more than the copy: lines that waited while the checkpoint was saved."""
    checkpoint = with_checkpoint(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lo')
    for copy in (checkpoint, None):
        recorder = started(tmp_path, 2, checkpoint=copy)
        assert [*recorder.record.lines()] == [step(1), step(2), evaluation(2)] and capsys.readouterr().out == ""
    (shorter := tmp_path / "shorter").mkdir()
    started(shorter, 0).step_ended(step(1))
    Record(shorter).copy_to(checkpoint)
    assert len([*started(tmp_path, 2, checkpoint=checkpoint).record.lines()]) == 3 and capsys.readouterr().out == ""


def test_a_damaged_record_without_a_copy_is_kept_as_far_as_it_is_whole(tmp_path, capsys):
    """The checkpoints of an older version have no copy."""
    recorder = started(tmp_path, 0)
    for number in (1, 2, 3):
        recorder.step_ended(step(number))
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(texts[0] + "x" + "".join(texts[1:]))
    assert [*recorder.record.lines()] == [step(1)], "readers stop at the damage"
    started(tmp_path, 3)
    assert capsys.readouterr().out.splitlines() == [
        f"dpo_ds: {tmp_path}/metrics.jsonl is damaged (line 2 cannot be read): what comes after that is lost, and the "
        "run goes on",
        f"dpo_ds: {tmp_path}/metrics.jsonl has no line of 2 of 3 steps, from step 2 to 3",
    ]
