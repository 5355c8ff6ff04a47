"""Rank 0's view of the other processes of runtime `spmd`: gives orders, collects answers, and says who is gone.

By connections, not collectives: the end of a process is seen at once, long steps need no timeout, Ctrl-C is heard.
"""

from __future__ import annotations

import contextlib
import pickle
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from diloco.runtime.spmd_start import Party, Roster

BLAME_S = 3.0  # how long it may take until one sees who was the first to fail
GRACE_S = 10.0  # for processes to end by themselves


@dataclass(frozen=True, kw_only=True)
class End:
    """The run is over; `summary` is that of its end, None where it had none."""

    summary: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """In place of an answer: what a process raised. It has ended since."""

    message: str
    trace: str
    mistake: bool  # a ValueError
    consequence: bool  # of another process's end

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """What is told of `error`."""
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return cls(
            message=text,
            trace="".join(traceback.format_exception(error)),
            mistake=isinstance(error, ValueError),
            consequence=isinstance(error, ConnectionError),
        )


class Remote(Exception):
    """The traceback of another process, as the cause of an error here."""


class Hub:
    """All other processes. Each gets the same orders, and answers every one of them."""

    def __init__(self, party: Party, roster: Roster) -> None:
        self._party, self._roster = party, roster
        self._ranks = {connection: rank for rank, connection in party.connections.items()}

    def tell(self, order: object) -> None:
        """Give all the same order."""
        text = pickle.dumps(order)
        for rank, connection in self._party.connections.items():
            try:
                connection.send_bytes(text)
            except OSError:
                self.blame()
                raise self._gone(rank) from None

    def answers(self) -> list[Any]:
        """Those of all other ranks, in their order. Raises what one of them raised, or that it is gone."""
        found: dict[int, Any] = {}
        waiting = dict(self._ranks)
        while waiting:
            for connection in _ready(waiting, None):
                rank = waiting.pop(connection)
                found[rank] = _heard(connection)
                if found[rank] is None:
                    raise self._gone(rank)
                if isinstance(found[rank], Failed):
                    self.blame({rank: found[rank]})
        return [found[rank] for rank in sorted(found)]

    def blame(self, failed: Mapping[int, Failed] | None = None) -> None:
        """After an error: raise for the process that is the reason, if there is one.

        That is one that ended without a word, else one that `failed` by itself: who loses it fails soon after.
        """
        until_s = time.monotonic() + BLAME_S
        failed = dict(failed or {})
        waiting = dict(self._ranks)
        while waiting and (ready := _ready(waiting, until_s - time.monotonic())):
            for connection in ready:
                rank, heard = waiting[connection], _heard(connection)
                if isinstance(heard, Failed):
                    failed[rank] = heard
                elif heard is None:
                    del waiting[connection]
                    if rank not in failed:
                        raise self._gone(rank)
        for rank in sorted(failed, key=lambda rank: failed[rank].consequence):
            raise self._error(rank, failed[rank])

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Tell those that are still there that the run is over."""
        for connection in self._party.connections.values():
            with contextlib.suppress(OSError):
                connection.send(End(summary=summary))

    def close(self, *, at_once: bool) -> None:
        """End the processes that were spawned here."""
        until_s = time.monotonic() + (0 if at_once else GRACE_S)
        for process in self._party.spawned.values():
            process.join(max(0.0, until_s - time.monotonic()))
            process.kill()
            process.join()
            process.close()
        for connection in self._party.connections.values():
            connection.close()

    def _gone(self, rank: int) -> RuntimeError:
        how = ""
        if rank in self._party.spawned:
            process = self._party.spawned[rank]
            process.join(BLAME_S)
            status = process.exitcode
            if status is not None:
                how = f" (killed by signal {-status})" if status < 0 else f" (exit status {status})"
        return RuntimeError(f"{self._name(rank)} is gone{how}; go on with resume=")

    def _error(self, rank: int, failed: Failed) -> Exception:
        kind = ValueError if failed.mistake else RuntimeError
        error = kind(failed.message if failed.mistake else f"{self._name(rank)}: {failed.message}")
        error.__cause__ = Remote(f"\n{failed.trace}")
        return error

    def _name(self, rank: int) -> str:
        island, worker = self._roster.find(rank)
        return f"rank {rank} (island {island}{f', worker {worker}' if worker else ''})"


def _ready(connections: Mapping[Connection, int], timeout_s: float | None) -> list[Connection]:
    """Those that have said something or ended, in order of rank."""
    found = wait(list(connections), None if timeout_s is None else max(0.0, timeout_s))
    return [connection for connection in connections if connection in found]


def _heard(connection: Connection) -> Any:
    """What it says; None where it is gone."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None
