"""A run's messages to its user, and how a command ends."""

import contextlib
import faulthandler
import io
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from dpo_ds.errors import FULL, MAKE_ROOM, RunStopped, Stopped, UserError, one_line, reason_of
from dpo_ds.ranks import lifeline, process, signals, world

# Seconds that a rank above 0 waits before it reports an error. A launcher ends all ranks soon after one has ended, so a
# rank that is still alive then has an error that rank 0 did not have.
RANK_0_SPEAKS_FIRST = 5.0
QUIET_SECONDS = 20.0  # the longest time that a working run prints nothing
# Seconds that a rank waits which has lost another in a collective: the reason comes from elsewhere, and first.
REASON_FIRST = 10.0
# A folder of our launcher, in which each rank leaves a word on what it does.
WORDS = "DPO_DS_WORDS"
BUG = "this is a bug in dpo_ds or in a library, not in your options: please report it with the lines above"
OUT_OF_MEMORY = "no memory is left for this process: lower --micro_batch_tokens, or raise the limit (ulimit -v)"
OUT_OF_GPU_MEMORY = "the GPU's memory ran out: lower --micro_batch_tokens, or set --gradient_checkpointing on"


def say(message: str) -> None:
    """One line to the user, from rank 0."""
    if world.from_environment().speaks:
        print(f"dpo_ds: {message}", flush=True)


def doing(what: str) -> None:
    """Leaves a word on what this rank does, for the line with which our launcher reports its death."""
    if folder := os.environ.get(WORDS):
        with contextlib.suppress(OSError), open(os.path.join(folder, os.environ["RANK"]), "w") as file:
            file.write(what)


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Wraps work that may take long: every QUIET_SECONDS, rank 0 reports that it is still running."""
    # The stream as it is now: DeepSpeed's start is run with stdout redirected, which other threads see as well.
    started, done, stream = time.monotonic(), threading.Event(), sys.stdout

    def report() -> None:
        while not done.wait(QUIET_SECONDS):
            print(f"dpo_ds: {on}: {time.monotonic() - started:.0f} s so far", file=stream, flush=True)

    doing(on)
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


class _Lasting(io.TextIOWrapper):
    """A stream to a reader that may leave, as an ssh connection to another node's launcher does. What is written after
    that goes nowhere."""

    replaced: io.TextIOWrapper  # the stream before, of the same file

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()


def outlive_readers() -> None:
    """From now on, this process goes on if nobody reads its output any more: a run must save though its terminal or its
    connection is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not one that catches what is written, and not twice
            stream.flush()
            same = open(stream.fileno(), "wb", closefd=False)
            lasting = _Lasting(same, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            lasting.replaced = stream  # which closes the file when nobody holds it any more
            setattr(sys, name, lasting)


def run_main(main: Callable[[list[str]], object]) -> None:
    """Runs a command's main, and takes the signals over. UserError ends with one line and exit code 2, RunStopped with
    one line and 1, Stopped with one line and its code. Any other error prints its traceback and asks the user to
    report it; one that another rank's end has caused does not."""
    for stream in (sys.stdout, sys.stderr):  # in an ASCII locale, a name or an answer in another script is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash of a library shows where
    try:
        world.from_environment()
    except UserError as error:  # whatever follows asks which rank this is
        complain(f"error: {error}")
        raise SystemExit(2) from None
    with signals.taken_over(complain):
        doing("starting")
        try:
            _run(main)
        except Stopped as stopped:  # also while it ends with an error
            end_stopped(stopped)
        finally:
            leave()
            process.end_without_search()


def _run(main: Callable[[list[str]], object]) -> None:
    try:
        main(sys.argv[1:])
        lifeline.leave()
    except KeyboardInterrupt:  # where signals are not taken over, as in a thread
        raise SystemExit(130) from None
    except Exception as error:
        # What a stop interrupts may fail in its own way: numpy and torch catch it within an import, and break later.
        signals.stop_if_at_once()
        end_failed(error)


def end_failed(error: Exception) -> NoReturn:
    """Ends a run that has raised an error."""
    if isinstance(error, UserError):
        stop(str(error), 2)
    if isinstance(error, RunStopped):
        stop(str(error), 1)
    if isinstance(error, MemoryError):
        stop(OUT_OF_MEMORY, 1)
    if isinstance(error, OSError) and error.errno in FULL:
        stop(f"{error.filename or 'a file'} cannot be written: {reason_of(error)}; {MAKE_ROOM}", 1)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        stop(OUT_OF_GPU_MEMORY, 1)
    if lost_another(error):
        time.sleep(REASON_FIRST)
        stop(f"a collective failed, so another rank has ended or its node is gone: {one_line(error)}", 1)
    traceback.print_exc()
    fail(f"error: {BUG}", 1)


def end_stopped(stopped: Stopped) -> NoReturn:
    """Ends a run that was asked to stop."""
    if stopped.alone is None:
        lifeline.leave()
    else:
        lifeline.stopped(stopped.alone, stopped.code)
    if world.from_environment().speaks:
        complain(stopped.text)
    raise SystemExit(stopped.code) from None


def lost_another(error: Exception) -> bool:
    """Whether an error is that of a collective: gloo's, NCCL's or torch's own words on a connection."""
    torch = sys.modules.get("torch")
    if torch is None or world.from_environment().size == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def stop(message: str, code: int) -> NoReturn:
    """Prints the reason and ends this process. Ranks above 0 wait first, so that rank 0 can end the run."""
    if not world.from_environment().speaks:
        time.sleep(RANK_0_SPEAKS_FIRST)
    fail(f"error: {message}", code)


def fail(line: str, code: int) -> NoReturn:
    """Prints why this process ends, tells the other ranks to end, and ends."""
    complain(line)
    doing(line)
    lifeline.failed(code)
    raise SystemExit(code) from None


def leave() -> None:
    """Leaves the process group, if this process has joined one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
