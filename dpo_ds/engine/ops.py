"""DeepSpeed's compiled ops, built at their first use: by one process at a time, whatever is killed meanwhile.

torch marks a build by a file, `lock`, in the op's folder, and waits while it is there. A process that was killed leaves
it behind, and every later run would wait without end or word. So a lock of the kernel's, which goes with its holder,
decides here whose turn it is. A leftover `lock` belongs to a live program or a dead one; it is deleted only if dead.
"""

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_ds.errors import files_of
from dpo_ds.ranks import console

FIRST_WORD, NEXT_WORD = 5.0, 30.0  # seconds of waiting for another process, until it is said, and said again
FOLDER = "TORCH_EXTENSIONS_DIR"


def build_in_turns(speaks: bool) -> None:
    """Has DeepSpeed load its ops so, in this process, each torch and DeepSpeed in a folder of its own.

    To be called before it loads any, any number of times. The rank that speaks says what is compiled and waited for.
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
        with _turn(folder, speaks):
            _await_others(folder, speaks)
            if any(folder.glob("*.so")):
                return plain(self, verbose)
            if speaks:
                _say(f"DeepSpeed's {self.name} is compiled for this machine, once: up to some minutes ({folder})")
            with console.working(f"compiling DeepSpeed's {self.name}"):
                return plain(self, verbose)

    OpBuilder.jit_load = jit_load


def folder_of_versions() -> Path:
    """Where ops are kept: torch's own folder, or TORCH_EXTENSIONS_DIR; within it, one for each torch and DeepSpeed."""
    import deepspeed
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get(FOLDER) or get_default_build_root())
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    versions = f"{python}-torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    return root if root.name == versions else root / versions  # a child process inherits the folder


@contextlib.contextmanager
def _turn(folder: Path, speaks: bool) -> Iterator[None]:
    """Holds the kernel's lock on a folder; on a file system without locks, nothing."""
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
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def _await_others(folder: Path, speaks: bool) -> None:
    """Until no other program builds there; one that was killed does not."""
    mark = folder / "lock"
    started = time.monotonic()
    next_word = FIRST_WORD
    while mark.exists():
        if not _in_use(folder, mark):
            time.sleep(0.5)  # who is done closes the mark an instant before it removes it
            if not _in_use(folder, mark):
                mark.unlink(missing_ok=True)
                return
        if speaks and time.monotonic() - started > next_word:
            _say_waiting(folder, started)
            next_word += NEXT_WORD
        time.sleep(0.5)


def _say_waiting(folder: Path, started: float) -> None:
    _say(f"another process builds in {folder}: waiting for it, {time.monotonic() - started:.0f} s so far")


def _say(message: str) -> None:
    """On stderr: what DeepSpeed prints on stdout while it starts is not shown."""
    print(f"dpo_ds: {message}", file=sys.stderr, flush=True)


def _in_use(folder: Path, mark: Path) -> bool:
    """Whether a process of this machine has torch's mark open, or works in the folder, as compilers do that outlive
    who began the build. Where there is no /proc to look into, whether the mark is there."""
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
