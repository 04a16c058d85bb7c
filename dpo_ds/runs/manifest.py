"""What a folder holds: each file's size and checksum, measured and compared by all ranks together.

Each rank reads a share of the files: those with its number in their name, and some of the others. The checksum is
xxh3_128, which a core computes faster than a disk reads.
"""

import json
import os
import re
from pathlib import Path

import xxhash

from dpo_ds.files import saving
from dpo_ds.ranks import collectives, world

BLOCK = 16 << 20  # bytes that are read at a time
CHECKSUM = "checksum"  # the key of a record's own checksum
# random-0.safetensors, zero_pp_rank_0_mp_rank_00_optim_states.pt, offloaded_tensors/rank00/0.tensor.swp
NUMBERED = re.compile(r"(?:zero_pp_rank_|offloaded_tensors/rank|random-|reference-)(\d+)")

Files = dict[str, dict]  # of a file's path within the folder: {"bytes": its size, "xxh3_128": its checksum}


def measure(folder: Path, final: Path) -> Files:
    """Measures all files of a folder, and syncs them to the disk. All ranks call it together.

    final: the folder's name in messages. Raises SaveFailed, on every rank, if a file cannot be synced or read.
    """
    here = world.from_environment()
    sizes = collectives.on_rank_0(lambda: _sizes(folder, final))
    own = share(sizes, here.rank, here.size)
    measured = collectives.together(lambda: _measure(folder, own, final))
    found = {name: facts for files in measured for name, facts in files.items()}
    return {name: found[name] for name in sizes}


def difference(folder: Path, files: Files) -> str | None:
    """How this rank's share of the folder's files differs from `files`; None if it does not."""
    here = world.from_environment()
    own = share({name: facts["bytes"] for name, facts in files.items()}, here.rank, here.size)
    try:
        for name in own:
            if (size := os.path.getsize(folder / name)) != files[name]["bytes"]:
                return f"{name} has {size:,} bytes instead of {files[name]['bytes']:,}"
        for name in own:
            if checksum(folder / name) != files[name]["xxh3_128"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


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


def checksum(file: Path) -> str:
    """The xxh3_128 of a file's content, in hex."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as opened:
        while read := opened.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def sealed(record: dict) -> dict:
    """The record, which JSON can hold, with its own checksum."""
    return {**record, CHECKSUM: _of(record)}


def is_sealed(record: dict) -> bool:
    """Whether a record that was read back is as `sealed` made it."""
    return record.get(CHECKSUM) == _of({key: value for key, value in record.items() if key != CHECKSUM})


def _of(record: dict) -> str:
    return xxhash.xxh3_128(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sizes(folder: Path, final: Path) -> dict[str, int]:
    with saving(final):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _measure(folder: Path, names: list[str], final: Path) -> Files:
    found = {}
    with saving(final):
        for name in names:
            with open(folder / name, "rb") as opened:
                os.fsync(opened.fileno())
            found[name] = {"bytes": os.path.getsize(folder / name), "xxh3_128": checksum(folder / name)}
    return found
