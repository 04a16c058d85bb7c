"""DeepSpeed's launch.py, which starts a node's ranks, as our `deepspeed` command runs it: ranks get the time to save.

DeepSpeed's own kills its ranks at SIGTERM and SIGINT, leaves them running at other signals, and reports a dead rank by
the command line of the last one. This one passes a signal on and waits for the ranks, and says in one line which rank
died of what. Ranks that are no run of dpo_ds are treated as DeepSpeed does. Started as
`python -m dpo_ds.engine.launch`, with the arguments of deepspeed.launcher.launch.
"""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from dpo_ds.errors import one_line
from dpo_ds.ranks import console, family, lifeline, process, signals

# Seconds that ranks have to end after the first of them, if that one was stopped by a signal: they are leaving as well.
LEAVING = 30.0
LOOK_EVERY = 0.1  # seconds between two looks at the ranks; launch.py's own second would be part of each run's time

Handler = Callable[[int, FrameType | None], Any]


class Rank:
    """A rank that was started here."""

    def __init__(self, number: str, process: subprocess.Popen):
        self.number, self.process = number, process

    @property
    def ours(self) -> bool:
        """Whether it is a run of dpo_ds that takes requests."""
        return self.process.poll() is None and family.catches(self.process.pid, signals.PASSED_ON[signal.SIGTERM])


class Node:
    """This node's ranks, and what becomes of them. words: a folder in which ranks say what they do."""

    def __init__(self, words: Path):
        self.words = words
        self.ranks: list[Rank] = []
        self.asked: int | None = None  # the signal that this process has had
        self.signalled = False  # by a signal itself, not by a copy of one
        self.deepspeeds: Handler | None = None  # launch.py's handler

    def start(self, command: list[str], env: dict[str, str], **more: Any) -> subprocess.Popen:
        """Starts a rank, for launch.py."""
        process = subprocess.Popen(command, env=env, **more)
        self.ranks.append(Rank(env["RANK"], process))
        return process

    def received(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on, or at the second one ends the ranks. Where no rank takes requests, DeepSpeed's way."""
        copies = {copy: asked for asked, copy in signals.PASSED_ON.items()}
        asked = copies.get(number, number)
        signalled = number not in copies
        again, self.signalled = self.signalled and signalled, self.signalled or signalled
        if again:
            self.kill()
            raise SystemExit(signals.code_of(asked))
        if self.asked is not None:
            return
        self.asked = asked
        takers = [rank for rank in self.ranks if rank.ours]
        for rank in takers:
            family.send(rank.process.pid, signals.PASSED_ON[asked])
        if takers:
            return
        try:
            if self.deepspeeds is not None:
                self.deepspeeds(signal.SIGTERM, frame)
        finally:
            raise SystemExit(signals.code_of(asked))

    def ended(self, plain: Callable[[int], None], pid: int) -> None:
        """Called by launch.py instead of `plain`, for each of its ranks, once one has ended with another code than 0 or
        a signal came."""
        bad = [rank for rank in self.ranks if rank.process.poll() not in (None, 0)]
        if not bad or not self.ours:
            plain(pid)
            return
        first = min(bad, key=lambda rank: rank.process.returncode)  # death by a signal first
        code = first.process.returncode
        number = -code if code < 0 else code - 128
        if number in signals.SIGNALS:  # by itself, or before it took signals over
            self.leave(number)
        else:
            self.report(first)
            self.kill()
        raise SystemExit(exit_code(code))

    @property
    def ours(self) -> bool:
        """Whether the ranks are a run of dpo_ds: they have left a word."""
        return any(self.words.iterdir())

    def leave(self, number: int) -> None:
        """Waits for ranks that are leaving because of a signal. One that is stuck is killed."""
        for rank in self.ranks:
            if rank.ours:
                family.send(rank.process.pid, signals.PASSED_ON[number])
        until = time.monotonic() + LEAVING
        while time.monotonic() < until and any(rank.process.poll() is None for rank in self.ranks):
            time.sleep(0.1)
        self.kill()

    def kill(self) -> None:
        """Ends every process below this one."""
        for pid in family.descendants():
            family.send(pid, signal.SIGKILL)

    def report(self, rank: Rank) -> None:
        """The line on a rank that has died. One that ended with 1 or 2 has said why itself."""
        code = rank.process.returncode
        if code in (1, 2):
            return
        how = f"exit code {code}"
        if code < 0:
            memory = ", as the kernel sends when memory runs out" if -code == signal.SIGKILL else ""
            how = f"signal {-code} ({_name(-code)}{memory})"
        with contextlib.suppress(OSError):
            if last := one_line((self.words / rank.number).read_text(), None):
                how += f"; the last that it did: {last}"
        console.complain(
            f"error: rank {rank.number} on {socket.gethostname()} (process {rank.process.pid}) ended with {how}; start "
            "again to go on from the last checkpoint"
        )


def _name(number: int) -> str:
    return signal.Signals(number).name if number in [*signal.Signals] else signal.strsignal(number) or "unknown"


def exit_code(code: int) -> int:
    """A process's exit code, from what subprocess says: death by a signal becomes 128 + its number, and a rank that
    alone was asked to stop and be started again 0."""
    code = 128 - code if code < 0 else code
    return 0 if code in [128 + number for number in signals.REQUEUE] else code


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="dpo_ds-") as folder:
        node = Node(Path(folder))
        for number in (*signals.SIGNALS, *signals.PASSED_ON.values()):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, node.received)
        family.adopt_orphans()
        if (parent := os.environ.pop(PARENT, None)) is not None:
            # A copy of SIGTERM: the kernel may send this signal once for each of the parent's threads, and a second
            # SIGTERM would end the ranks before they have saved.
            family.end_with_parent(signals.PASSED_ON[signal.SIGTERM], int(parent))
        os.environ[lifeline.OUR_LAUNCHER] = str(os.getpid())
        os.environ[console.WORDS] = folder
        try:
            run(node)
        except SystemExit as end:
            raise SystemExit(exit_code(end.code) if isinstance(end.code, int) else end.code) from None
        finally:
            if node.ours or node.asked is not None:
                node.kill()
            process.end_without_search()


PARENT = "DPO_DS_PARENT"  # the process id of our command


def run(node: Node) -> None:
    """Runs DeepSpeed's launch.py with four of the functions that it calls replaced, in this process alone: starting a
    rank, taking a signal over, ending a rank, and the wait between two looks at the ranks."""
    from deepspeed.launcher import launch

    plain = launch.terminate_process_tree

    def keep(number: int, handler: Handler) -> None:
        node.deepspeeds = handler

    launch.subprocess = SimpleNamespace(Popen=node.start)
    launch.signal = SimpleNamespace(signal=keep, SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM)
    launch.time = SimpleNamespace(**{**vars(time), "sleep": lambda _: time.sleep(LOOK_EVERY)})
    launch.terminate_process_tree = lambda pid: node.ended(plain, pid)
    launch.main()


if __name__ == "__main__":
    main()
