"""The run's folder: what counts as a checkpoint, what a start that was killed early leaves, and who holds the lock."""

import json
import signal
import subprocess
import sys

import launching
import pytest

from dpo_ds.checksums import sealed
from dpo_ds.config import Options
from dpo_ds.errors import SaveFailed, UserError
from dpo_ds.files import in_words, move_aside, saving, write_whole
from dpo_ds.runs import folders, shared
from dpo_ds.runs.folders import check_folder, checkpoints, damage, half_saved, hash_of, newest_whole
from dpo_ds.runs.lock import LEFT_EARLY, Lock
from dpo_ds.runs.manifest import measure

HOLD = """
import sys, time
from pathlib import Path
from dpo_ds.runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(600)
"""


def checkpoint(folder, number, run="this", **facts):
    """A checkpoint as far as its manifest goes."""
    place = folders.checkpoint_folder(folder, number)
    place.mkdir(parents=True)
    (place / "random-0.safetensors").write_text(f"of step {number}")
    rest = {"ranks": 1, "stage": 0, "options": {}, "losses": {}, "counts": {}, "run": run, "identity": {}}
    rest["files"] = measure(place, place)
    write_whole(place / "checkpoint.json", json.dumps(sealed({"step": number, **rest, **facts})))
    return place


def test_only_the_runs_own_names_are_checkpoints(tmp_path):
    folder = tmp_path / "run.partial"
    steps = [checkpoint(folder, step) for step in (1_000_000, 8, 12)]
    names = ["step-000008.bak", "step-000020.partial", "step-000020.damaged", "step-20", "best", "step-00002x"]
    for name in names:
        (folder / "checkpoints" / name).mkdir()
    (folder / "checkpoints" / "step-000030").touch()  # a file
    assert checkpoints(folder) == [steps[1], steps[2], steps[0]]
    assert [path.name for path in half_saved(folder)] == ["step-000020.partial"]
    assert newest_whole(folder, "this") == (steps[0], [])
    assert checkpoints(tmp_path / "nothing") == [] and newest_whole(tmp_path / "nothing", "this") == (None, [])


def test_damage_is_said_in_one_line(tmp_path, capsys):
    first, second, third = (checkpoint(tmp_path, step, run) for step, run in [(1, "this"), (2, "this"), (3, "that")])
    (second / "random-0.safetensors").write_text("of step 9")
    assert newest_whole(tmp_path, "this") == (first, [third, second])
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"dpo_ds: {third} cannot be used: it belongs to another run",
        f"dpo_ds: {second} cannot be used: random-0.safetensors does not match its checksum",
    ]
    assert damage(third, run=None) is None
    (first / "checkpoint.json").write_text("[]")
    with pytest.raises(UserError, match=r"can be used \(step-000003: it belongs to another run\): put"):
        newest_whole(tmp_path, "this")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"step": 5}, "checkpoint.json is of step 5"),
        ({"files": 3}, "checkpoint.json's list of files cannot be read"),
        ({"stage": "x", "files": {}}, None),
    ],
)
def test_a_checkpoint_json_that_contradicts_itself(facts, said, tmp_path):
    assert damage(checkpoint(tmp_path, 4, **facts), "this") == said


def test_the_runs_hash_knows_no_new_options(tmp_path):
    assert hash_of({"a": 1, "b": None}) == hash_of({"a": 1}) != hash_of({"a": 2})


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    place = checkpoint(tmp_path, 4)
    facts = json.loads((place / "checkpoint.json").read_text())
    del facts["counts"], facts["checksum"]
    (place / "checkpoint.json").write_text(json.dumps(sealed(facts)))
    assert damage(place, "this") == "checkpoint.json has no counts: another version of dpo_ds wrote it"


@pytest.mark.parametrize("name", [*sorted(LEFT_EARLY), f"{shared.MARK}1"])
def test_what_a_start_leaves_that_was_ended_early_blocks_nothing(name, tmp_path):
    (tmp_path / name).touch()
    check_folder(tmp_path, Options(model="x"))
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(UserError, match="holds files of something else"):
        check_folder(tmp_path, Options(model="x"))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(signal_number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], env=launching.environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    (tmp_path / "run.json").write_text("{}")
    for refused in (Lock(tmp_path).require_free, Lock(tmp_path).take):
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on .* since 2.*: wait until"):
            refused()
    with pytest.raises(UserError, match="is in use by"):
        check_folder(tmp_path, Options(model="x"))
    (tmp_path / "running.json").write_text("{")
    with pytest.raises(UserError, match="is in use by another process:"):
        Lock(tmp_path).take()
    process.send_signal(signal_number)
    process.wait()
    process.stdout.close()
    lock = Lock(tmp_path)
    lock.take()
    Lock(tmp_path).take()  # the same process may start a run again
    lock.require_free()
    assert lock.file.is_locked
    lock.release()
    assert not lock.file.is_locked


def test_what_is_moved_aside_keeps_its_content(tmp_path):
    for text in ("one", "two", "three"):
        (tmp_path / "step-000004").mkdir()
        (tmp_path / "step-000004" / "file").write_text(text)
        aside = move_aside(tmp_path / "step-000004")
        assert (aside / "file").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000004.damaged{n}" for n in ("", "-2", "-3")]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(SaveFailed, match="was not saved: Is a directory"), saving(tmp_path / "run.json"):
        write_whole(tmp_path / "run.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_bytes_in_words():
    sizes = {0: "0 bytes", 999: "999 bytes", 1650: "1.65 kB", 847e9: "847 GB", 2.5e15: "2.5e+03 TB"}
    assert {size: in_words(size) for size in sizes} == sizes
