"""Turns at building DeepSpeed's ops, without building any."""

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
