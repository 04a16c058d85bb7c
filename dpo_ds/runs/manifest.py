"""What a folder holds: each file's size and checksum, measured and compared by all ranks together.

Each rank reads a share of the files: those with its number in their name, and some of the others.
"""

import os
import re
from pathlib import Path

from dpo_ds import checksums
from dpo_ds.checksums import Files
from dpo_ds.files import saving
from dpo_ds.ranks import collectives, world

NUMBERED = re.compile(r"(?:state|random|reference)-(\d+)\.safetensors")


def measure(folder: Path, final: Path, known: Files | None = None) -> Files:
    """Measures all files of a folder, and syncs them to the disk. All ranks call it together.

    final: the folder's name in messages. known: files that were measured and synced while they were written; these are
    not read again. Raises SaveFailed, on every rank, if a file cannot be synced or read.
    """
    here, found = world.from_environment(), dict(known or {})
    sizes = collectives.on_rank_0(lambda: _sizes(folder, final))
    own = share({name: size for name, size in sizes.items() if name not in found}, here.rank, here.size)
    for files in collectives.together(lambda: _measure(folder, own, final)):
        found |= files
    return {name: found[name] for name in sizes}


def difference(folder: Path, files: Files) -> str | None:
    """How this rank's share of the folder's files differs from `files`; None if it does not."""
    here = world.from_environment()
    own = share({name: facts["bytes"] for name, facts in files.items()}, here.rank, here.size)
    return checksums.difference(folder, files, own)


def size_of(files: Files) -> int:
    """How many bytes the files have together."""
    return sum(facts["bytes"] for facts in files.values())


def share(sizes: dict[str, int], rank: int, ranks: int) -> list[str]:
    """The files that a rank reads: those with its number, since it has written them and will load them; and the others,
    the largest first, each given to the rank with the fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    bytes_of = [0] * ranks
    for name in sorted(sizes, key=lambda name: (not NUMBERED.search(name), -sizes[name], name)):
        number = NUMBERED.search(name)
        taker = int(number[1]) % ranks if number else bytes_of.index(min(bytes_of))
        shares[taker].append(name)
        bytes_of[taker] += sizes[name]
    return shares[rank]


def _sizes(folder: Path, final: Path) -> dict[str, int]:
    with saving(final):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _measure(folder: Path, names: list[str], final: Path) -> Files:
    with saving(final):
        for name in names:
            with open(folder / name, "rb") as opened:
                os.fsync(opened.fileno())
        return checksums.measured(folder, names)
