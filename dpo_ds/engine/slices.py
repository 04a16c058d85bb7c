"""Slices of tensors in files, which any number of ranks can read.

Each rank writes the numbers that it holds into one safetensors file, one slice after another. The file's header says
where each slice starts in its flattened tensor. A reader maps all ranks' files into memory and copies the numbers that
it wants. So the numbers may be divided in one way when they are written and in another when they are read.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from dpo_ds.errors import UserError, one_line

CHUNK = 1 << 24  # numbers that are copied from a device and written at a time
# The names of dtypes in a safetensors file.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
NOTE = "slices"  # the key of the header's metadata under which a file describes its slices


@dataclass(frozen=True)
class Slice:
    """Which numbers of a tensor a rank holds: `length` of them from `start` on, once the tensor is flattened."""

    name: str
    shape: tuple[int, ...]  # the whole tensor's
    start: int
    length: int
    dtype: torch.dtype


def held_of(parameter: Any, rank: int) -> tuple[int, int]:
    """From where on, and how many of a flattened parameter's numbers the rank holds.

    ZeRO-3 gives each rank equally many, so the last ranks' tensors may be longer. What follows the parameter's numbers
    there is memory that nobody has written: any number, NaN too.
    """
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    start = parameter.partition_numel() * rank
    return start, max(0, min(parameter.partition_numel(), parameter.ds_numel - start))


def write(file: Path, slices: Sequence[Slice], numbers: Iterable[torch.Tensor], note: dict[str, Any]) -> dict:
    """Writes one rank's file and syncs it to the disk. Returns its size and checksum, as a manifest has them.

    numbers: the slices' numbers, in their order, on any device. Only one tensor of them is needed at a time.
    note: what else the file says, in words that JSON has. Raises OSError.
    """
    # safetensors' own save_file wants all tensors in memory at once, and the checksum would need a second reading.
    assert len({part.name for part in slices}) == len(slices), "a rank holds one slice of a tensor"
    entries: dict[str, Any] = {"__metadata__": {NOTE: json.dumps({**note, NOTE: _described(slices)})}}
    end = 0
    for part in slices:
        begin, end = end, end + part.length * part.dtype.itemsize
        entries[part.name] = {"dtype": DTYPES[part.dtype], "shape": [part.length], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with open(file, "wb") as opened:
        for block in _blocks(header, slices, numbers):
            opened.write(block)
            digest.update(block)
            size += len(block)
        opened.flush()
        os.fsync(opened.fileno())
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _described(slices: Sequence[Slice]) -> dict[str, list]:
    return {part.name: [part.start, list(part.shape)] for part in slices}


def _blocks(header: bytes, slices: Sequence[Slice], numbers: Iterable[torch.Tensor]):
    yield len(header).to_bytes(8, "little")
    yield header
    for part, tensor in zip(slices, numbers, strict=True):
        assert tensor.numel() == part.length and tensor.dtype == part.dtype, part
        for chunk in tensor.detach().reshape(-1).split(CHUNK):
            yield memoryview(chunk.cpu().contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True)
class _Part:
    """A slice within a file."""

    start: int
    stop: int
    file: Any  # what safe_open returned
    path: Path


class SliceReader:
    """What the ranks wrote into a folder's files PREFIX-0.safetensors, PREFIX-1.safetensors, ...

    Raises UserError if a file is damaged.
    """

    def __init__(self, folder: Path, prefix: str):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the whole tensors, by name
        self.notes: list[dict[str, Any]] = []  # of each file
        self._parts: dict[str, list[_Part]] = {}
        for path in sorted(folder.glob(f"{prefix}-*.safetensors")):
            with _damage_named(path):
                file: Any = safe_open(path, framework="pt")
                note = json.loads(file.metadata()[NOTE])
                described = note.pop(NOTE)
                for name in file.keys():
                    start, shape = described[name]
                    length = file.get_slice(name).get_shape()[0]
                    self.shapes[name] = tuple(shape)
                    self._parts.setdefault(name, []).append(_Part(start, start + length, file, path))
            self.notes.append(note)
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.start)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read_into(self, out: torch.Tensor, name: str, start: int = 0) -> None:
        """Copies numbers from `start` on into a one-dimensional tensor, until it is full.

        Raises UserError if the files lack some of them.
        """
        position, end = start, start + len(out)
        for part in self._parts.get(name, []):
            if part.start <= position < min(part.stop, end):
                stop = min(part.stop, end)
                with _damage_named(part.path):
                    numbers = part.file.get_slice(name)[position - part.start : stop - part.start]
                out[position - start : stop - start].copy_(numbers)
                position = stop
        if position != end:
            raise UserError(f"{self.folder} holds {name} only in part, or not at all: take another checkpoint")

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own shape and dtype. Raises UserError if the files lack a part of it."""
        if name not in self:
            raise UserError(f"{self.folder} does not hold {name}: take another checkpoint")
        first = self._parts[name][0]
        out = torch.empty(self.shapes[name], dtype=first.file.get_slice(name)[:0].dtype)
        self.read_into(out.view(-1), name)
        return out


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what reading a damaged file raises inside the block into a UserError that names the file."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): take another checkpoint") from None
