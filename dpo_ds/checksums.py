"""Checksums of files and of records: xxh3_128, which a core computes faster than a disk reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

BLOCK = 16 << 20  # bytes that are read at a time
CHECKSUM = "checksum"  # the key of a record's own checksum

Files = dict[str, dict]  # of a file's path within a folder: {"bytes": its size, "xxh3_128": its checksum}


def measured(folder: Path, names: Iterable[str]) -> Files:
    """The sizes and checksums of some of a folder's files. Raises OSError."""
    return {name: {"bytes": os.path.getsize(folder / name), "xxh3_128": checksum(folder / name)} for name in names}


def difference(folder: Path, files: Files, names: Iterable[str]) -> str | None:
    """How these files of the folder differ from `files`, in words; None if they do not. Sizes come first."""
    names = list(names)
    try:
        for name in names:
            if (size := os.path.getsize(folder / name)) != files[name]["bytes"]:
                return f"{name} has {size:,} bytes instead of {files[name]['bytes']:,}"
        for name in names:
            if checksum(folder / name) != files[name]["xxh3_128"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def checksum(file: Path) -> str:
    """The xxh3_128 of a file's content, in hex."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as opened:
        while read := opened.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def of_bytes(content: bytes) -> str:
    """The xxh3_128 of bytes, in hex."""
    return xxhash.xxh3_128(content).hexdigest()


def sealed(record: dict) -> dict:
    """The record, which JSON can hold, with its own checksum."""
    return {**record, CHECKSUM: _of(record)}


def is_sealed(record: dict) -> bool:
    """Whether a record that was read back is as `sealed` made it."""
    return record.get(CHECKSUM) == _of({key: value for key, value in record.items() if key != CHECKSUM})


def _of(record: dict) -> str:
    return of_bytes(json.dumps(record, sort_keys=True).encode())
