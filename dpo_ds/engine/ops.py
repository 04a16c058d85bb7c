"""Builds DeepSpeed's compiled ops at their first use, in one process at a time, even if a builder is killed.

While torch builds an op, a file `lock` lies in the op's folder, and other processes wait for its removal. A killed
process leaves the file behind, and every later run would wait for ever without a message. Therefore dpo_ds takes a file
lock of the kernel's first, which ends with its process. A `lock` file that no live process uses is then deleted.

A compiled op that was damaged would end the process that loads it, or compute something else. So its checksum is kept
beside it, and what does not match is compiled again.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_ds.checksums import Files, difference, is_sealed, measured, sealed
from dpo_ds.errors import UserError, files_of, one_line
from dpo_ds.files import write_whole
from dpo_ds.ranks import console

# Seconds of waiting for another process before the first message, and between later ones.
FIRST_WORD, NEXT_WORD = 5.0, 30.0
FOLDER = "TORCH_EXTENSIONS_DIR"
CHECKSUMS = "dpo_ds.json"  # in an op's folder


def build_in_turns(speaks: bool) -> None:
    """Makes DeepSpeed build its ops in turns, in a folder for these versions of torch and DeepSpeed.

    Call it before DeepSpeed loads an op; later calls change nothing. The rank that speaks reports builds and waits.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    plain = OpBuilder.jit_load
    if hasattr(plain, "__wrapped__"):
        return
    os.environ[FOLDER] = str(folder_of_versions())

    @functools.wraps(plain)
    def jit_load(self, verbose=True):
        folder = Path(os.environ[FOLDER], self.name)
        with files_of(FOLDER, folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        require_builder(self.name, folder)
        with _turn(folder, speaks):
            _await_others(folder, speaks)
            _remove_damaged(folder, speaks)
            with _said_of_compiler(self.name):
                if any(folder.glob("*.so")):
                    loaded = plain(self, verbose)
                else:
                    if speaks:
                        where = f"it can take minutes ({folder})"
                        _say(f"DeepSpeed's {self.name} is compiled for this machine, once; {where}")
                    with console.working(f"compiling DeepSpeed's {self.name}"):
                        loaded = plain(self, verbose)
            _keep_checksums(folder)
            return loaded

    OpBuilder.jit_load = jit_load


@contextlib.contextmanager
def _said_of_compiler(op: str) -> Iterator[None]:
    """Turns a compiler's failure into a UserError."""
    try:
        yield
    except (subprocess.CalledProcessError, RuntimeError) as error:
        compiler = os.environ.get("CXX", "c++")
        raise UserError(
            f"DeepSpeed's {op} cannot be compiled here with {compiler} ({one_line(error, 200)}): set CXX to a g++ that "
            "works"
        ) from error


def require_builder(op: str, folder: Path) -> None:
    """Raises UserError if an op cannot be built in its folder. For an op that is built, torch asks ninja whether it is
    up to date, and writes into the folder too."""
    from torch.utils.cpp_extension import is_ninja_available

    if not os.access(folder, os.W_OK):
        raise UserError(f"{FOLDER} {folder.parent} cannot be written to: name a place that can be read and written")
    if not is_ninja_available():
        raise UserError(f"DeepSpeed builds its {op} with ninja, which is not on PATH: run pip install ninja")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and not any(folder.glob("*.so")):
        raise UserError(f"DeepSpeed compiles its {op} with {compiler}, which is not installed: install g++, or set CXX")


def folder_of_versions() -> Path:
    """The folder for ops: in torch's own folder, or TORCH_EXTENSIONS_DIR, one for each torch and DeepSpeed version."""
    import deepspeed
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get(FOLDER) or get_default_build_root())
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    versions = f"{python}-torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    return root if root.name == versions else root / versions  # a child process inherits the folder


def _remove_damaged(folder: Path, speaks: bool) -> None:
    """Removes a compiled op, and what it was linked from, if it is not as its compiler left it."""
    files = _checksums(folder)
    if files and (problem := difference(folder, files, files)):
        if speaks:
            _say(f"the compiled op in {folder} is damaged ({problem}): it is compiled again")
        for file in (*folder.glob("*.so"), *folder.glob("*.o"), folder / CHECKSUMS):
            file.unlink(missing_ok=True)


def _keep_checksums(folder: Path) -> None:
    """Writes the checksums of the op that was compiled here. A folder that cannot be written keeps none.

    They were right before the op was loaded. So what differs now has been compiled again, by another compiler.
    """
    with contextlib.suppress(OSError):
        files = measured(folder, sorted(file.name for file in folder.glob("*.so")))
        if files and files != _checksums(folder):
            write_whole(folder / CHECKSUMS, json.dumps(sealed({"files": files})))


def _checksums(folder: Path) -> Files:
    """Nothing where none were kept, as by an older version, or where they are damaged themselves."""
    try:
        record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return record["files"] if is_sealed(record) else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


@contextlib.contextmanager
def _turn(folder: Path, speaks: bool) -> Iterator[None]:
    """Holds the kernel's lock on a folder. Where no lock can be taken, says so once and goes on without."""
    lock = FileLock(folder / "dpo_ds.lock")
    started = time.monotonic()
    try:
        for patience in itertools.chain([FIRST_WORD], itertools.repeat(NEXT_WORD)):
            try:
                lock.acquire(timeout=patience)
                break
            except Timeout:
                if speaks:
                    _say_waiting(folder, started)
    except (OSError, NotImplementedError) as error:  # as on some network file systems
        if speaks:
            _say_no_lock(folder.parent, getattr(error, "strerror", None) or "its file system has none")
    try:
        yield
    finally:
        lock.release()


def _await_others(folder: Path, speaks: bool) -> None:
    """Waits until no other process builds in the folder. Deletes the mark of a killed one."""
    mark = folder / "lock"
    started = time.monotonic()
    next_word = FIRST_WORD
    while mark.exists():
        if not _in_use(folder, mark):
            time.sleep(0.5)  # a finished process closes the mark just before it removes it
            if not _in_use(folder, mark):
                mark.unlink(missing_ok=True)
                return
        if speaks and time.monotonic() - started > next_word:
            _say_waiting(folder, started)
            next_word += NEXT_WORD
        time.sleep(0.5)


@functools.cache  # said once, not once for each op
def _say_no_lock(folder: Path, reason: str) -> None:
    _say(
        f"no file lock can be taken in {folder} ({reason}): two processes may compile the same op at the same time; "
        f"set {FOLDER} to a folder on a local disk"
    )


def _say_waiting(folder: Path, started: float) -> None:
    _say(f"another process builds in {folder}: waiting for it, {time.monotonic() - started:.0f} s so far")


def _say(message: str) -> None:
    """One line on stderr: stdout is redirected while DeepSpeed starts."""
    print(f"dpo_ds: {message}", file=sys.stderr, flush=True)


def _in_use(folder: Path, mark: Path) -> bool:
    """Whether a process of this machine has torch's mark open or works in the folder. A compiler may do so after the
    process that started it has ended. Without /proc, the mark counts as in use."""
    if not Path("/proc/self/fd").is_dir():
        return True
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.path.samefile(process / "cwd", folder):
                return True
            for file in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samefile(file, mark):
                        return True
    return False
