"""A process that has imported the libraries, and forks the ranks of the tests' launches: python warm.py FD

Most of a small run's time would be the import of torch, DeepSpeed and transformers. FD is the inherited end of a pipe,
on which requests come in and exit codes go out. A forked rank has its own environment and output, runs its words as
`python` would, and ends as a process of Python does.
"""

import gc
import os
import runpy
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass
class Request:
    """Ranks to start: one process for each environment."""

    words: list[str]  # -m MODULE, -c CODE or a script's file, and what follows
    environments: list[dict[str, str]]
    output: str  # a file to which all of them append


def import_libraries() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from dpo_ds.engine import join

    join.quiet_start()
    gc.freeze()  # what all ranks share


def serve(requests: Connection) -> tuple[Request, int] | None:
    """Answers each request with its ranks' exit codes. Returns None at the end, and in a forked rank its request and
    number."""
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return None
        here, ranks = os.getpid(), []
        for number in range(len(request.environments)):
            if not (pid := os.fork()):
                requests.close()
                from dpo_ds.ranks import family

                family.end_with_parent(signal.SIGKILL, here)
                return request, number
            ranks.append(pid)
        requests.send([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks])


def become(request: Request, number: int) -> None:
    """Makes this process the rank that was asked for, and runs it."""
    os.environ.clear()
    os.environ.update(request.environments[number])
    stream = os.open(request.output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    os.close(stream)
    kind, *words = request.words
    if kind in ("-m", "-c"):
        what, *words = words
    sys.argv = [kind, *words]
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
