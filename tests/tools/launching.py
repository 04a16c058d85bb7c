"""Real launches for tests: DeepSpeed's launcher over gloo, two ranks on this machine's CPU."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import send_handle
from pathlib import Path

import psutil
import warm

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
# Seconds. Only what hangs takes so long, however busy the machine is.
HANGS = 1500


def environment() -> dict:
    """The tests' environment without the variables that would steer a run. Imports find this checkout."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONDONTWRITEBYTECODE"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    return {**env, "PYTHONPATH": f"{ROOT}:{TOOLS}", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "CXX": str(TOOLS / "cxx.sh")}  # fmt: skip


def free_port() -> int:
    """A free port below the range that the system gives to outgoing connections. A port in that range could be taken by
    another run before the launch."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def command(ranks: int, *words: str) -> list[str]:
    """The command line for `words`, which start with -m MODULE or a script. Plain python starts one rank, our deepspeed
    command several."""
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "dpo_ds.deepspeed_command", "--num_gpus", str(ranks), "--master_port",
            str(free_port()), *words]  # fmt: skip


def run(ranks: int, *words: str, timeout: float = HANGS, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Runs words to their end. In the tests' own environment, ranks are forked from a warm process; our deepspeed
    command, where it starts them, has tests of its own (test_deepspeed_command, test_signals)."""
    if not env:
        return forked(ranks, [*map(str, words)], timeout, check)
    return execute(command(ranks, *map(str, words)), timeout, check, env={**environment(), **env})


def execute(argv: list[str], timeout: float = HANGS, check: bool = True, **more) -> subprocess.CompletedProcess:
    """Runs a command to its end. `stdout` has both streams. After `timeout` seconds it and its children are killed."""
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        **more,
    )
    try:
        stdout, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        stdout, _ = process.communicate()
        raise AssertionError(f"still running after {timeout:.0f} s:\n{stdout[-6000:]}") from None
    return ended(process.args, process.returncode, stdout, check)


def ended(argv: list[str], code: int, stdout: str, check: bool) -> subprocess.CompletedProcess:
    if check and code != 0:
        raise AssertionError(f"exit code {code}:\n{stdout[-6000:]}")
    return subprocess.CompletedProcess(argv, code, stdout)


class Warm:
    """A process that forks ranks (warm.py). It ends with this one, whose end of the pipe is then closed."""

    def __init__(self):
        self.requests, theirs = multiprocessing.Pipe()
        argv = [sys.executable, TOOLS / "warm.py", str(theirs.fileno())]
        self.process = subprocess.Popen(
            argv, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def run(self, request: warm.Request, timeout: float) -> tuple[int | None, str]:
        """The ranks' exit code, or None if they take longer; and what they printed."""
        ours, theirs = os.pipe()
        self.requests.send(request)
        send_handle(self.requests, theirs, self.process.pid)
        os.close(theirs)
        with open(ours, errors="replace") as output, ThreadPoolExecutor(1) as reader:
            printed = reader.submit(output.read)
            code = self.requests.recv() if self.requests.poll(timeout) else None
            if code is None:
                kill_tree(self.process.pid)
                warm_process.cache_clear()
            return code, printed.result()


@functools.cache
def warm_process() -> Warm:
    return Warm()


def forked(
    ranks: int, words: list[str], timeout: float = HANGS, check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """Runs ranks to their end, without a launcher: as torchrun would start them. `env` is what they read themselves,
    not what a library reads when it is imported."""
    shared = {**environment(), **env}
    if ranks > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    each = [{**shared, "RANK": str(n), "LOCAL_RANK": str(n)} if ranks > 1 else shared for n in range(ranks)]
    code, stdout = warm_process().run(warm.Request(words, each), timeout)
    if code is None:
        raise AssertionError(f"still running after {timeout:.0f} s:\n{stdout[-6000:]}")
    return ended(words, code, stdout, check)


def kill_tree(pid: int) -> None:
    """Kills a process and its children. The ranks of a launcher that is killed alone would run on, and the reader of
    their output would wait."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_after(ranks: int, words: list[str], folder: Path, step: int, **env: str) -> None:
    """Starts the run and kills every process of it (SIGKILL) once metrics.jsonl has the step."""
    process = subprocess.Popen(
        command(ranks, *words),
        env={**environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + HANGS
    while time.time() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and f'"step": {step},' in (folder / "metrics.jsonl").read_text():
            break
        time.sleep(0.005)
    alive = process.poll() is None
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert alive, f"the run ended before it was killed: {process.stdout.read()[-3000:]}"


def descendants(pid: int) -> list[int]:
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    children = [int(word) for word in out.split()]
    return children + [pid for child in children for pid in descendants(child)]


def measured(ranks: int, words: list[str], folder: Path) -> list[dict]:
    """Runs the main job and measures each rank's memory (see memory.py). folder: the run's."""
    # What is freed goes back at once: how much of it the C library keeps for itself is another matter.
    run(ranks, TOOLS / "memory.py", *words, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="200000")
    return [json.loads(file.read_text()) for file in folder.glob("memory-*.json")]


def run_scenarios(ranks: int, scenarios: list[dict], file: Path, **env: str) -> str:
    """Runs scenarios (see scenarios.py) in one launch. Returns what they printed."""
    file.write_text(json.dumps(scenarios))
    words = [str(TOOLS / "scenarios.py"), str(file)]
    return (run(ranks, *words, **env) if env else forked(ranks, words)).stdout


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    """The record's lines without what depends on speed: equal for runs that are equal to the bit."""
    timed = ("tokens/s", "pairs/s", "TFLOP/s a rank")
    return [{key: value for key, value in line.items() if key not in timed} for line in metrics(folder)]


def curve(folder: Path, key: str = "loss") -> list[float]:
    """A metric's values in the training steps."""
    return [line[key] for line in metrics(folder) if key in line]
