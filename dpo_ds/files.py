"""Writing files and folders so that they are never incomplete, and hashing them."""

import contextlib
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it, so that it is never incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
