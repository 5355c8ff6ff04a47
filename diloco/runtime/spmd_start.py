"""How the processes of runtime `spmd` come to be and find each other: by a launcher such as torchrun, or spawned here.

Each of them has a connection to rank 0, and a key-value store where process groups meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import multiprocessing as mp
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.context import SpawnProcess

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from diloco import workers

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun puts into the environment
LOOPBACK = "127.0.0.1"
POLL_S = 0.1
SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent is gone
KEEPALIVE_S = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10}  # so that a host which is gone is noticed within 90 s
KEEPALIVE_PROBES = 6


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine


@dataclass(frozen=True)
class Roster:
    """Which rank works for which island: those of an island follow each other, and its first one leads it."""

    workers: tuple[int, ...]  # of each island

    @property
    def size(self) -> int:
        """All processes."""
        return sum(self.workers)

    @property
    def leaders(self) -> tuple[int, ...]:
        """The rank that leads each island."""
        return tuple(accumulate(self.workers, initial=0))[:-1]

    def find(self, rank: int) -> tuple[int, int]:
        """The island of a rank, and which of its workers it is."""
        island = max(i for i, first in enumerate(self.leaders) if first <= rank)
        return island, rank - self.leaders[island]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where this process meets the others."""

    store: Store
    host: str  # this machine's address, as the others see it


@dataclass(kw_only=True)
class Party:
    """All other processes, as rank 0 has them."""

    meeting: Meeting
    connections: dict[int, Connection] = field(default_factory=dict)  # by rank
    spawned: dict[int, SpawnProcess] = field(default_factory=dict)  # by rank; none of a launcher's


def by_launcher() -> bool:
    """Whether torchrun or the like started this process, among others."""
    return all(name in os.environ for name in LAUNCHED)


def launched(size: int) -> Place | None:
    """What a launcher says that this process is; None where there is none.

    Raises ValueError where it started another number of processes than `size`.
    """
    if not by_launcher():
        return None
    rank, given = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if given != size:
        raise ValueError(
            f"runtime=spmd: the launcher started {given} process(es), but islands and workers add up to {size};"
            f" start {size}, or change islands= or workers="
        )
    return Place(rank=rank, size=size, local_rank=int(os.environ.get("LOCAL_RANK", rank)))


def spawn(size: int, serve: Callable[[int, str, Connection], None]) -> Party:
    """Start all ranks but 0 on this machine; each calls `serve` with its rank, where to meet, and its connection."""
    store = workers.meet(LOOPBACK)
    party = Party(meeting=Meeting(store=store, host=LOOPBACK))
    context = mp.get_context("spawn")
    with _without_interruptions():
        for rank in range(1, size):
            mine, theirs = context.Pipe()
            arguments = (rank, f"{LOOPBACK}:{store.port}", theirs)
            process = context.Process(target=_begin, args=(os.getpid(), serve, arguments), name=f"diloco rank {rank}")
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            party.connections[rank], party.spawned[rank] = mine, process
    return party


def _begin(parent: int, serve: Callable[[int, str, Connection], None], arguments: tuple[int, str, Connection]) -> None:
    """A spawned process: ends with its parent, and leaves signals to it."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # it may have gone before
        leave_signals()
        serve(*arguments)


def leave_signals() -> None:
    """Ignore requests to stop: rank 0 gets them too, and ends the run for all."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _without_interruptions() -> Iterator[None]:
    """What is started meanwhile ignores Ctrl-C from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def receive(place: Place) -> Party:
    """As rank 0 of a launcher's processes: wait for all others to call."""
    store, prefix = _store(place)
    key = secrets.token_bytes(32)
    connections: dict[int, Connection] = {}
    with Listener(("", 0), backlog=place.size, authkey=key) as listener:
        store.set(f"{prefix}/key", key.hex())
        store.set(f"{prefix}/port", str(listener.address[1]))
        while len(connections) < place.size - 1:
            with contextlib.suppress(mp.AuthenticationError, EOFError, ConnectionError):  # somebody else's
                connection = listener.accept()
                connections[connection.recv()] = connection
    for connection in connections.values():
        _keep_alive(connection)
    seen = [_own_address(connection) for connection in connections.values()]
    host = next((address for address in seen if not _is_loopback(address)), LOOPBACK)
    for connection in connections.values():
        connection.send(host)
    return Party(
        meeting=Meeting(store=PrefixStore(prefix, store), host=host), connections=dict(sorted(connections.items()))
    )


def call(place: Place) -> tuple[Meeting, Connection]:
    """As another of them: wait for rank 0, which may take long to prepare its data."""
    store, prefix = _store(place)
    while not store.check([f"{prefix}/port"]):  # a wait inside the store could not be interrupted
        time.sleep(POLL_S)
    address = (os.environ["MASTER_ADDR"], int(store.get(f"{prefix}/port")))
    connection = Client(address, authkey=bytes.fromhex(store.get(f"{prefix}/key").decode()))
    connection.send(place.rank)
    _keep_alive(connection)
    own, hub = _own_address(connection), connection.recv()
    host = hub if _is_loopback(own) else own
    return Meeting(store=PrefixStore(prefix, store), host=host), connection


def _store(place: Place) -> tuple[Store, str]:
    """The launcher's store, and what the keys of this run begin with: a process may train several times."""
    store = _common_store(place)
    return store, f"diloco-{store.add(f'diloco/{place.rank}', 1)}"


@functools.cache
def _common_store(place: Place) -> Store:
    """Kept to the process's end: rank 0 may host it, and others may meet for the next run before it does."""
    store: Store = next(rendezvous("env://", place.rank, place.size))[0]
    return store


def _own_address(connection: Connection) -> str:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return str(end.getsockname()[0])


def _keep_alive(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            for name, seconds in KEEPALIVE_S.items():
                end.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], seconds)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
