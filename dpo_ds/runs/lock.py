"""The lock on a run's folder: two starts of one run would both write into it.

The kernel holds the lock for the process, and frees it when the process ends, however it ends. What running.json says
about that process only serves the message of a second start.
"""

import datetime
import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_ds.errors import UserError
from dpo_ds.files import TEMPORARY, write_whole
from dpo_ds.ranks import console

FILE, OWNER = "running.lock", "running.json"
# What a start that was killed early leaves in a folder that no run has claimed yet.
LEFT_EARLY = frozenset({FILE, OWNER, OWNER + TEMPORARY, "run.json" + TEMPORARY})


class Lock:
    """The lock on a folder, which rank 0 holds while it trains. Within one process it can be taken again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = FileLock(folder / FILE, is_singleton=True)

    def take(self) -> None:
        """Raises UserError if another process holds the lock. The folder must exist."""
        self._acquire()
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        write_whole(self.folder / OWNER, json.dumps(owner))

    def require_free(self) -> None:
        """Raises UserError if another process holds the lock now."""
        if (self.folder / FILE).is_file() and not self.file.is_locked:
            self._acquire()
            self.release()

    def release(self) -> None:
        """Frees the folder for other processes."""
        self.file.release(force=True)

    def _acquire(self) -> None:
        try:
            self.file.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"--output_dir {self.folder} is in use by {_owner(self.folder)}: wait until that run has ended or stop "
                "it, or name another folder"
            ) from None
        except (OSError, NotImplementedError) as error:  # as on some network file systems
            reason = getattr(error, "strerror", None) or "its file system has none"
            console.say(f"no file lock can be taken in {self.folder} ({reason}): start this run only once")


def _owner(folder: Path) -> str:
    """The process that running.json names."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
