"""How a process of runtime `spmd` other than rank 0 spends the run: it hears orders, carries them out, and answers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from torch._C._distributed_c10d import TCPStore

from diloco.runtime.base import Abandoned
from diloco.runtime.spmd_hub import End, Failed
from diloco.runtime.spmd_member import Member
from diloco.runtime.spmd_orders import Answer, Hello
from diloco.runtime.spmd_start import LOOPBACK, Meeting, Place, leave_signals


def serve(connection: Connection, meeting: Meeting, place: Place) -> Mapping[str, Any]:
    """Follow rank 0 to the run's end; returns its summary. Raises Abandoned where it has none."""
    member: Member | None = None
    try:
        while not isinstance(order := _heard(connection), End):
            if isinstance(order, Hello):
                leave_signals()
                member, answer = Member(order, meeting, place), Answer()
            else:
                assert member is not None
                answer = member.carry_out(order)
            connection.send(answer)
    except Abandoned:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(Failed.of(error))
        raise Abandoned("") from error
    finally:
        if member is not None:
            member.close()
    if order.summary is None:
        raise Abandoned("")
    return order.summary


def _heard(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise Abandoned("rank 0 is gone; go on with resume=") from error


def serve_spawned(rank: int, meeting: str, connection: Connection) -> None:
    """What a process that rank 0 spawned does; rank 0 says what went wrong in it."""
    host, _, port = meeting.rpartition(":")
    store = TCPStore(host, int(port), is_master=False)
    try:
        serve(connection, Meeting(store=store, host=LOOPBACK), Place(rank=rank, local_rank=rank))
    except Abandoned:
        os._exit(1)
