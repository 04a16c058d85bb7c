"""run.json, the run's identity: it has its own checksum, and each checkpoint.json holds a copy.

A run cannot be told from another one without it, and chat templates may read the date in it. So where it is damaged or
gone, it is taken from a checkpoint; and where there is none, the folder is refused.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from dpo_ds.checksums import CHECKSUM, is_sealed, sealed
from dpo_ds.errors import UserError
from dpo_ds.files import read_object, write_whole
from dpo_ds.ranks import console

NAME, CHECKPOINT = "run.json", "checkpoint.json"
COPY = "identity"  # the key of the copy in checkpoint.json


def write(folder: Path, identity: dict) -> None:
    write_whole(folder / NAME, json.dumps(sealed(identity), indent=1))


def is_there(folder: Path, checkpoints: Iterable[Path]) -> bool:
    """Whether the folder is a run's. checkpoints: the run's own, oldest first."""
    return (folder / NAME).is_file() or any((path / CHECKPOINT).is_file() for path in checkpoints)


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
            found = _read(checkpoint / CHECKPOINT)[COPY]
        except (ValueError, KeyError):
            continue
        if speak:
            console.say(f"{folder / NAME} is damaged ({problem}): the copy in {checkpoint} is taken")
        return found
    raise UserError(
        f"{folder / NAME} is damaged ({problem}), and no checkpoint has a copy of it: name another folder, or remove "
        "this one to begin again"
    )


def _read(file: Path) -> dict:
    """A record without its checksum. Raises ValueError, with the reason. One of an older version has no checksum."""
    found = read_object(file)
    if CHECKSUM in found and not is_sealed(found):
        raise ValueError("it does not match its own checksum")
    return {key: value for key, value in found.items() if key != CHECKSUM}
