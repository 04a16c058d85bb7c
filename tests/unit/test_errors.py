"""A bug keeps its traceback, wherever it is. What a user can cause ends in one line."""

import contextlib
import io
import json
import os
import socket
import sys

import numpy as np
import pytest
import tiny

from dpo_ds.data.encoder import Encoder
from dpo_ds.engine import build
from dpo_ds.errors import RunStopped, UserError, files_of, one_line
from dpo_ds.plan import choose
from dpo_ds.ranks import console
from dpo_ds.ranks.collectives import Problem
from dpo_ds.runs import prepare
from dpo_ds.train import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    tiny.make("llama", place / "llama")
    return place


def ended(place, monkeypatch, capsys, **options) -> tuple[int, str]:
    """Exit code and stderr of the main job."""
    words = {
        "model": place / "llama", "dataset": "sample", "cache_dir": place / "cache", "output_dir": place / "out",
        "max_length": 64, "precision": "fp32", "max_steps": 1, "global_batch_pairs": 2, "eval_pairs": 0,
        "loss": "simpo", "export": "none", **options,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train", *(f"--{key}={value}" for key, value in words.items())])
    with pytest.raises(SystemExit) as end:
        console.run_main(main)
    return end.value.code, capsys.readouterr().err


def bug(*_, **__):
    return np.zeros(3) + np.zeros(4)


PLANTED = {
    "prepare": (prepare, "fetch_weights"),
    "plan": (choose, "fill"),
    "data": (Encoder, "encode"),  # in the child process
    "engine": (build, "_load"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(where, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*PLANTED[where], bug)
    code, err = ended(place, monkeypatch, capsys, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    assert code == 1 and "Traceback" in err and ", in bug" in err, err
    assert "ValueError: operands could not be broadcast together" in err
    assert err.rstrip().splitlines()[-1] == f"dpo_ds: error: {console.BUG}"


def folder_of(place, tmp_path, change) -> str:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(place / "llama", folder)
    change(folder)
    return str(folder)


def half(name: str):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def strange_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def strange_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


# Files and options for which a library raises an error: hub, safetensors, JSON, YAML, tokenizer, disk.
CAUSED = {
    "hub": lambda place, path: {"model": "no/such-model"},
    "half a config": lambda place, path: {"model": folder_of(place, path, half("config.json"))},
    "a config of wrong types": lambda place, path: {"model": folder_of(place, path, strange_config)},
    "half a tokenizer": lambda place, path: {"model": folder_of(place, path, half("tokenizer.json"))},
    "half the weights": lambda place, path: {"model": folder_of(place, path, half("model.safetensors"))},
    "an index of wrong types": lambda place, path: {"model": folder_of(place, path, strange_index)},
    "half a data file": lambda place, path: {"dataset": written(path / "rows.jsonl", '{"prompt": "a", "chos')},
    "a DeepSpeed file": lambda place, path: {"ds_config": written(path / "ds.json", "{,}")},
    "YAML": lambda place, path: {"config": written(path / "run.yaml", "a: [")},
    "a folder that is a file": lambda place, path: {"output_dir": written(path / "file", "") + "/run"},
    "a cache that is a file": lambda place, path: {"cache_dir": written(path / "file", "") + "/cache"},
    "a run that is damaged": lambda place, path: {"output_dir": damaged_run(path)},
}


def written(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def damaged_run(path) -> str:
    (path / "run").mkdir()
    written(path / "run" / "run.json", '{"model"')
    return str(path / "run")


@pytest.mark.parametrize("cause", CAUSED)
def test_what_a_user_can_cause_is_one_line(cause, place, tmp_path, monkeypatch, capsys):
    options = {"output_dir": tmp_path / "out", "cache_dir": place / "cache"}
    code, err = ended(place, monkeypatch, capsys, **options | CAUSED[cause](place, tmp_path))
    lines = [line for line in err.splitlines() if line.startswith("dpo_ds:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err


def test_a_file_that_cannot_be_written_names_option_and_remedy(tmp_path):
    written(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"--cache_dir .*/file/x: .*; name a place that can be read and written"):
        with files_of("--cache_dir", tmp_path / "file" / "x"):
            (tmp_path / "file" / "x").mkdir()


def test_one_line_of_what_was_said():
    assert one_line(ValueError("no\n  such\tkey ")) == "no such key"
    assert one_line(ValueError()) == "ValueError", "an error without words"
    assert one_line(" two\nwords ") == "two words" and one_line("") == ""
    assert one_line("x" * 400) == "x" * 300 and one_line("x" * 400, None) == "x" * 400


def test_a_rank_above_0_says_its_own_reason(monkeypatch, capsys):
    """It adds its rank and host, and waits first, so that rank 0 can end the run."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "RANK_0_SPEAKS_FIRST", 0.0)
    with pytest.raises(SystemExit):
        console.stop("no model folder", 2)
    assert capsys.readouterr().err == f"dpo_ds: rank 3 on {socket.gethostname()}: error: no model folder\n"


@pytest.mark.parametrize(
    ("problem", "kind", "says"),
    [
        (Problem(0, "a", "UserError", "lower it"), UserError, "lower it"),
        (Problem(2, "b", "UserError", "lower it"), UserError, "rank 2 on b: lower it"),
        (Problem(2, "b", "RunStopped", "killed"), RunStopped, "rank 2 on b: killed"),
        (Problem(1, "c", "KeyError", "x"), RunStopped, "rank 1 on c failed (KeyError); its own output says where"),
    ],
)
def test_what_the_other_ranks_raise(problem, kind, says):
    raised = problem.to_raise()
    assert type(raised) is kind and str(raised) == says


def test_work_that_takes_long_is_said(monkeypatch, capsys):
    import time

    monkeypatch.setattr(console, "QUIET_SECONDS", 0.05)
    with console.working("loading the policy"), contextlib.redirect_stdout(io.StringIO()):  # as in DeepSpeed's start
        time.sleep(0.4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all(line.startswith("dpo_ds: loading the policy: ") for line in lines)
    time.sleep(0.2)
    assert capsys.readouterr().out == "", "nothing is said after the work"
    assert os.environ.get("RANK", "0") == "0"
