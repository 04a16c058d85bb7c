"""Manifests: every file is read by one rank, and every change of a file is seen."""

import json
import os

import pytest

from dpo_ds.checksums import is_sealed, sealed
from dpo_ds.errors import SaveFailed
from dpo_ds.runs.manifest import difference, measure, share

KINDS = ("state", "reference", "random")
SIXTEEN = [f"{kind}-{rank}.safetensors" for rank in range(16) for kind in KINDS]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "states").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "random-0.safetensors").write_bytes(b"random")
    (tmp_path / "empty").touch()
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_each_file_is_read_by_one_rank(ranks):
    sizes = {name: 1 + n % 7 for n, name in enumerate([*SIXTEEN, *"abcdefgh"])}
    shares = [share(sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    assert all(share(dict(reversed(sizes.items())), rank, ranks) == names for rank, names in enumerate(shares))


def test_a_rank_reads_its_own_files():
    for rank in range(16):
        assert set(share(dict.fromkeys(SIXTEEN, 5), rank, 16)) == {f"{kind}-{rank}.safetensors" for kind in KINDS}


def test_what_was_measured_while_it_was_written_is_not_read_again(folder):
    known = {"part/states": {"bytes": 3, "xxh3_128": "as it was written"}}
    files = measure(folder, folder, known)
    assert files["part/states"] == known["part/states"] and files["empty"] == measure(folder, folder)["empty"]


def test_files_without_a_number_fill_up_the_ranks_with_the_fewest_bytes():
    sizes = {"random-0.safetensors": 10, "random-1.safetensors": 1, "large": 12, "small": 2}
    assert [set(share(sizes, rank, 2)) for rank in (0, 1)] == [
        {"random-0.safetensors", "small"},
        {"random-1.safetensors", "large"},
    ]


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: flip(f / "part/states"), "part/states does not match its checksum"),
        (
            lambda f: os.truncate(f / "part/states", 7),
            "part/states has 7 bytes instead of 1,280,000",
        ),
        (lambda f: (f / "empty").write_text("x"), "empty has 1 bytes instead of 0"),
        (lambda f: (f / "random-0.safetensors").unlink(), "random-0.safetensors is missing"),
        (
            lambda f: ((f / "random-0.safetensors").unlink(), (f / "random-0.safetensors").mkdir()),
            "random-0.safetensors ",
        ),
    ],
)
def test_a_change_is_named(harm, said, folder):
    files = measure(folder, folder)
    assert difference(folder, files) is None
    (folder / "notes.txt").write_text("a file that somebody put here")
    assert difference(folder, files) is None
    harm(folder)
    assert difference(folder, files).startswith(said)


def test_a_file_that_cannot_be_read_is_a_failed_save(tmp_path):
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "file").write_text("x")
    assert list(measure(tmp_path, tmp_path)) == ["file"]
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "file").chmod(0)
        with pytest.raises(SaveFailed, match="final was not saved: Permission denied"):
            measure(tmp_path, tmp_path.with_name("final"))


def test_a_record_has_its_own_checksum():
    record = sealed({"step": 4, "loss": float("nan"), "options": {"rate": 1e-7, "name": "é", "none": None}})
    read = json.loads(json.dumps(record, indent=1))
    assert is_sealed(read)
    assert not is_sealed(read | {"step": 6})
    assert not is_sealed({key: value for key, value in read.items() if key != "loss"})
    assert not is_sealed({key: value for key, value in read.items() if key != "checksum"})
