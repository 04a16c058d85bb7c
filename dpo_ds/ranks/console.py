"""A run's messages to its user, and how a command ends."""

import contextlib
import io
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from dpo_ds.errors import RunStopped, UserError
from dpo_ds.ranks import world

# Seconds that a rank above 0 waits before it reports an error. A launcher ends all ranks soon after one has ended, so a
# rank that is still alive then has an error that rank 0 did not have.
RANK_0_SPEAKS_FIRST = 5.0
QUIET_SECONDS = 20.0  # the longest time that a working run prints nothing
INTERRUPTED = "interrupted; the same command resumes from the last checkpoint (--save_every)"
BUG = "this is a bug in dpo_ds or in a library, not in your options: please report it with the lines above"
OUT_OF_MEMORY = "no memory is left for this process: lower --micro_batch_tokens, or raise the limit (ulimit -v)"
OUT_OF_GPU_MEMORY = "the GPU's memory ran out: lower --micro_batch_tokens, or set --gradient_checkpointing on"


def say(message: str) -> None:
    """One line to the user, from rank 0."""
    if world.from_environment().speaks:
        print(f"dpo_ds: {message}", flush=True)


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Wraps work that may take long: every QUIET_SECONDS, rank 0 reports that it is still running."""
    # The stream as it is now: DeepSpeed's start is run with stdout redirected, which other threads see as well.
    started, done, stream = time.monotonic(), threading.Event(), sys.stdout

    def report() -> None:
        while not done.wait(QUIET_SECONDS):
            print(f"dpo_ds: {on}: {time.monotonic() - started:.0f} s so far", file=stream, flush=True)

    if world.from_environment().speaks:
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def complain(message: str) -> None:
    """Prints one line on stderr. Ranks above 0 add their rank and host."""
    try:
        here = world.from_environment()
        who = "" if here.speaks else f"rank {here.rank} on {socket.gethostname()}: "
    except UserError:  # the environment does not say which rank this is
        who = ""
    print(f"dpo_ds: {who}{message}", file=sys.stderr, flush=True)


def run_main(main: Callable[[list[str]], object]) -> None:
    """Runs a command's main. UserError ends with one line and exit code 2, RunStopped with one line and 1. Any other
    error prints its traceback and asks the user to report it."""
    for stream in (sys.stdout, sys.stderr):  # in an ASCII locale, a name or an answer in another script is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        world.from_environment()
        main(sys.argv[1:])
    except UserError as error:
        stop(str(error), 2)
    except RunStopped as error:
        stop(str(error), 1)
    except KeyboardInterrupt:
        if world.from_environment().speaks:
            complain(f"error: {INTERRUPTED}")
        raise SystemExit(130) from None
    except MemoryError:
        stop(OUT_OF_MEMORY, 1)
    except Exception as error:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            stop(OUT_OF_GPU_MEMORY, 1)
        traceback.print_exc()
        complain(f"error: {BUG}")
        raise SystemExit(1) from None
    finally:
        leave()


def stop(message: str, code: int) -> None:
    """Prints the reason and ends this process. Ranks above 0 wait first, so that rank 0 can end the run."""
    with contextlib.suppress(UserError):  # the environment does not say which rank this is
        if not world.from_environment().speaks:
            time.sleep(RANK_0_SPEAKS_FIRST)
    complain(f"error: {message}")
    raise SystemExit(code)


def leave() -> None:
    """Leaves the process group, if this process has joined one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
