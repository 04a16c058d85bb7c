"""This process: its share of the cores, the C library's memory settings, and work in a child process."""

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpo_ds.errors import RunStopped, Stopped, UserError
from dpo_ds.ranks import family, signals
from dpo_ds.ranks.world import from_environment

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# torch rounds page-locked blocks up to a power of two (16.4 GiB take 32), but with this setting only those up to 1 MB.
EXACT_PINNED = "pinned_max_round_threshold_mb:1"


def let_rank_0_plan(at_most: float = 60) -> None:
    """Waits until rank 0 opens the rendezvous port, or for `at_most` seconds. Only ranks on rank 0's node wait, and
    only if there are more ranks than cores: importing torch in eight ranks on two cores would delay rank 0's plan."""
    world, port = from_environment(), os.environ.get("MASTER_PORT")
    if port is None or world.rank != world.local_rank or world.size <= len(os.sched_getaffinity(0)):
        return
    until = time.monotonic() + at_most
    while time.monotonic() < until and not _listening(int(port)):
        time.sleep(0.1)


def _listening(port: int) -> bool:
    """Whether a process of this machine listens on the port. It is looked up in /proc, because a test connection would
    count as a rank that has joined."""
    files = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for file in files if file.is_file() for line in file.read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in lines)


def take_cores() -> frozenset[int]:
    """Binds this rank to its share of the cores that several ranks have in common, with one thread per core. Two ranks
    on two cores are 4% faster with it (benchmarks/README.md). Ranks that a launcher has bound keep their cores.

    Returns the cores that this process had before; an empty set if nothing was changed.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0))
    place = socket.gethostname(), cores
    places = [place]
    if from_environment().size > 1:
        places *= from_environment().size
        torch.distributed.all_gather_object(places, place)
    here = [rank for rank, other in enumerate(places) if other == place]
    share = len(cores) // len(here)
    torch.set_num_threads(max(1, share))
    if not share or len(here) == 1:
        return frozenset()
    start = here.index(from_environment().rank) * share
    os.sched_setaffinity(0, cores[start : start + share])
    return frozenset(cores)


def keep_freed_memory() -> None:
    """Lets the C library reuse freed blocks of up to a GiB. By default it returns blocks above 32 MiB to the kernel,
    which must then clear new pages each time: a seventh of a step's time for a 50 MB embedding. The user's own
    MALLOC_ settings in the environment take precedence."""
    if any(name.startswith("MALLOC_") and name.endswith("_THRESHOLD_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc has mallopt
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def exact_pinned_memory() -> bool:
    """Whether page-locked blocks are not rounded up: torch has the setting, and the user's settings do not differ."""
    wanted = "pinned_max_round_threshold_mb" in os.environ.get("PYTORCH_ALLOC_CONF", EXACT_PINNED)
    return wanted and knows_exact_pinned()


def knows_exact_pinned() -> bool:
    """Whether torch knows EXACT_PINNED: from 2.13 on. An older one stops at a setting that it does not know."""
    import torch
    from packaging.version import Version

    return Version(torch.__version__.split("+")[0]) >= Version("2.13")


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; by Linux's word."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return any(word in flags for word in ("avx512_bf16", "amx_bf16", " bf16"))


def end_without_search() -> None:
    """Lets Python end this process without looking through all its objects for cycles, which takes a second."""
    gc.freeze()


class FromChild(Exception):
    """Carries the traceback of an error in a child process: the cause of the same error in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def in_a_child(name: str, work: Callable[[], T], cores: frozenset[int] = frozenset()) -> T:
    """Runs work in a forked child process, whose imports and memory are gone when it ends. The child may use `cores`,
    or this process's if none are given. The result must pickle.

    Raises what the work raised, or RunStopped if the child ended without a result.
    """
    context = multiprocessing.get_context("fork")
    results, childs_end = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(work, childs_end, cores, os.getpid()))
    child.start()
    childs_end.close()
    try:
        result, error, where = results.recv()
    except Stopped:
        child.terminate()
        child.join(signals.GRACE / 2)
        raise
    except EOFError:
        child.join()
        if child.exitcode == signals.code_of(signal.SIGTERM):
            signals.stop_now(signal.SIGTERM)
        raise RunStopped(
            f"{name}: its process ended with exit code {child.exitcode} (-9: killed, most often for lack of memory)"
        ) from None
    child.join()
    if isinstance(error, (UserError, RunStopped)):
        raise error
    if error is not None:
        raise error from FromChild(where)
    return result


def _send_result(work: Callable[[], object], results, cores: frozenset[int], parent: int) -> None:
    # If this rank is killed, its child is killed too, and so are the child's own, as the processes that tokenise.
    family.end_with_parent(signal.SIGKILL, parent)
    family.forks_end_with_parent()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        results.send((work(), None, ""))
    except Exception as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some libraries' errors do not pickle
            error = RuntimeError(f"{type(error).__name__}: {error}")
        results.send((None, error, where))
