"""Writing files and folders so that they are never incomplete, moving damaged ones aside, and hashing files."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from dpo_ds.checksums import is_sealed, sealed
from dpo_ds.errors import MAKE_ROOM, RunStopped, SaveFailed, one_line, reason_of

TEMPORARY = ".tmp"  # ends the name under which write_whole writes


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it, so that it is never incomplete."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk leaves an empty file
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = error.filename or str(path)  # a write names none
        raise


def read_object(path: Path) -> dict:
    """Reads a JSON object. Raises ValueError, with the reason, if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


@contextlib.contextmanager
def saving(final: Path) -> Iterator[None]:
    """Turns what writing raises inside the block into SaveFailed. final: what was to be saved."""
    try:
        yield
    except SaveFailed:
        raise
    except Exception as error:
        if (reason := _why_not_written(error)) is None:
            raise
        raise SaveFailed(f"{final} was not saved: {reason}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what writing raises inside the block into RunStopped, with the remedy. path: what is written."""
    try:
        with saving(path):
            yield
    except SaveFailed as error:  # also one that was raised inside
        raise RunStopped(f"{error}; {MAKE_ROOM}") from error


def _why_not_written(error: Exception) -> str | None:
    """Why a library could not write a file, in words; None if it is another error."""
    if isinstance(error, OSError):
        return reason_of(error)
    if isinstance(error, SafetensorError):
        return one_line(error)
    # Of tokenizers, which has no type of its own for it: "No space left on device (os error 28)"
    return one_line(error) if re.search(r"\(os error \d+\)$", str(error)) else None


def in_words(size: float) -> str:
    """A number of bytes as a person reads it: 1.65 MB, 847 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    place = next((n for n in range(len(units) - 1) if size < 1000 ** (n + 1)), len(units) - 1)
    return f"{size / 1000**place:.3g} {units[place]}"


def sync_folders(folder: Path) -> None:
    """Syncs a folder's entries to the disk, and those of the folders in it. Files must have been synced before."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def move_aside(path: Path) -> Path:
    """Renames a damaged file or folder to NAME.damaged, or NAME.damaged-2, ... Returns the new path."""
    names = itertools.chain(["damaged"], (f"damaged-{number}" for number in itertools.count(2)))
    aside = next(p for name in names if not (p := path.with_name(f"{path.name}.{name}")).exists())
    path.rename(aside)
    return aside


SCRATCH = ".partial"


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Makes a new folder for this process and removes it at the end, unless it was renamed. Also removes the folders
    that killed processes of this host left in `parent`: a folder's name holds its process's host and id."""
    for left in parent.glob(f"*{SCRATCH}"):
        parts = left.name.split("@")
        if len(parts) != 4:
            continue
        _, host, pid, _ = parts
        if host == socket.gethostname() and pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{prefix}@{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex[:8]}{SCRATCH}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def follow_umask(path: Path) -> None:
    """Gives a file the mode that the umask gives a new file: some libraries make theirs readable by this user only."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content. The hub's cache names large files by this hash, so those need not be read."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    with open(real, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


SETTLED = 2.0  # seconds: two changes of a file within a file system's clock tick leave the same time


def remembered_sha256(path: Path, memory: Path) -> str:
    """Like sha256_of, and kept in the folder `memory`, so that large weights are read once."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    return remembered("sha256", path, memory, lambda: sha256_of(real))


def remembered(what: str, path: Path, memory: Path, read: Callable[[], str]) -> str:
    """What `read` says of a file, kept in the folder `memory` under the name `what`.

    The file is read again if anything about it changed: size, inode, the time of its content or of its attributes
    (which no program can set back). A file that was written a moment ago is not remembered, nor is one whose facts
    changed while it was read.
    """
    real = path.resolve()
    facts = _facts(real)
    # A record's name must not change, or large weights would be hashed again.
    ending = "" if what == "sha256" else f"-{what}"
    record = memory / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}{ending}.json"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if is_sealed(found) and found["facts"] == facts:
            return str(found[what])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # never written, or damaged
        pass
    said = read()
    if _facts(real) == facts and time.time() - max(facts["written"], facts["changed"]) / 1e9 > SETTLED:
        memory.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps(sealed({"path": str(real), "facts": facts, what: said})))
    return said


def _facts(path: Path) -> dict[str, int]:
    """What changes with a file, without reading it."""
    found = path.stat()
    return {
        "size": found.st_size,
        "device": found.st_dev,
        "inode": found.st_ino,
        "written": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
