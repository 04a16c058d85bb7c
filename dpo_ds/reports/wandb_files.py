"""Reads what W&B's files hold of a run that is not synced yet. W&B has no such reader in Python.

A file has a header of 7 bytes, then LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md):
blocks of 32 KiB with chunks of records, each a protocol buffer of wandb.proto.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK, CHUNK_HEADER = 7, 32768, 7  # bytes
WHOLE, LAST = 1, 4  # kinds of chunks that end a record


def last_step(folder: Path, run: str) -> int | None:
    """The last step that the offline files of the run hold, in the folder that W&B was given as `dir`; None without."""
    files = folder.glob(f"wandb/offline-run-*/run-{run}.wandb")
    rows = (record.history for file in files for record in records(file) if record.HasField("history"))
    return max((row.step.num for row in rows), default=None)


def records(file: Path) -> Iterator:
    """The records of a file, as wandb_internal_pb2.Record. A kill may have cut off the last one: it is left out."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, record = file.read_bytes(), HEADER, b""
    while at + CHUNK_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < CHUNK_HEADER or kind == 0:  # what follows in this block is empty
            at += left
            continue
        start, at = at + CHUNK_HEADER, at + CHUNK_HEADER + length
        if at > len(data):
            return
        record += data[start:at]
        if kind in (WHOLE, LAST):
            yield messages.Record.FromString(record)
            record = b""
