"""Whether all ranks see the same folder. Each writes its own part of a checkpoint, and of the exported model."""

import contextlib
import os
import socket
import uuid
from pathlib import Path

from dpo_ds.errors import UserError, files_of
from dpo_ds.ranks import collectives, world

MARK = ".dpo_ds-"  # begins the name of the file that is looked for


def require_shared(folder: Path, option: str = "--output_dir") -> None:
    """Raises UserError, on every rank, if a rank's folder (`option` names it) is another one than rank 0's. All ranks
    call it together. What it writes, it removes."""
    if world.from_environment().size == 1:
        return
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    name = f"{MARK}{uuid.uuid4().hex}"
    # A name that no rank has looked up before is not in a network file system's cache.
    mark = place / collectives.from_rank_0(name)
    with files_of(option, folder):
        collectives.on_rank_0(mark.touch)
    problem = None if mark.exists() else f"{socket.gethostname()} (rank {world.from_environment().rank})"
    first = collectives.first(problem)
    if world.from_environment().speaks:
        with contextlib.suppress(OSError):
            os.unlink(mark)
    if first is not None:
        raise UserError(
            f"{option} {folder} is another folder on {first} than on rank 0's host: name one on a file system that "
            "all nodes share"
        )
