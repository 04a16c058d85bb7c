"""A process that has imported the libraries, and forks the ranks of the tests' launches: python warm.py FD

Most of a small run's time would be the import of torch, DeepSpeed and transformers. FD is the inherited end of a pipe,
on which requests come in, each with a stream for its output, and an exit code goes out. A forked rank has its own
environment, runs its words as `python` would, and ends as a process of Python does.
"""

import gc
import importlib
import os
import runpy
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle


@dataclass
class Request:
    """Ranks to start: one process for each environment."""

    words: list[str]  # -m MODULE, -c CODE or a script's file, and what follows
    environments: list[dict[str, str]]


# What a run imports, but for the commands: runpy would find those imported already.
LIBRARIES = ("datasets", "peft", "dpo_ds.engine.build", "dpo_ds.references.kinds", "dpo_ds.reports.progress",
             "dpo_ds.runs.prepare", "dpo_ds.trainer")  # fmt: skip


def import_libraries() -> None:
    from dpo_ds.engine import join

    join.quiet_start()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # what all ranks share


def serve(requests: Connection) -> tuple[list[str], dict[str, str]] | None:
    """Answers each request with its exit code. Returns None at the end, and in a forked rank its words and
    environment, with its output redirected."""
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return None
        here, output, ranks = os.getpid(), recv_handle(requests), set()
        for environment in request.environments:
            if not (pid := os.fork()):
                requests.close()
                for descriptor in (1, 2):
                    os.dup2(output, descriptor)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                os.close(output)
                from dpo_ds.ranks import family

                family.end_with_parent(signal.SIGKILL, here)
                return request.words, environment
            ranks.add(pid)
        os.close(output)
        requests.send(code_of(ranks))


def code_of(ranks: set[int]) -> int:
    """Waits for ranks (process ids). Returns 0, or the exit code of the first that failed. As a launcher does, it kills
    the others then."""
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if not code and (code := os.waitstatus_to_exitcode(status)):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return code


def become(words: list[str], environment: dict[str, str]) -> None:
    """Makes this process what `python WORDS` would be."""
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = words
    if kind in ("-m", "-c"):
        what, *rest = rest
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import_libraries()
    if (rank := serve(Connection(int(sys.argv[1])))) is not None:
        become(*rank)
