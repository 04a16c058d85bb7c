"""DeepSpeed's compiled ops: a build that is killed, and one of another program, in a folder of their own."""

import contextlib
import subprocess
import sys
import time

import deepspeed
import launching
import pytest
import torch
from filelock import FileLock

from dpo_ds.engine import ops

# A rank alone on CPU: DeepSpeed compiles its shared-memory op.
JOIN = "from dpo_ds.engine import join; from dpo_ds.ranks import console; join.join(); console.leave()"
PLAIN = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Op; Op().load(verbose=False)"
ANOTHER = "another process builds in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        return ops.folder_of_versions() / "deepspeed_shm_comm"


def own(folder) -> dict:
    return {"TORCH_EXTENSIONS_DIR": str(folder.parent), "DS_ACCELERATOR": "cpu"}


@contextlib.contextmanager
def started(code: str, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**launching.environment(), **own(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what, process) -> None:
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until and process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_a_killed_build_is_done_anew(folder):
    """Only its process is killed, not the compilers that it began: the next run waits for these alone."""
    mark = folder / "lock"
    with started(JOIN, folder) as process:
        wait_for(mark.exists, process)
    assert mark.exists() and not list(folder.glob("*.so"))
    printed = launching.run(1, "-c", JOIN, **own(folder)).stdout
    assert "deepspeed_shm_comm is compiled for this machine" in printed
    assert list(folder.glob("*.so")) and not mark.exists()


def test_a_mark_that_was_left_holds_nobody_up(folder):
    """Negative control: it holds up DeepSpeed by itself."""
    (folder / "lock").touch()
    with started(PLAIN, folder) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=12)
    printed = launching.run(1, "-c", JOIN, **own(folder)).stdout
    assert "dpo_ds:" not in printed and not (folder / "lock").exists()


def test_another_programs_build_is_waited_for(folder):
    """A library is there already: the wait is told all the same, within a few seconds."""
    assert list(folder.glob("*.so"))
    with (folder / "lock").open("w"), started(JOIN, folder) as process:
        assert ANOTHER in process.stdout.readline()
        assert process.poll() is None and (folder / "lock").exists()
        (folder / "lock").unlink()
        assert process.wait(timeout=launching.HANGS) == 0, process.stdout.read()


def test_another_runs_turn_is_waited_for(folder):
    """The same for a run of dpo_ds that holds the kernel's lock."""
    with FileLock(folder / "dpo_ds.lock") as turn, started(JOIN, folder) as process:
        assert ANOTHER in process.stdout.readline()
        turn.release()
        assert process.wait(timeout=launching.HANGS) == 0, process.stdout.read()


def test_each_torch_and_deepspeed_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = ops.folder_of_versions()
    assert folder.parent == tmp_path and torch.__version__ in folder.name and deepspeed.__version__ in folder.name
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))  # as a child process finds it
    assert ops.folder_of_versions() == folder
