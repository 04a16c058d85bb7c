"""Processes as /proc shows them, and exit codes."""

import os
import signal
import subprocess
import sys
import time

import launching
import pytest

from dpo_ds.engine.launch import exit_code
from dpo_ds.ranks import family
from dpo_ds.ranks.process import in_a_child


@pytest.mark.parametrize(
    ("code", "ends"), [(0, 0), (2, 2), (143, 143), (-9, 137), (138, 0), (140, 0), (-15, 143), (-10, 0)]
)
def test_what_a_ranks_end_makes_of_the_launchers(code, ends):
    assert exit_code(code) == ends


def test_processes_are_found_in_proc():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        found = family.process(child.pid)
        assert found.alive and child.pid in family.descendants()
        assert family.words_of(child.pid)[1] == "-c" and not family.catches(child.pid, signal.SIGUSR1)
        os.kill(child.pid, signal.SIGSTOP)
        while not found.stopped:
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert not found.alive and family.process(child.pid) is None
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert family.catches(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_what_a_child_starts_ends_with_it():
    """As the processes that tokenise: their parent is killed."""

    def work():
        grandchild = os.fork()
        if not grandchild:
            time.sleep(1000)
            os._exit(0)
        return grandchild, family.process(grandchild)

    grandchild, found = in_a_child("work", work)
    until = time.monotonic() + launching.HANGS
    while found.alive:
        assert time.monotonic() < until, f"{grandchild} is alive"
        time.sleep(0.02)
