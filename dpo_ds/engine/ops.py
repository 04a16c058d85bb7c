"""DeepSpeed's compiled ops, built at their first use: by one process at a time, whatever is killed meanwhile.

torch marks a build by a file, `lock`, in the op's folder, and waits while it is there. A process that was killed leaves
it behind, and every later run would wait without end or word. So a lock of the kernel's, which goes with its holder,
decides here whose turn it is; a mark is then another program's, or of no one alive, and removed.
"""

import contextlib
import functools
import os
import sys
import time
from pathlib import Path

from filelock import FileLock


def build_in_turns(speaks: bool) -> None:
    """Has DeepSpeed load its ops so, in this process: to be called before it loads any, any number of times. The rank
    that speaks says on stderr what is compiled: DeepSpeed's own words at its start on stdout are not shown."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    plain = OpBuilder.jit_load
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def jit_load(self, verbose=True):
        from torch.utils.cpp_extension import _get_build_directory

        folder = Path(_get_build_directory(self.name, verbose=False))
        if speaks and not any(folder.glob("*.so")):
            _tell(f"DeepSpeed's {self.name} is compiled for this machine, once: up to some minutes ({folder})")
        with contextlib.ExitStack() as turn:
            with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks: torch's mark alone
                turn.enter_context(FileLock(folder / "dpo_ds.lock"))
            _await_others(folder)
            return plain(self, verbose)

    OpBuilder.jit_load = jit_load


def _await_others(folder: Path) -> None:
    """Until no process builds there; one that was killed does not."""
    mark = folder / "lock"
    told = False
    while mark.exists():
        if not _in_use(folder, mark):
            time.sleep(0.5)  # who is done closes the mark an instant before it removes it
            if not _in_use(folder, mark):
                mark.unlink(missing_ok=True)
                return
        if not told:
            _tell(f"another process builds in {folder}: waiting for it")
            told = True
        time.sleep(0.5)


def _tell(message: str) -> None:
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
