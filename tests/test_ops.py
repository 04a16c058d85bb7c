"""DeepSpeed's compiled ops: a build that is killed, and one of another program, in a folder of their own."""

import contextlib
import subprocess
import sys
import time

import launching
import pytest

# A rank alone on CPU: DeepSpeed compiles its shared-memory op.
JOIN = "from dpo_ds.engine import join; from dpo_ds.ranks import console; join.join(); console.leave()"
PLAIN = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Op; Op().load(verbose=False)"
ANOTHER = "another process builds in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("extensions") / "deepspeed_shm_comm"


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
    printed = launching.run(1, "-c", JOIN, timeout=240, **own(folder)).stdout
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
    with (folder / "lock").open("w"), started(JOIN, folder) as process:
        assert ANOTHER in process.stdout.readline()
        time.sleep(1)
        assert process.poll() is None and (folder / "lock").exists()
        (folder / "lock").unlink()
        assert process.wait(timeout=60) == 0, process.stdout.read()
