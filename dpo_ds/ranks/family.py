"""The processes around this one, from /proc: who started it, what they started, and which signals a process catches.

Without /proc nothing is found, and so nothing is watched.
"""

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl.h
PARENT, STARTED = 1, 19  # fields of /proc/PID/stat, counted from the state


@dataclass(frozen=True)
class Process:
    """A process. Its id may be used again later, but not with the same start."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[STARTED] == self.started

    @property
    def stopped(self) -> bool:
        """Whether it was stopped, as by SIGSTOP."""
        found = _stat(self.pid)
        return found is not None and found[0] in "Tt"


def process(pid: int) -> Process | None:
    """The process with this id; None if there is none."""
    found = _stat(pid)
    return None if found is None else Process(pid, found[STARTED])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on. The name before it may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def words_of(pid: int) -> list[str]:
    """A process's command line; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def launchers() -> list[Process]:
    """The processes that started this one as a rank, its parent first: their command lines end with this one's.

    A shell from which a run was started is none, so a run outlives it, as with nohup.
    """
    own = sys.argv[1:]
    if own and own[0].startswith("--local_rank="):  # DeepSpeed's launch.py puts it there
        own = own[1:]
    found: list[Process] = []
    pid = os.getppid()
    while own and pid > 1 and words_of(pid)[-len(own) :] == own:
        parent, fields = process(pid), _stat(pid)
        if parent is None or fields is None:
            break
        found.append(parent)
        pid = int(fields[PARENT])
    return found


def command() -> str:
    """The command line that started this run, as a user would type it."""
    pids = [os.getpid(), *(launcher.pid for launcher in launchers())]
    words = words_of(pids[-1]) or sys.argv
    if Path(words[0]).name.startswith("python"):
        rest = [word for word in words[1:2] if word != "-u"] + words[2:]
        script = rest and not rest[0].endswith(".py") and os.access(rest[0], os.X_OK)
        words = [Path(rest[0]).name, *rest[1:]] if script else ["python", *rest]
    return shlex.join(words)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def descendants() -> list[int]:
    """The ids of all processes that this one has started, and of those that they have started, parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(folder.name))) is not None:
            children.setdefault(int(fields[PARENT]), []).append(int(folder.name))
    found, upcoming = [], [os.getpid()]
    while upcoming:
        below = children.get(upcoming.pop(), [])
        found += below
        upcoming += below
    return found


def send(pid: int, number: int) -> None:
    """Sends a signal. A process that has ended meanwhile, or is another user's, gets none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def adopt_orphans() -> None:
    """Makes this process the parent of all processes below it whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: int, parent: int) -> None:
    """Makes the kernel send this process a signal when its parent ends. parent: its id when this one was started."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), number)


@functools.cache  # once is enough
def forks_end_with_parent() -> None:
    """Likewise for every process that this one forks in its main thread, and for theirs, with SIGKILL: the kernel's
    setting is not inherited. It is about the thread that forks, and other threads may end earlier."""
    parents: list[int] = []

    def before() -> None:
        main = threading.current_thread() is threading.main_thread()
        parents[:] = [os.getpid()] if main else []

    def in_child() -> None:
        if parents:
            end_with_parent(signal.SIGKILL, parents[0])

    os.register_at_fork(before=before, after_in_child=in_child)


def _prctl(what: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(what, value)
