"""run.json, the run's identity: it has its own checksum, and each checkpoint has a copy.

A run cannot be told from another one without it, and chat templates may read the date in it. So where it is damaged or
gone, it is taken from a checkpoint; and where there is none, the folder is refused.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from dpo_ds.checksums import CHECKSUM, is_sealed, sealed
from dpo_ds.errors import UserError, one_line
from dpo_ds.files import write_whole
from dpo_ds.ranks import console

NAME = "run.json"


def write(folder: Path, identity: dict) -> None:
    write_whole(folder / NAME, json.dumps(sealed(identity), indent=1))


def copy_to(folder: Path, checkpoint: Path) -> None:
    """Copies a run's file into one of its checkpoints. Raises OSError."""
    if (folder / NAME).is_file():  # a run that has claimed no folder has none
        shutil.copy(folder / NAME, checkpoint / NAME)


def is_there(folder: Path, checkpoints: Iterable[Path]) -> bool:
    """Whether the folder is a run's. checkpoints: the run's own, oldest first."""
    return (folder / NAME).is_file() or any((path / NAME).is_file() for path in checkpoints)


def read(folder: Path, checkpoints: Iterable[Path], speak: bool = True) -> dict:
    """A run's identity. Raises UserError if it is damaged and no checkpoint has a whole copy.

    speak: a line says if it is a copy.
    """
    try:
        return _read(folder / NAME)
    except ValueError as error:
        problem = str(error)
    for checkpoint in reversed([*checkpoints]):
        try:
            found = _read(checkpoint / NAME)
        except ValueError:
            continue
        if speak:
            console.say(f"{folder / NAME} is damaged ({problem}): the copy in {checkpoint} is taken")
        return found
    raise UserError(
        f"{folder / NAME} is damaged ({problem}), and no checkpoint has a copy of it: name another folder, or remove "
        "this one to begin again"
    )


def _read(file: Path) -> dict:
    """Raises ValueError, with the reason. A file of an older version has no checksum."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    if CHECKSUM in found and not is_sealed(found):
        raise ValueError("it does not match its own checksum")
    return {key: value for key, value in found.items() if key != CHECKSUM}
