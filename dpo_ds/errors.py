"""Whose fault it is: the user's, who can put it right; nobody's, but the run cannot go on; or else it is a bug."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """What the user can get wrong, with the remedy: one line, no traceback, exit code 2. Raised where it is seen."""


class RunStopped(Exception):
    """A run that cannot go on, for a reason that a traceback would not show: one line, exit code 1."""


def one_line(error: BaseException, most: int = 300) -> str:
    """A library's words, in one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextlib.contextmanager
def files_of(option: str, path: Path | str) -> Iterator[None]:
    """Within it, a file that cannot be read or written is the user's to put right: `option` named where it lies."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        raise UserError(
            f"{option} {path}: {error.strerror or one_line(error)}{where}; name a place that can be read and written"
        ) from error
