"""Starting DeepSpeed: settings that must precede its import, and joining the ranks of a run."""

import contextlib
import dataclasses
import datetime
import io
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dpo_ds.engine import ops
from dpo_ds.errors import UserError, one_line
from dpo_ds.files import in_words
from dpo_ds.ranks import collectives, lifeline, process, world

# The other ranks wait this long while one rank tokenises a large set or reads a large checkpoint. A rank that hangs in
# a step or while it scores is noticed earlier (ranks/hang.py), and one that ends at once (ranks/lifeline.py).
PATIENCE = datetime.timedelta(hours=6)
ADDRESS_SECONDS = 15.0  # that a new cluster's name service may take to know rank 0's host
NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch.compile leaves functions as they are while this is 1
BUFFER = 66 * 2**20  # bytes in /dev/shm of each rank: DeepSpeed's collectives on CPU


def quiet_start() -> None:
    """Settings that must precede DeepSpeed's import and CUDA's first allocation. The libraries print warnings only, so
    that dpo_ds's own lines stay visible."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif process.exact_pinned_memory():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", process.EXACT_PINNED)
    import deepspeed
    import transformers

    _import_muon()
    deepspeed.utils.logger.setLevel("WARNING")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSpeed 0.19 calls functions that torch 2.13 has renamed: one warning for each collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # transformers 5.23 warns about a name whose replacement does not exist in 5.10.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")


def _import_muon() -> None:
    """Imports Muon as each engine with ZeRO does, though nobody here uses it, but without setting up torch's compiler,
    which would take a second. A DeepSpeed that has no such module goes without it, and so does this."""
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    try:
        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ[NO_COMPILER]
        if before is not None:
            os.environ[NO_COMPILER] = before


def join() -> world.World:
    """Joins the process group (nccl on GPUs, gloo on CPU) and takes this rank's device and share of the cores.

    Raises UserError if a node has fewer GPUs than ranks.
    """
    here = world.from_environment()
    if torch.cuda.is_available() and here.local_rank >= torch.cuda.device_count():
        raise UserError(f"this node has {torch.cuda.device_count()} GPU(s) and more ranks: lower --num_gpus to that")
    quiet_start()
    # torchrun sets 1 if the user has set nothing. With one thread, the optimizer's step on the host would take hours.
    if torch.cuda.is_available() and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", here.size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    else:
        process.keep_freed_memory()
    import deepspeed

    ops.build_in_turns(here.speaks)
    _require_address(os.environ["MASTER_ADDR"])
    if not torch.cuda.is_available():
        _require_shared_memory(Path("/dev/shm"), int(os.environ.get("LOCAL_WORLD_SIZE", here.size)))
    with _port_of_others(), contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False, timeout=PATIENCE)
    lifeline.tie()
    if torch.cuda.is_available():
        return here
    all_cores = process.take_cores()
    _unname_shared_memory(here)
    return dataclasses.replace(here, all_cores=all_cores)


def _require_address(name: str) -> None:
    """Raises UserError if rank 0's host is not known here. torch would try again for as long as PATIENCE says."""
    until = time.monotonic() + ADDRESS_SECONDS
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR is {one_line(name)}, which {socket.gethostname()} does not know ({error.strerror}): "
                    "name rank 0's host or its address (for deepspeed: --master_addr)"
                ) from None
        time.sleep(1)


def _require_shared_memory(folder: Path, ranks: int) -> None:
    """Raises UserError if DeepSpeed's buffers would not fit: writing to one ends the process with a bus error."""
    needed, disk = ranks * BUFFER, os.statvfs(folder)
    free = disk.f_frsize * disk.f_bavail
    if free < needed:
        raise UserError(
            f"{folder} has {in_words(free)} left, and {ranks} rank(s) need {in_words(needed)} there: make it larger "
            "(for docker: --shm-size), or remove what is in it"
        )


@contextlib.contextmanager
def _port_of_others() -> Iterator[None]:
    """Turns torch's error about a port that is in use into a UserError."""
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on {socket.gethostname()}, perhaps by another run: "
            "give the launcher another (for deepspeed: --master_port)"
        ) from None


def _unname_shared_memory(here: world.World) -> None:
    """Unlinks this rank's block in /dev/shm as soon as every rank has mapped it. DeepSpeed 0.19's collectives on CPU
    never unlink it, so each rank of each run would leave 66 MiB of memory in use."""
    collectives.wait_for_all()
    parts = "deepspeed_allreduce_buffer", os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], here.rank
    Path("/dev/shm", "_".join(map(str, parts))).unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
