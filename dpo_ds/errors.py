"""The errors that end in one line: what the user can correct, and why a run must stop. All else is a bug."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's, with its remedy: one line, no traceback, exit code 2."""


class RunStopped(Exception):
    """A run cannot go on, for a reason that a traceback would not show: one line, exit code 1."""


class Nonsense(RunStopped):
    """A run's own figures show that it has ruined its weights, or cannot learn from its pairs."""


class SaveFailed(RunStopped):
    """A checkpoint or an export could not be written. A run may go on without the checkpoint."""


class Stopped(BaseException):
    """The run was asked to stop, and does: one line and an exit code of its own. It is no Exception, so that code which
    handles a library's errors lets it pass.

    alone: what asked this rank; None if all ranks stop together.
    """

    def __init__(self, text: str, code: int, alone: str | None = None):
        super().__init__(text)
        self.text, self.code, self.alone = text, code, alone


def one_line(said: BaseException | str, most: int | None = 300) -> str:
    """What a library or the user said, in one line of at most `most` characters. An error without words gives its
    type's name."""
    line = " ".join(str(said).split())[:most]
    return line or (type(said).__name__ if isinstance(said, BaseException) else "")


# Of an OSError: no room on the disk, or none that this user or process may take.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "free some space there or raise your limit (quota, ulimit -f), and give the same command again"


def reason_of(error: OSError) -> str:
    """Why a file could not be read or written, in a few words."""
    return error.strerror or one_line(error)


@contextlib.contextmanager
def said_of(option: str) -> Iterator[None]:
    """Makes a UserError about --model inside the block one about another option that names a model."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--model ", f"{option} ", 1)) from error


@contextlib.contextmanager
def files_of(option: str, path: Path | str) -> Iterator[None]:
    """Turns an OSError inside the block into a UserError that names `option` and the path."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        remedy = MAKE_ROOM if error.errno in FULL else "name a place that can be read and written"
        raise UserError(f"{option} {path}: {reason_of(error)}{where}; {remedy}") from error


def require_writable(option: str, folder: Path) -> None:
    """Raises UserError if a folder, or the nearest above it that exists, cannot be written to. Writes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "cannot be written to" if nearest.is_dir() else "is no folder"
        raise UserError(f"{option} {folder}: {nearest} {why}; name a place that can be read and written")
