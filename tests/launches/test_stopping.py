"""Requests to stop, and how ranks notice each other's end: real signals, sent to small scripts without DeepSpeed."""

import signal
import socket
import subprocess
import sys
import time

import launching
import pytest

from dpo_ds.ranks import signals

LOOP = """
import sys, time
from dpo_ds.errors import Stopped
from dpo_ds.ranks import console, signals

def main(argv):
    if argv[0] == "outside":
        print("ready", flush=True)
        time.sleep(1000)
    if argv[0] == "breaks":
        try:
            print("ready", flush=True)
            time.sleep(1000)
        except BaseException:  # as numpy does within an import
            raise RecursionError
    if argv[0] == "agreed":
        try:
            with signals.at_boundaries(600):
                raise Stopped("saved, another rank was asked", 143)
        finally:
            print("ready", flush=True)
            sys.stdin.readline()
    with signals.at_boundaries(float(argv[1])):
        while True:
            print("ready", flush=True)
            sys.stdin.readline()  # a step
            if request := signals.asked():
                raise Stopped(f"saved, {request.why}", request.code)

console.run_main(main)
"""
SAID = "the run stops and saves after this step"


class Script:
    """The script, while it waits."""

    def __init__(self, place, *argv: str, **more):
        (place / "loop.py").write_text(LOOP)
        self.process = subprocess.Popen(
            [sys.executable, place / "loop.py", *argv], text=True, env=launching.environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
        )  # fmt: skip
        self.hear("ready")

    def hear(self, text: str) -> None:
        while text not in (line := self.process.stdout.readline()):
            assert line, f"it ended without saying {text}"

    def end_of_step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def rest(self) -> tuple[int, str]:
        said = self.process.stdout.read()
        return self.process.wait(launching.HANGS), said


CODES = [
    (signal.SIGTERM, 143),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 129),
    (signal.SIGUSR1, 0),
    (signal.SIGUSR2, 0),
]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_waits_for_the_step(number, code, tmp_path):
    # A shell's background job, as a suite may be, ignores Ctrl-C.
    script = Script(tmp_path, "inside", "600", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    script.process.send_signal(number)
    script.hear(SAID)
    script.end_of_step()
    assert script.rest() == (code, f"dpo_ds: saved, {signal.Signals(number).name}\n")


def test_a_rank_that_leaves_with_the_others_is_not_stopped_again(tmp_path):
    """The first rank's launcher passes its signal on to those that are still saving what they say."""
    script = Script(tmp_path, "agreed")
    script.process.send_signal(signals.PASSED_ON[signal.SIGTERM])
    time.sleep(1)
    script.end_of_step()
    assert script.rest() == (143, "dpo_ds: saved, another rank was asked\n")


def test_what_breaks_because_of_the_stop_is_no_bug(tmp_path):
    script = Script(tmp_path, "breaks")
    script.process.send_signal(signal.SIGTERM)
    code, said = script.rest()
    assert code == 143 and said.startswith("dpo_ds: stopped by SIGTERM") and said.count("\n") == 1


def test_outside_the_loop_it_stops_at_once_and_names_the_command(tmp_path):
    script = Script(tmp_path, "outside", "--model=x y")
    script.process.send_signal(signal.SIGTERM)
    said = f"dpo_ds: stopped by SIGTERM; to go on: python {tmp_path / 'loop.py'} outside '--model=x y'\n"
    assert script.rest() == (143, said)


def test_a_second_signal_ends_at_once_but_a_launchers_copy_is_none(tmp_path):
    script = Script(tmp_path, "inside", "600")
    script.process.send_signal(signal.SIGTERM)
    script.hear(SAID)
    script.process.send_signal(signals.PASSED_ON[signal.SIGTERM])
    script.end_of_step()
    assert script.rest()[1] == "dpo_ds: saved, SIGTERM\n"
    script = Script(tmp_path, "inside", "600")
    script.process.send_signal(signals.PASSED_ON[signal.SIGHUP])
    script.hear(SAID)
    for number in (signal.SIGTERM, signal.SIGTERM):
        time.sleep(0.2)  # two that are pending at once are one
        script.process.send_signal(number)
    assert script.rest() == (143, "dpo_ds: error: SIGTERM again: ended at once\n")


def test_a_step_that_takes_too_long_is_not_waited_for(tmp_path):
    script = Script(tmp_path, "inside", "0.5")
    script.process.send_signal(signal.SIGTERM)
    script.hear(SAID)
    assert script.rest() == (
        143,
        "dpo_ds: error: the step and its checkpoint took more than 0.5 seconds: ended at once\n",
    )


def test_what_is_ignored_stays_ignored(tmp_path):
    """As with nohup."""
    script = Script(tmp_path, "inside", "600", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    script.process.send_signal(signal.SIGHUP)
    script.process.send_signal(signal.SIGTERM)
    script.hear("SIGTERM: " + SAID)
    script.end_of_step()
    assert script.rest()[0] == 143


def test_a_rank_stops_when_its_launcher_is_killed(tmp_path):
    """The launcher is a process whose command line ends with the rank's; a shell is none."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, 'loop.py', *sys.argv[1:]])\n")
    (tmp_path / "loop.py").write_text(LOOP)
    with open(tmp_path / "said", "w") as output:
        process = subprocess.Popen(
            [sys.executable, launcher, "inside", "600"], cwd=tmp_path, env=launching.environment(), stdout=output,
            stderr=output, stdin=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(text: str) -> None:
        until = time.monotonic() + launching.HANGS
        while text not in (tmp_path / "said").read_text():
            assert time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.02)

    hear("ready")
    process.kill()
    process.wait()
    hear(f"the end of its launcher: {SAID}")
    process.stdin.write("\n")
    process.stdin.flush()
    hear("saved, the end of its launcher")


RANKS = """
import sys, time
import torch
from dpo_ds.ranks import collectives, console, lifeline

def main(argv):
    torch.distributed.init_process_group("gloo")
    lifeline.tie()
    print("ready", flush=True)
    if argv[0] == "collective":
        collectives.wait_for_all()  # the other rank never comes
    sys.stdin.readline()

console.run_main(main)
"""


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_dies_takes_the_others_with_it(first, tmp_path):
    """Without a launcher: rank 0 in a collective and rank 1 outside, one of them killed."""
    (tmp_path / "ranks.py").write_text(RANKS)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, tmp_path / "ranks.py", what], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**launching.environment(), **shared, "RANK": str(n), "LOCAL_RANK": str(n)},
        )
        for n, what in enumerate(["collective", "outside"])
    ]  # fmt: skip
    for rank in ranks:
        while "ready" not in (line := rank.stdout.readline()):
            assert line
    ranks[first].kill()
    died, other = ranks[first], ranks[1 - first]
    said = other.stdout.read()
    assert other.wait(launching.HANGS) == 1
    died.wait()
    assert "Traceback" not in said and len(said.splitlines()) == 1, said
    assert f"error: rank {first} on {socket.gethostname()} (process {died.pid}) has died" in said


READER = """
import sys
from dpo_ds.ranks import console

def main(argv):
    if argv:
        console.outlive_readers()
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        console.say("to nobody")
        console.complain("likewise")
    open("ended", "w").close()

console.run_main(main)
"""


@pytest.mark.parametrize("lasting", [True, False])
def test_a_run_outlives_the_reader_of_its_output(lasting, tmp_path):
    """Negative control: by default, Python's print raises an error then."""
    (tmp_path / "reader.py").write_text(READER)
    argv = [sys.executable, "reader.py", *(["lasting"] if lasting else [])]
    with subprocess.Popen(
        argv, cwd=tmp_path, text=True, env=launching.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.wait(launching.HANGS) == 0) == lasting
    assert (tmp_path / "ended").exists() == lasting
