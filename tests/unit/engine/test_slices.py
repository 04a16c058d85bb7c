"""Slices of tensors: what any number of ranks writes, any number of ranks reads back."""

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo_ds import checksums
from dpo_ds.engine.slices import Slice, SliceReader, write
from dpo_ds.errors import UserError

RANKS = 5
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


def cut(length: int, pieces: list[int]) -> list[tuple[int, int]]:
    """Divides a length at these places, in thousandths."""
    places = sorted({0, length, *(length * piece // 1000 for piece in pieces)})
    return list(itertools.pairwise(places))


def write_divided(folder, tensors: dict[str, torch.Tensor], divisions: list[list[int]], shift: int = 0) -> dict:
    """Each of a tensor's parts goes to another of five ranks, the first to the rank `shift`."""
    files: dict[int, list[tuple[Slice, torch.Tensor]]] = {rank: [] for rank in range(RANKS)}
    for (name, tensor), division in zip(tensors.items(), divisions, strict=True):
        for n, (start, stop) in enumerate(cut(tensor.numel(), division)):
            part = Slice(name, tuple(tensor.shape), start, stop - start, tensor.dtype)
            files[(n + shift) % RANKS].append((part, tensor.reshape(-1)[start:stop]))
    return {
        rank: write(folder / f"state-{rank}.safetensors", [s for s, _ in held], (t for _, t in held), {"of": rank})
        for rank, held in files.items()
    }


divisions = st.lists(st.integers(0, 1000), max_size=4)
shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, divisions, divisions), min_size=1, max_size=4), st.integers(0, 4))
def test_any_division_reads_what_any_other_wrote(tmp_path_factory, drawn, shift):
    folder = tmp_path_factory.mktemp("slices")
    tensors = {f"weight/{n}": torch.randn(shape) for n, (shape, _, _) in enumerate(drawn)}
    write_divided(folder, tensors, [written for _, written, _ in drawn], shift)
    reader = SliceReader(folder, "state")
    assert [note["of"] for note in reader.notes] == list(range(RANKS))
    for (name, tensor), (_, _, read) in zip(tensors.items(), drawn, strict=True):
        assert name in reader and reader.shapes[name] == tuple(tensor.shape)
        assert torch.equal(reader.whole(name), tensor)
        for start, stop in cut(tensor.numel(), read):
            out = torch.full((stop - start,), torch.nan)
            reader.read_into(out, name, start)
            assert torch.equal(out, tensor.reshape(-1)[start:stop])


def test_files_are_safetensors_with_the_checksum_that_was_returned(tmp_path):
    # The widest come first, so that a reader finds each of them aligned.
    tensors = {str(d): torch.arange(5).to(d) for d in sorted(DTYPES, key=lambda d: -d.itemsize)}
    facts = write_divided(tmp_path, tensors, [[]] * len(DTYPES))
    assert {"state-0.safetensors": facts[0]} == checksums.measured(tmp_path, ["state-0.safetensors"])
    plain = load_file(tmp_path / "state-0.safetensors")
    assert plain.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(plain[name], tensor) and torch.equal(SliceReader(tmp_path, "state").whole(name), tensor)


def test_large_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_ds.engine.slices.CHUNK", 7)
    tensor = torch.randn(100)
    write_divided(tmp_path, {"a": tensor}, [[500]])
    assert torch.equal(SliceReader(tmp_path, "state").whole("a"), tensor)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    write_divided(tmp_path, {"a": torch.randn(100), "b": torch.randn(3)}, [[500], []])
    with pytest.raises(UserError, match=f"{tmp_path} does not hold c: take another checkpoint"):
        SliceReader(tmp_path, "state").whole("c")
    (tmp_path / "state-1.safetensors").unlink()
    with pytest.raises(UserError, match=f"{tmp_path} holds a only in part, or not at all"):
        SliceReader(tmp_path, "state").whole("a")
    os.truncate(tmp_path / "state-0.safetensors", 200)
    with pytest.raises(UserError, match=r"state-0.safetensors is damaged \(.*\): take another checkpoint"):
        SliceReader(tmp_path, "state")


def test_a_tensor_of_another_size_is_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        write(tmp_path / "x", [Slice("a", (4,), 0, 4, torch.float32)], [torch.zeros(3)], {})
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        write(tmp_path / "x", [Slice("a", (4,), 0, 4, torch.float32)], [], {})
