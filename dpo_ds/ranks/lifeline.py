"""A connection from every rank to rank 0, by which a rank's end is noticed at once.

The kernel closes a process's connections however it ends. So rank 0 notices the end of every other rank, tells the
others, and they notice rank 0's. A node that is gone is noticed by keepalive, within a minute. A rank that ends in good
order says so first, and one that fails says that it has said why. Nothing is sent while all is well.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from functools import partial

from dpo_ds.ranks import collectives, signals, world

OUR_LAUNCHER = "DPO_DS_LAUNCHER"  # set by engine/launch.py, which says itself how a rank ended
JOINING = 20.0  # seconds
# A launcher shall notice the first rank's end before that of the others.
LAUNCHER_FIRST = 2.0
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, tries


class _Connection:
    """A connection to another rank; read in the thread of ranks/signals.py."""

    def __init__(self, link: socket.socket, received: Callable[[dict], None], lost: Callable[[], None]):
        self.link, self.received, self.lost = link, received, lost
        self.text = b""
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            with contextlib.suppress(AttributeError, OSError):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        signals.listen(link, self._read)

    def send(self, **facts: object) -> None:
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(facts).encode() + b"\n")

    def _read(self) -> None:
        try:
            found = self.link.recv(4096)
        except OSError:
            found = b""
        if not found:
            self.close()
            self.lost()
            return
        *lines, self.text = (self.text + found).split(b"\n")
        for line in lines:
            self.received(json.loads(line))

    def close(self) -> None:
        signals.unlisten(self.link)
        self.link.close()


class _Lifeline:
    """This rank's connections: rank 0 has one to each other rank, and the others have one to rank 0."""

    def __init__(self, places: list[str]):
        self.places = places  # each rank's host and process
        self.here = world.from_environment()
        self.connections: dict[int, _Connection] = {}
        self.left: set[int] = set()  # ranks that ended in good order, or have said why they did not
        self.welcome = threading.Event()  # rank 0 knows this rank
        if self.here.speaks:
            self.welcome.set()
        self.token = ""
        self.server: socket.socket | None = None

    def serve(self) -> int:
        """Listens, on rank 0. Returns the port."""
        self.token = secrets.token_hex(16)
        if socket.has_dualstack_ipv6():
            self.server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self.server = socket.create_server(("", 0))
        signals.listen(self.server, self._accept)
        return self.server.getsockname()[1]

    def connect(self, port: int, token: str) -> None:
        """Connects to rank 0, and waits for its answer: until then, its end would not be noticed. Where that cannot be
        done, as behind a firewall, the run goes on without."""
        try:
            link = socket.create_connection((os.environ["MASTER_ADDR"], port), JOINING)
        except OSError:
            return
        link.settimeout(None)
        self._add(0, link)
        self.connections[0].send(rank=self.here.rank, token=token)
        self.welcome.wait(JOINING)

    def _accept(self) -> None:
        assert self.server is not None
        link, _ = self.server.accept()
        link.settimeout(JOINING)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            hello = json.loads(link.makefile("rb", buffering=0).readline(1000))
            if secrets.compare_digest(str(hello["token"]), self.token):
                link.settimeout(None)
                self._add(int(hello["rank"]), link)
                self.connections[int(hello["rank"])].send(welcome=True)
                if len(self.connections) == self.here.size - 1:
                    signals.unlisten(self.server)
                    self.server.close()
                return
        link.close()

    def _add(self, rank: int, link: socket.socket) -> None:
        self.connections[rank] = _Connection(link, partial(self._received, rank), partial(self._lost, rank))

    def _received(self, rank: int, facts: dict) -> None:
        if "welcome" in facts:
            self.welcome.set()
            return
        self.left.add(rank)
        if self.here.speaks and "left" not in facts:
            self.tell(**facts)
        if "stop" in facts:
            signals.ask(facts["stop"], facts["code"])
        if "code" in facts:  # a rank that fails for the same reason has time to say so itself
            signals.end_in(2 * signals.GRACE if "stop" in facts else signals.GRACE, facts["code"])

    def _lost(self, rank: int) -> None:
        del self.connections[rank]
        if rank in self.left or not self.welcome.is_set():
            return
        self.tell(code=1)
        died = f"rank {rank} on {self.places[rank]} has died; start again to go on from the last checkpoint"
        first = 1 if rank == 0 else 0  # of the ranks that are left
        speaks = self.here.rank == first and OUR_LAUNCHER not in os.environ
        signals.end_in(LAUNCHER_FIRST, 1, died if speaks else "")

    def tell(self, **facts: object) -> None:
        """Sends this to all ranks, from rank 0; else to rank 0."""
        for connection in [*self.connections.values()]:
            connection.send(**facts)


_lifeline: _Lifeline | None = None


def tie() -> None:
    """Connects the ranks, by all of them together, once they have joined."""
    global _lifeline
    here = world.from_environment()
    places = collectives.gather(f"{socket.gethostname()} (process {os.getpid()})" if signals.installed() else None)
    if here.size == 1 or _lifeline is not None or None in places:
        return
    _lifeline = _Lifeline([str(place) for place in places])
    port, token = collectives.from_rank_0((_lifeline.serve(), _lifeline.token) if here.speaks else (0, ""))
    if not here.speaks:
        _lifeline.connect(port, token)
    signals.before_an_end(failed)


def leave() -> None:
    """Says that this rank's end is in good order."""
    if _lifeline is not None:
        _lifeline.tell(left=True)


def failed(code: int) -> None:
    """Says that this rank ends with an error, and has said why: the others end as well, and say nothing."""
    if _lifeline is not None:
        _lifeline.tell(code=code)


def stopped(why: str, code: int) -> None:
    """Says that this rank stops, because it alone was asked to: the others stop as well."""
    if _lifeline is not None:
        _lifeline.tell(stop=why, code=code)
