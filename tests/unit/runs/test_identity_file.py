"""run.json: damage is named; a checkpoint's copy takes its place, and without one the folder is refused."""

import json
import os

import pytest

from dpo_ds.checksums import sealed
from dpo_ds.config import Options
from dpo_ds.errors import UserError
from dpo_ds.runs import folders, identity_file

IDENTITY = {"model": "x", "seed": 42, "date": "2026-11-26", "files": {"--model": {"model.safetensors": "ab"}}}


@pytest.fixture
def folder(tmp_path):
    """A run with two checkpoints, of which the older one has a copy."""
    identity_file.write(tmp_path, IDENTITY)
    for step in (4, 8):
        folders.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    (folders.checkpoint_folder(tmp_path, 4) / "checkpoint.json").write_text(json.dumps(sealed({"identity": IDENTITY})))
    return tmp_path


def edit(file):
    """A byte that leaves JSON as good as any."""
    file.write_text(file.read_text().replace('"seed": 42', '"seed": 43'))


HARM = {
    "flipped": (edit, "it does not match its own checksum"),
    "cut": (lambda file: os.truncate(file, 40), "Unterminated string"),
    "emptied": (lambda file: os.truncate(file, 0), "Expecting value"),
    "deleted": (lambda file: file.unlink(), "missing"),
    "a list": (lambda file: file.write_text("[]"), "no JSON object"),
    "no text": (lambda file: file.write_bytes(b"\xff\xfe"), "invalid start byte"),
}


def test_a_whole_one_is_read_in_silence(folder, capsys):
    assert folders.read_record(folder) == IDENTITY and folders.started(folder) == "2026-11-26"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_one_is_taken_from_a_checkpoint(harm, folder, capsys):
    change, reason = HARM[harm]
    change(folder / "run.json")
    assert folders.started(folder) == "2026-11-26"
    folders.check_folder(folder, Options(model="x"))
    assert folders.read_record(folder) == IDENTITY
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"dpo_ds: {folder}/run.json is damaged (") and reason in said
    assert said.endswith(f"the copy in {folder}/checkpoints/step-000004 is taken")


@pytest.mark.parametrize("harm", HARM)
def test_without_a_copy_the_folder_is_refused(harm, folder):
    for file in (folder / "run.json", folders.checkpoint_folder(folder, 4) / "checkpoint.json"):
        HARM[harm][0](file)
    refusing = folders.check_folder if harm == "deleted" else lambda folder, _: folders.read_record(folder)
    with pytest.raises(UserError) as refused:
        refusing(folder, Options(model="x"))
    assert str(folder) in str(refused.value) and "name a" in str(refused.value)


def test_one_of_an_older_version_has_no_checksum(folder):
    (folder / "run.json").write_text(json.dumps(IDENTITY))
    assert folders.read_record(folder) == IDENTITY


def test_merged_of_another_run_is_noticed(tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    for run, said in (("this", None), ("other", "is another run's")):
        (tmp_path / "merged.json").write_text(json.dumps(sealed({"run": run, "files": {}})))
        assert folders.merged_damage(tmp_path, "this") == said
    assert capsys.readouterr().out == ""
    (tmp_path / "merged.json").unlink()
    assert folders.merged_damage(tmp_path, "this") is None
    assert f"{tmp_path}/merged has no merged.json: it cannot be verified" in capsys.readouterr().out
