"""Signals: how a run is asked to stop, and when it does.

SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are requests. In the loop over steps they wait for the next step boundary,
where all ranks agree and save (trainer.py). Everywhere else the next start loses nothing, and a run stops at once. A
second signal ends this process at once.

Python runs a signal's handler in the main thread, and only between two of Python's instructions: a rank that waits for
another in a collective would not notice a signal. So a thread reads the signals from a pipe. The same thread watches
this rank's launchers, and what other modules add: connections and checks.
"""

import contextlib
import math
import os
import selectors
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dpo_ds.errors import Stopped
from dpo_ds.ranks import family, world

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm sends one before a job's time is over, and starts the job again
# Our launcher passes a request on as a real-time signal of its own. If a terminal has sent the signal itself to every
# process, a rank gets both, and the copy must not count as a second signal. A rank that catches these is one of ours.
PASSED_ON: dict[int, int] = {number: signal.SIGRTMIN + 10 + n for n, number in enumerate(SIGNALS)}
WAKE = signal.SIGRTMIN + 10 + len(SIGNALS)  # sent by this process to its main thread
# With a code of 0 a launcher would wait for the other ranks. Our launcher makes it 0 again.
ALONE = 128 + signal.SIGUSR1

TICK = 0.5  # seconds between two checks
GRACE = 5.0  # seconds in which the main thread may clean up when a run stops at once
# DeepSpeed's own launch.py answers a signal that each rank has had already by a SIGTERM to each rank.
ECHO = 3.0


@dataclass(frozen=True)
class Request:
    """A request to stop: what asked, and the exit code that it asks for."""

    why: str
    code: int

    @classmethod
    def of(cls, number: int) -> "Request":
        here = world.from_environment()
        where = "" if here.speaks else f" at rank {here.rank} on {os.uname().nodename}"
        return cls(signal.Signals(number).name + where, code_of(number))

    @property
    def code_alone(self) -> int:
        """The exit code of a rank that stops without the others' knowledge."""
        return ALONE if self.code == 0 and world.from_environment().size > 1 else self.code


def code_of(number: int) -> int:
    """The exit code of a run that a signal has stopped."""
    return 0 if number in REQUEUE else 128 + number


class _Watch:
    """The thread that receives requests, and their state. The main thread only reads and sets `seconds`."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say  # prints a line, with the rank if it is not rank 0
        self.lock = threading.Lock()
        self.asked: Request | None = None
        self.asked_at = 0.0
        self.signalled = False  # by a signal itself, not by a copy of one
        self.seconds: float | None = None  # how long a request may wait for a step boundary; None: it may not
        self.ends_at, self.end_code, self.last_line = math.inf, 1, ""  # when time is up, and how the process ends then
        self.raises: Request | None = None  # to be raised in the main thread
        self.at_once: Request | None = None  # one that the main thread did not wait with for a boundary
        self.launchers = family.launchers()
        words = [word for launcher in self.launchers for word in family.words_of(launcher.pid)]
        self.echo = ECHO if "deepspeed.launcher.launch" in words else 0.0
        self.checks: list[Callable[[], None]] = []  # called at every tick
        self.endings: list[Callable[[int], None]] = []  # called with the exit code before this process ends itself
        self.before: dict[int, Any] = {}  # the handlers that were there
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self.selector = selectors.DefaultSelector()
        self.read, self.write = os.pipe()
        for end in (self.read, self.write):
            os.set_blocking(end, False)

    def start(self) -> None:
        self.selector.register(self.read, selectors.EVENT_READ, self._receive)
        signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        for number in (*SIGNALS, *PASSED_ON.values()):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                self.before[number] = signal.signal(number, lambda number, frame: None)  # the pipe has it
        signal.signal(WAKE, self._wake)
        family.forks_end_with_parent()
        self.thread.start()

    def stop(self) -> None:
        self.done.set()
        os.write(self.write, bytes([WAKE]))
        self.thread.join()
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        for number in (WAKE, *PASSED_ON.values()):  # one that comes late must not kill a run that has ended well
            signal.signal(number, signal.SIG_IGN)
        self.selector.close()
        os.close(self.read)
        os.close(self.write)

    def _run(self) -> None:
        while not self.done.is_set():
            try:
                self._look()
            except Exception:  # without this thread, no signal would end the process
                traceback.print_exc()

    def _look(self) -> None:
        """Waits for what comes next, until the next tick at most."""
        for key, _ in self.selector.select(TICK):
            key.data()
        if self.asked is None and not all(launcher.alive for launcher in self.launchers):
            self.ask(Request("the end of its launcher", code_of(signal.SIGTERM)))
        for check in [*self.checks]:
            check()
        if time.monotonic() > self.ends_at:
            self.end(self.end_code, self.last_line)

    def _receive(self) -> None:
        for number in os.read(self.read, 1000):
            if number in SIGNALS:
                self.ask(Request.of(number), signalled=True)
            for asked, copy in PASSED_ON.items():
                if number == copy:
                    self.ask(Request.of(asked))

    def ask(self, request: Request, signalled: bool = False) -> None:
        """Takes a request. signalled: by a signal itself; at the second one, the process ends at once."""
        with self.lock:
            again, self.signalled = self.signalled and signalled, self.signalled or signalled
            if self.asked is not None:
                if again and time.monotonic() - self.asked_at > self.echo:
                    self.end(request.code_alone, f"{request.why} again: ended at once")
                return
            self.asked, self.asked_at = request, time.monotonic()
            if self.seconds is None:
                self.stop_at_once(request)
                return
            late = f"the step and its checkpoint took more than {self.seconds:g} seconds: ended at once"
            self.end_in(self.seconds, request.code_alone, late)
            if world.from_environment().speaks:
                self.say(f"{request.why}: the run stops and saves after this step; a second signal ends it at once")

    def stop_at_once(self, request: Request) -> None:
        """Raises Stopped in the main thread. If that does not end it, as within a collective, the process ends."""
        self.raises = self.at_once = request
        self.end_in(GRACE, request.code_alone, stopped(request).text if world.from_environment().speaks else "")
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)

    def _wake(self, number: int, frame: object) -> None:
        request, self.raises = self.raises, None
        if request is not None:
            raise stopped(request)

    def end_in(self, seconds: float, code: int, line: str) -> None:
        """Ends this process after some seconds, if it has not ended then. An earlier end stays."""
        if time.monotonic() + seconds < self.ends_at:
            self.ends_at, self.end_code, self.last_line = time.monotonic() + seconds, code, line

    def end(self, code: int, line: str) -> None:
        """Ends this process now, whatever its main thread does."""
        if line:
            self.say(f"error: {line}")
        for ending in self.endings:
            ending(code)
        os._exit(code)


def stopped(request: Request) -> Stopped:
    """What a run raises that stops at once."""
    return Stopped(f"stopped by {request.why}; to go on: {family.command()}", request.code_alone, request.why)


_watch: _Watch | None = None


@contextlib.contextmanager
def taken_over(say: Callable[[str], None]) -> Iterator[None]:
    """Takes the signals over within the block. say: prints a line, with the rank if it is not rank 0."""
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = _Watch(say)
    _watch.start()
    try:
        yield
    finally:
        if _watch is not None:  # this is no forked child
            _watch.stop()
            _watch = None


def _in_forked_child() -> None:
    """A forked child leaves the signals to its parent. SIGTERM ends it, in good order."""
    global _watch
    if _watch is not None:
        _watch = None
        signal.set_wakeup_fd(-1)  # the pipe is the parent's
        for number in (*SIGNALS, *PASSED_ON.values(), WAKE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end_child)


os.register_at_fork(after_in_child=_in_forked_child)


def _end_child(number: int, frame: object) -> None:
    raise SystemExit(code_of(number))


@contextlib.contextmanager
def at_boundaries(seconds: float) -> Iterator[None]:
    """Within it, a request waits, for so many seconds at most, until the block asks for it with `asked`. One that is
    left at the end stops the run there."""
    if _watch is None:
        yield
        return
    with _watch.lock:
        _watch.seconds = seconds
    try:
        yield
    except BaseException as end:
        with _watch.lock:
            _watch.seconds = None
            if isinstance(end, Stopped) and _watch.asked is None:
                # Another rank was asked, and its launcher passes that on once it has ended: this rank is leaving too.
                _watch.asked, _watch.asked_at = Request(end.text, end.code), time.monotonic()
        raise
    with _watch.lock:
        _watch.seconds, left = None, _watch.asked
    if left is not None:
        raise stopped(left)


def asked() -> Request | None:
    """The request that this process has had, if any."""
    return None if _watch is None else _watch.asked


def stop_now(number: int) -> None:
    """Stops this process as if it had received a signal outside the loop over steps. Returns if it cannot be stopped
    so, because nothing was installed."""
    if _watch is not None:
        raise stopped(_watch.asked or Request.of(number))


def stop_if_at_once() -> None:
    """Raises Stopped if this process was asked to stop, and not at a step boundary."""
    if _watch is not None and _watch.at_once is not None:
        raise stopped(_watch.at_once)


def ask(why: str, code: int) -> None:
    """Asks this process to stop. Called in the thread."""
    assert _watch is not None
    _watch.ask(Request(why, code))


def watch(check: Callable[[], None]) -> None:
    """Calls `check` in the thread every half second. Does nothing where nothing was installed."""
    if _watch is not None:
        _watch.checks.append(check)


def unwatch(check: Callable[[], None]) -> None:
    if _watch is not None and check in _watch.checks:
        _watch.checks.remove(check)


def listen(connection: Any, received: Callable[[], None]) -> None:
    """Calls `received` in the thread when there is something to read."""
    assert _watch is not None
    _watch.selector.register(connection, selectors.EVENT_READ, received)


def unlisten(connection: Any) -> None:
    if _watch is not None:
        with contextlib.suppress(KeyError, ValueError):
            _watch.selector.unregister(connection)


def before_an_end(ending: Callable[[int], None]) -> None:
    """Calls `ending` with the exit code when the thread ends this process."""
    assert _watch is not None
    _watch.endings.append(ending)


def end_in(seconds: float, code: int, line: str = "") -> None:
    """Ends this process after some seconds, with a line, if it has not ended then. Called in the thread."""
    assert _watch is not None
    _watch.end_in(seconds, code, line)


def end_now(code: int, line: str) -> None:
    """Ends this process, with a line. Called in the thread."""
    assert _watch is not None
    _watch.end(code, line)


def installed() -> bool:
    return _watch is not None
