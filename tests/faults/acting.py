"""Acting on the processes of a run while it goes on, from another thread, by the numbers that its metrics tell."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tests.toy import records, wait_for


def process(run: Path, kind: str, index: int = 0, rank: int = 0) -> int:
    """The newest process of an island (and rank), a shard, or of the evaluator or driver."""
    found = [
        record["pid"]
        for record in records(run, "process")
        if record["kind"] == kind and record.get(kind, 0) == index and record.get("rank", 0) == rank
    ]
    return int(found[-1])


def committed(run: Path, rounds: int) -> Callable[[], bool]:
    """Whether the run has committed so many rounds."""
    return lambda: any(record.get("total/rounds", 0) >= rounds for record in told(run))


def told(run: Path) -> list[dict[str, Any]]:
    """The lines so far, if there are any."""
    return records(run) if (run / "metrics.jsonl").exists() else []


def send(number: signal.Signals, run: Path, kind: str, index: int = 0, rank: int = 0) -> Callable[[], None]:
    """An act: send a signal to such a process."""
    return lambda: os.kill(process(run, kind, index, rank), number)


def _either(*conditions: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: any(condition() for condition in conditions)


@contextmanager
def acting(*acts: tuple[Callable[[], bool], Callable[[], None]]) -> Iterator[None]:
    """Meanwhile wait for each condition in turn, and then act. An error of an act is raised at the end."""
    errors: list[BaseException] = []
    over = threading.Event()

    def go() -> None:
        try:
            for condition, act in acts:
                wait_for(_either(over.is_set, condition), limit_s=400.0)
                assert not over.is_set(), "the run was over before it was time to act"
                act()
        except BaseException as error:
            errors.append(error)

    actor = threading.Thread(target=go, daemon=True)
    actor.start()
    try:
        yield
    finally:
        over.set()
        actor.join()
    if errors:
        raise errors[0]


def opened_when_joined(gate: Path, run: Path) -> AbstractContextManager[None]:
    """Meanwhile make the file `gate` exist as soon as the run in directory `run` tells that an island joined."""
    return acting((lambda: any(record["event"] == "joined" for record in told(run)), gate.touch))
