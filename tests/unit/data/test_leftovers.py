"""What a start leaves on disk: nothing in TMPDIR, nothing of a start that was killed, and modes after the umask."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import pytest
import tiny
import torch
from packaging.version import Version
from safetensors.torch import save_file

from dpo_ds import files
from dpo_ds.config import parse_options
from dpo_ds.data.pairs import PairSet
from dpo_ds.models.files import load_tokenizer
from dpo_ds.models.find import find_model
from dpo_ds.ranks.world import from_environment
from dpo_ds.runs.data import load_pairs


@pytest.fixture
def tmp(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_start_leaves_nothing_in_tmpdir(tmp, tmp_path):
    folder = tiny.make("llama", tmp_path / "llama")
    options = parse_options(
        [f"--model={folder}", "--dataset=sample", f"--cache_dir={tmp_path / 'cache'}", "--max_length=64"]
    )
    umask = os.umask(0o022)
    try:
        pairs, _ = load_pairs(options, load_tokenizer(find_model(str(folder))), from_environment(), "2026-01-01")
    finally:
        os.umask(umask)
    assert len(pairs) and list(tmp.iterdir()) == []
    (kept,) = (tmp_path / "cache" / "tokens").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o755, "others may share the cache"
    assert isinstance(PairSet.open(kept).pairs, np.ndarray)


KILLED = """
import os, signal, sys
from pathlib import Path
from dpo_ds.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), "key") as folder:
    (folder / "tokens.npy").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.launch
def test_what_a_killed_start_left_goes_with_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / f"key@elsewhere@{os.getpid()}@0{files.SCRATCH}").mkdir()  # of another machine: may be alive
    with files.scratch_folder(tmp_path, "key") as own, files.scratch_folder(tmp_path, "key") as other:
        assert own.is_dir() and other.is_dir() and not left.exists()
    assert [path.name.split("@")[1] for path in tmp_path.iterdir()] == ["elsewhere"]


def test_modes_follow_the_umask(tmp_path):
    """As a negative control, only this user may read the file as safetensors writes it. Before 0.8, safetensors
    followed the umask itself."""
    file = tmp_path / "x.safetensors"
    private = Version(version("safetensors")) >= Version("0.8")
    umask = os.umask(0o027)
    try:
        save_file({"x": torch.zeros(1)}, file)
        assert file.stat().st_mode & 0o777 == (0o600 if private else 0o640)
        file.chmod(0o600)
        files.follow_umask(file)
        assert file.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)
