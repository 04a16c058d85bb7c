"""The ranks of a run: joining them, one voice for all, and work that one of them does for the others.

A run is started by deepspeed, torchrun, accelerate or plain python; all but the last say in the environment which rank
this is. Plain python is a world of one.
"""

import contextlib
import ctypes
import datetime
import io
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dpo_ds import ops
from dpo_ds.errors import RunStopped, UserError

T = TypeVar("T")

# Tokenising a large set or reading a large checkpoint on one rank keeps the others waiting for long.
PATIENCE = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int

    @property
    def speaks(self) -> bool:
        return self.rank == 0


def from_environment() -> World:
    """Which rank the launcher says this is; nothing is started."""
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
    return World(rank, local_rank, size)


def let_rank_0_plan(at_most: float = 60) -> None:
    """On rank 0's node, where ranks outnumber cores, waits until rank 0 opens the port at which all meet, or that many
    seconds: to import torch eight times over on two cores would make the plan's refusal late by as much."""
    world, port = from_environment(), os.environ.get("MASTER_PORT")
    if port is None or world.rank != world.local_rank or world.size <= len(os.sched_getaffinity(0)):
        return
    until = time.monotonic() + at_most
    while time.monotonic() < until and not _listening(int(port)):
        time.sleep(0.1)


def _listening(port: int) -> bool:
    """Whether some process of this machine listens there: looked up, because a rank that connected and left would be
    taken for one that has joined."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables if table.is_file() for line in table.read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in lines)


def join() -> World:
    """Joins the process group (nccl on GPUs, gloo on CPU) and takes this rank's device and share of the cores.

    Raises ValueError where a node has fewer GPUs than ranks.
    """
    import torch

    world = from_environment()
    if torch.cuda.is_available() and world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {world.rank} has no GPU: this node has {torch.cuda.device_count()}; lower --num_gpus to that"
        )
    quiet_start()
    # torchrun says 1 where nobody has said anything, and the optimizer's step on the host would take hours.
    if torch.cuda.is_available() and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    else:
        keep_freed_memory()
    import deepspeed

    ops.build_in_turns(world.speaks)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False, timeout=PATIENCE)
    if not torch.cuda.is_available():
        _take_cores()
        _unname_shared_memory(world)
    return world


_all_cores: set[int] = set()  # before a rank took its share; empty if it took none


def _take_cores() -> None:
    """Binds this rank to its share of the cores that it has together with others, one thread for each: two ranks on two
    cores are 4% faster so (benchmarks/README.md). Ranks that a launcher has bound have theirs already."""
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
    if share and len(here) > 1:
        start = here.index(from_environment().rank) * share
        _all_cores.update(cores)
        os.sched_setaffinity(0, cores[start : start + share])


def _unname_shared_memory(world: World) -> None:
    """Takes away the name of this rank's block in /dev/shm as soon as every rank has mapped it. DeepSpeed 0.19's
    collectives on CPU never do, and each rank of each run would leave 66 MiB of the machine's memory behind."""
    wait_for_all()
    parts = "deepspeed_allreduce_buffer", os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], world.rank
    Path("/dev/shm", "_".join(map(str, parts))).unlink(missing_ok=True)


def quiet_start() -> None:
    """What must be said before DeepSpeed is imported and CUDA allocates; and warnings only from the libraries, whose
    own account of what they do would drown ours."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif exact_pinned_memory():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", EXACT_PINNED)
    import deepspeed
    import transformers

    deepspeed.utils.logger.setLevel("WARNING")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSpeed 0.19 still calls what torch 2.13 has renamed, once a collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # The name that transformers 5.23 asks for instead is not there in 5.10.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")


def keep_freed_memory() -> None:
    """Lets the C library hand freed blocks of up to a GiB out again, where its default gives those above 32 MiB back
    and has the kernel clear new pages each time: a seventh of a step's time for a 50 MB embedding. What the user's own
    environment says of it stays."""
    if any(name.startswith("MALLOC_") and name.endswith("_THRESHOLD_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has mallopt
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


PR_SET_PDEATHSIG = 1  # of prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# torch rounds a page-locked block up to a power of two, above this many MB not: 16.4 GiB would take 32.
EXACT_PINNED = "pinned_max_round_threshold_mb:1"


def exact_pinned_memory() -> bool:
    """Whether page-locked memory takes its own size here: torch 2.13 can be told so, and nothing else has been."""
    import torch
    from packaging.version import Version

    known = Version(torch.__version__.split("+")[0]) >= Version("2.13")
    return known and "pinned_max_round_threshold_mb" in os.environ.get("PYTORCH_ALLOC_CONF", EXACT_PINNED)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def say(message: str) -> None:
    """One line to the user, from rank 0."""
    if from_environment().speaks:
        print(f"dpo_ds: {message}", flush=True)


def run_main(main: Callable[[list[str]], object]) -> None:
    """Runs a command's main: what the user can put right ends with one line on stderr and exit code 2 on every rank."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if not isinstance(error, UserError):
            raise
        stop(str(error), 2)
    except RunStopped as error:
        stop(str(error), 1)
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on from the last checkpoint (--save_every)", 130)
    finally:
        leave()


class user_errors:
    """Within it, a ValueError, or a file that cannot be read or written, is the user's to put right: for all that
    happens before a model is loaded."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (ValueError, OSError)) and not isinstance(error, UserError):
            raise UserError(_in_one_line(error)) from error


def _in_one_line(error: ValueError | OSError) -> str:
    remedy = "; name a place that can be read and written" if isinstance(error, OSError) else ""
    return " ".join(f"{error}{remedy}".split())


def stop(message: str, code: int) -> None:
    if from_environment().speaks:
        print(f"dpo_ds: error: {message}", file=sys.stderr, flush=True)
    else:
        # A launcher ends all ranks as soon as one has ended: rank 0 must have spoken by then.
        time.sleep(5)
    raise SystemExit(code)


def leave() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def in_a_child(name: str, work: Callable[[], T]) -> T:
    """Runs work in a process of its own, forked from this one and gone after it with all that it imported and held.
    It has all the cores that this process had when it joined. Its result must pickle.

    Raises a ValueError for one, or an OSError, that it raised; RunStopped if it ended in any other way.
    """
    context = multiprocessing.get_context("fork")
    results, mine = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(work, mine))
    child.start()
    mine.close()
    try:
        result, problem = results.recv()
    except EOFError:
        child.join()
        raise RunStopped(
            f"{name}: its process ended with exit code {child.exitcode} (-9: killed, most often for lack of memory)"
        ) from None
    child.join()
    if problem is not None:
        raise ValueError(problem)
    return result


def _send_result(work: Callable[[], object], results) -> None:
    with contextlib.suppress(OSError, AttributeError):  # a rank that is killed leaves nobody behind
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if _all_cores:
        os.sched_setaffinity(0, _all_cores)
    try:
        results.send((work(), None))
    except (ValueError, OSError) as error:
        results.send((None, _in_one_line(error)))


def one_after_another(work: Callable[[], T]) -> T:
    """Runs cached work on rank 0 first, then on the first rank of every other node, then on the rest.

    The first call fills a cache; the others find it there, on a shared file system or on their own. A ValueError or
    OSError on any rank is raised on all, as a ValueError.
    """
    world = from_environment()
    mine = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    result, problem = None, None
    for turn in range(3):
        if turn == mine and problem is None:
            try:
                result = work()
            except (ValueError, OSError) as error:
                problem = _in_one_line(error)
        problem = _first_problem(problem)
    if problem is not None:
        raise ValueError(problem)
    return result


def _first_problem(problem: str | None) -> str | None:
    if from_environment().size == 1:
        return problem
    import torch

    problems = [None] * from_environment().size
    torch.distributed.all_gather_object(problems, problem)
    return next((p for p in problems if p is not None), None)


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    if from_environment().size == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]


def sum_over_ranks(tensor):
    """All-reduces `tensor` in place (sum) and returns it: the one collective that dpo_ds itself uses in training."""
    if from_environment().size > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    if from_environment().size > 1:
        import torch

        torch.distributed.barrier()
