"""Starts the training command as a user would, many times, in environments where it cannot run.

    python refusals.py cases.json results.json

The libraries are imported once. Each case is a forked process that changes its environment and then runs the command
to its end, with its exit code and its output.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dpo_ds.config import parse_options
from dpo_ds.engine import join
from dpo_ds.plan.refuse import for_run
from dpo_ds.ranks import console
from dpo_ds.runs import prepare
from dpo_ds.train import main

CLONE_NEWNS = 0x20000  # of sched.h: mounts of this process are its own
PATIENCE = 300.0  # seconds of a case that hangs


def start(case: dict, output: Path) -> int:
    """Forks a process for a case. Returns its process id.

    environment: variables, null to remove one; locale: of the streams; memory: ulimit -v, above what the process has
    already; mounts: commands that change what it sees of the disk; argv: the options.
    """
    if pid := os.fork():
        return pid
    code = 70
    try:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(stream, number)
        encoding = case.get("locale", "utf-8")
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding=encoding, errors="strict") for n in (1, 2))
        for name, value in case.get("environment", {}).items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        tempfile.tempdir = None
        if case.get("mounts"):
            if ctypes.CDLL(None).unshare(CLONE_NEWNS):
                raise OSError("the tests' user may not mount")
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            for command in case["mounts"]:
                subprocess.run(command, shell=True, check=True)
        if "memory" in case:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + case["memory"],) * 2)
        sys.argv = ["train", *case["argv"]]
        console.run_main(main)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a process; -9 for one that hung."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def run(case: dict, folder: Path) -> dict:
    """Runs a case on each of its ranks, rank 0 first. Several ranks are a list of cases under "ranks"."""
    taken = socket.create_server(("0.0.0.0", case["port"])) if "port" in case else contextlib.nullcontext()
    with taken:
        ranks = case.get("ranks", [case])
        files = [folder / f"{rank}.txt" for rank in range(len(ranks))]
        started = time.monotonic()
        codes = [ended(pid) for pid in [start(each, file) for each, file in zip(ranks, files, strict=True)]]
    said = [file.read_text(errors="backslashreplace") for file in files]
    return {"codes": codes, "said": said, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)  # a forked process could not use the threads that this one has started
    assert prepare and join.quiet_start() is None
    for_run(parse_options(cases.pop("warm up")))
    with tempfile.TemporaryDirectory() as folder:
        results.write_text(json.dumps({name: run(case, Path(folder)) for name, case in cases.items()}))
