"""The `deepspeed` command's reading of `-m`, against DeepSpeed's own parser.

Run `pytest tests/launches/test_deepspeed_command.py`.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import launching
import psutil
import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from dpo_ds import deepspeed_command
from dpo_ds.deepspeed_command import spell_out_module

REWRITTEN = [
    ("-m pkg.mod", "--module pkg.mod"),
    ("--num_gpus 8 -m dpo_ds.train --model X", "--num_gpus 8 --module dpo_ds.train --model X"),
    ("--num_gpus=8 -m pkg", "--num_gpus=8 --module pkg"),
    ("-H hosts -i worker-0:1,2 -m pkg", "-H hosts -i worker-0:1,2 --module pkg"),
    ("-e worker-1:0 -q -m pkg", "-e worker-1:0 -q --module pkg"),
    ("--hostfile=-m -m pkg", "--hostfile=-m --module pkg"),
    ("--launcher_args '-m x' -m pkg", "--launcher_args '-m x' --module pkg"),
    ("--no_local_rank --bind_cores_to_rank -m pkg", "--no_local_rank --bind_cores_to_rank --module pkg"),
    ("--module -m pkg", "--module --module pkg"),
    # What follows the module is the module's own.
    ("-m pkg -m x -- --help -H y", "--module pkg -m x -- --help -H y"),
    ("-m pkg --help", "--module pkg --help"),
    ("-m pkg '' 'two words' -mx --num_gpus 3", "--module pkg '' 'two words' -mx --num_gpus 3"),
]

UNTOUCHED = [
    # no -m at all
    "",
    "--help",
    "train.py",
    "--num_gpus 2 train.py --lr 1",
    "--module pkg --lr 1",
    "--launcher slurm --launcher_args '-m x' train.py",
    # -m belongs to the script or to an option
    "train.py -m x",
    "--num_gpus 2 train.py --module -m",
    "--module pkg -m x",
    "--no_python ./train.sh -m x",
    "--hostfile=-m train.py",
    "-- -m x",
    "--num_gpus 2 -- train.py -m x",
    # nothing that DeepSpeed would run either way: its own message is the right one
    "-m",
    "--num_gpus 2 -m",
    "--help -m pkg",
    "-h -m pkg",
    "--hostfile -m pkg",
    "--hostfile -m train.py -m x",
    "--num_gpus eight -m pkg",
    "--bogus -m pkg",
    "-m -m pkg",
    # not spellings that this command adds
    "-mpkg",
    "-m=pkg",
    "--num_gpus 2 -mdpo_ds.train --model X",
]


@pytest.mark.parametrize(("before", "after"), REWRITTEN)
def test_launchers_m_becomes_module(before: str, after: str) -> None:
    argv = shlex.split(before)
    assert spell_out_module(argv) == shlex.split(after)
    assert argv == shlex.split(before), "the caller's list was changed"
    parsed = runner.parse_args(spell_out_module(argv))
    assert parsed.module
    assert parsed.user_script in ("pkg", "pkg.mod", "dpo_ds.train")


@pytest.mark.parametrize("line", UNTOUCHED)
def test_everything_else_stays(line: str, capsys: pytest.CaptureFixture) -> None:
    argv = shlex.split(line)
    assert spell_out_module(argv) == argv
    assert capsys.readouterr() == ("", ""), "asking DeepSpeed's parser must print nothing"


@pytest.mark.parametrize("line", [before for before, _ in REWRITTEN] + UNTOUCHED)
def test_rests_once_deepspeed_takes_m(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class TomorrowsParser(argparse.ArgumentParser):
        """Today's parser, built by DeepSpeed itself, with `-m` beside `--module`."""

        def add_argument(self, *names, **options):
            return super().add_argument(*(("-m", *names) if "--module" in names else names), **options)

    namespace = SimpleNamespace(**{**vars(argparse), "ArgumentParser": TomorrowsParser})
    monkeypatch.setattr(runner, "argparse", namespace)
    assert runner.parse_args(["-m", "pkg"]).module
    assert spell_out_module(shlex.split(line)) == shlex.split(line)


def test_main_passes_the_shells_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    monkeypatch.setattr(runner, "main", received.append)
    monkeypatch.setattr(sys, "argv", ["deepspeed", "--num_gpus", "2", "-m", "pkg", "--lr", "1"])
    deepspeed_command.main()
    assert received == [["--num_gpus", "2", "--module", "pkg", "--lr", "1"]]


@pytest.mark.parametrize(("line", "status"), [("--help", 0), ("-m", 2), ("--bogus -m pkg", 2), ("", 2)])
def test_messages_and_exit_codes_are_deepspeeds(
    line: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepspeed", *shlex.split(line)])
    said = []
    for command in (deepspeed_command.main, runner.main):
        with pytest.raises(SystemExit) as leaving:
            command()
        said.append((leaving.value.code, capsys.readouterr()))
    assert said[0] == said[1]
    assert said[0][0] == status


def test_ctrl_c_ends_without_a_traceback(tmp_path):
    words = "-m dpo_ds.train --model tiny-gpt2 --dataset sample --epochs 50 --plan off".split()
    argv = launching.command(2, *words, "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"))
    launcher = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=launching.environment(),
        # A shell's background job, as a suite may be, ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    before = ""
    while "held out, step 0" not in before:
        before += (line := launcher.stdout.readline())
        assert line, f"the run ended before it was interrupted: {before[-3000:]}"
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: the launcher and its ranks
    said = launcher.stdout.read()
    assert launcher.wait(timeout=launching.HANGS) == 130 and "Traceback" not in said, said[-3000:]


STUBBORN = """
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(__file__).with_name("started." + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(10_000)
"""


@pytest.mark.parametrize(
    ("target", "number", "times", "code"), [("", signal.SIGTERM, 2, 143), ("launch", signal.SIGKILL, 1, 137)]
)
def test_no_program_is_left_behind(target, number, times, code, tmp_path):
    """One that is no run of dpo_ds, and ignores SIGTERM."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    with open(tmp_path / "said", "w") as output:
        command = subprocess.Popen(
            launching.command(2, tmp_path / "stubborn.py"), stdout=output, stderr=output, env=launching.environment()
        )
    started = [tmp_path / f"started.{rank}" for rank in range(2)]
    try:
        until(lambda: all(file.is_file() and file.read_text() for file in started))
        below = launching.descendants(command.pid)
        assert {int(file.read_text()) for file in started} < {*below}
        for _ in range(times):
            os.kill(below[0] if target == "launch" else command.pid, number)
            # The first one has been passed on once launch.py says so; a second one that follows at once would merge.
            until(lambda: target or "Killing subprocess" in (tmp_path / "said").read_text())
        assert command.wait(timeout=launching.HANGS) == code
        assert not any(psutil.pid_exists(pid) for pid in below)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            launching.kill_tree(command.pid)
        command.wait()


def until(reached) -> None:
    deadline = time.monotonic() + launching.HANGS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pdsh_ends_our_launch_py_on_the_other_nodes():
    """DeepSpeed looks for its own by name, without the last letter."""
    args = runner.parse_args(["--module", "dpo_ds.train", "--model", "gpt2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: name)
        pdsh = PDSHRunner(args, "world")
    _, kill, _ = pdsh.get_cmd({}, {"node1": [0], "node2": [0]})
    (pattern,) = [word for word in deepspeed_command.ending(kill) if "launc" in word]
    assert pattern.replace("\\", "").endswith("-u -m dpo_ds.engine.launc"), pattern
