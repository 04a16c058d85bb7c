"""Hashes that are kept: a file is read once, and again as soon as anything about it changed."""

import os

import pytest

from dpo_ds import files
from dpo_ds.files import remembered_sha256, sha256_of


@pytest.fixture
def read(monkeypatch):
    """The files that were read."""
    plain, names = files.sha256_of, []
    monkeypatch.setattr(files, "sha256_of", lambda path: names.append(path.name) or plain(path))
    monkeypatch.setattr(files, "SETTLED", -1.0)
    return names


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights").write_bytes(b"one")
    return tmp_path / "weights"


def replaced(path):
    path.with_name("other").write_bytes(b"two")
    path.with_name("other").replace(path)


def longer(path):
    path.write_bytes(b"one and more")


def in_place(path):
    """The same size, inode and time, as `cp --preserve` leaves them."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, longer, in_place])
def test_a_file_is_read_again_once_it_changed(change, file, tmp_path, read):
    memory = tmp_path / "memory"
    first = [remembered_sha256(file, memory) for _ in range(3)]
    assert read == ["weights"] and set(first) == {sha256_of(file)}
    change(file)
    assert remembered_sha256(file, memory) == remembered_sha256(file, memory) == sha256_of(file) != first[0]
    assert read == ["weights"] * 2


def test_a_file_of_a_moment_ago_is_not_remembered(file, tmp_path, read, monkeypatch):
    """Another write within the same tick of the file system's clock would leave the same times."""
    monkeypatch.setattr(files, "SETTLED", 60.0)
    for _ in range(2):
        remembered_sha256(file, tmp_path / "memory")
    assert read == ["weights"] * 2 and not (tmp_path / "memory").exists()


def test_a_damaged_memory_is_not_believed(file, tmp_path, read):
    remembered_sha256(file, tmp_path / "memory")
    (record,) = (tmp_path / "memory").iterdir()
    record.write_text('{"facts')
    assert remembered_sha256(file, tmp_path / "memory") == sha256_of(file)
    assert read == ["weights"] * 2
