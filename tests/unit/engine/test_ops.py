"""Turns at building DeepSpeed's ops, and damage to what was built, without building any."""

import errno
import os

import pytest
from filelock import FileLock

from dpo_ds.engine import ops


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("FileSystem does not appear to support flock"), "its file system has none"),
        (OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), os.strerror(errno.ENOLCK)),
    ],
)
def test_a_folder_without_locks_is_reported_once(error, reason, tmp_path, monkeypatch, capsys):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    done = []
    for op in ("cpu_adam", "async_io"):
        with ops._turn(tmp_path / op, speaks=True):
            done.append(op)
    with ops._turn(tmp_path / "another_rank" / "cpu_adam", speaks=False):
        done.append("cpu_adam of a rank that does not speak")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dpo_ds: no file lock can be taken in {tmp_path} ({reason}): ")
    assert ops.FOLDER in line and len(done) == 3, "the build goes on without a lock"


HARM = {
    "flipped": (lambda file: file.write_bytes(b"op of cpu_adan"), "does not match its checksum"),
    "cut": (lambda file: file.write_bytes(b"op of"), "has 5 bytes instead of 14"),
    "emptied": (lambda file: file.write_bytes(b""), "has 0 bytes instead of 14"),
    "deleted": (lambda file: file.unlink(), "is missing"),
}


@pytest.fixture
def compiled(tmp_path):
    (tmp_path / "cpu_adam.so").write_bytes(b"op of cpu_adam")
    (tmp_path / "cpu_adam.o").write_bytes(b"object")
    ops._keep_checksums(tmp_path)
    return tmp_path


def test_an_op_that_was_compiled_again_is_whole(compiled, capsys):
    """ninja compiles an op again if its command has changed, without a word."""
    (compiled / "cpu_adam.so").write_bytes(b"op of another compiler")
    ops._keep_checksums(compiled)
    ops._remove_damaged(compiled, speaks=True)
    assert (compiled / "cpu_adam.so").exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_op_is_removed_and_named(harm, compiled, capsys):
    ops._remove_damaged(compiled, speaks=True)
    assert len([*compiled.iterdir()]) == 3 and capsys.readouterr().err == ""
    change, reason = HARM[harm]
    change(compiled / "cpu_adam.so")
    ops._remove_damaged(compiled, speaks=True)
    assert [*compiled.iterdir()] == []
    assert capsys.readouterr().err == (
        f"dpo_ds: the compiled op in {compiled} is damaged (cpu_adam.so {reason}): it is compiled again\n"
    )


def test_an_op_without_checksums_is_loaded(compiled, capsys):
    """An older version kept none, and what is damaged may be the checksums."""
    for harm in (lambda: (compiled / ops.CHECKSUMS).unlink(), lambda: (compiled / ops.CHECKSUMS).write_text("[")):
        harm()
        ops._remove_damaged(compiled, speaks=True)
        assert (compiled / "cpu_adam.so").is_file() and capsys.readouterr().err == ""
        ops._keep_checksums(compiled)
        assert ops._checksums(compiled)
