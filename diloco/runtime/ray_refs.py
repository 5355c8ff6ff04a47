"""Requests to actors that are under way, and what to do with their answers. The driver's only waiting point."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from diloco.runtime.base import StoreLost

Ref: TypeAlias = Any  # ray.ObjectRef, whose parameter says nothing here
Then: TypeAlias = Callable[[list[Any], RayError | None], None]

GONE = (RayActorError, OutOfMemoryError)  # an actor that is no more; Ray itself ends some where memory is short
LOST = (*GONE, ObjectLostError)
SAY_EVERY_S = 20.0
SHOWN = 5  # names in a list
NOT_IMPORTED = "failed to import on the worker"  # Ray's words where an actor's class is not there
OTHERS_S = 5.0  # how long to wait for what other workers say of an error


@dataclass(kw_only=True)
class _Gather:
    answers: list[Any]
    waiting: int
    then: Then
    at_first_error: bool
    error: RayError | None = None


class Pending:
    """References not yet answered, each belonging to a group whose `then` is called once with all answers."""

    def __init__(self) -> None:
        self._gathers: dict[Ref, tuple[_Gather, int]] = {}
        self._watched: dict[Ref, Callable[[], None]] = {}

    def add(self, refs: Sequence[Ref], then: Then, *, at_first_error: bool = False) -> None:
        """When all are answered, call `then(answers, None)`, or `then([], error)` with the first failure.

        `at_first_error`: do not wait for the other answers then, which may never come.
        """
        if not refs:
            return then([], None)
        gather = _Gather(answers=[None] * len(refs), waiting=len(refs), then=then, at_first_error=at_first_error)
        for index, ref in enumerate(refs):
            self._gathers[ref] = (gather, index)

    def watch(self, ref: Ref, then: Callable[[], None]) -> None:
        """When it is answered, call `then()`. The answer itself stays where it is."""
        self._watched[ref] = then

    def wait(self, timeout_s: float) -> bool:
        """Handle one answer. False where none came in time."""
        refs = [*self._watched, *self._gathers]
        if not refs:
            time.sleep(timeout_s)
        if not refs or not ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)[0]:
            return False
        there = set(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        first = next(ref for ref in refs if ref in there)  # in the order of asking; Ray tells of them in any
        if first in self._watched:
            self._watched.pop(first)()
            return True
        gather, index = self._gathers.pop(first)
        try:
            gather.answers[index] = ray.get(first)
        except RayError as error:
            gather.error = gather.error or error
        gather.waiting -= 1
        if gather.error is not None and gather.at_first_error:
            self._gathers = {ref: entry for ref, entry in self._gathers.items() if entry[0] is not gather}
            gather.waiting = 0
        if gather.waiting == 0:
            gather.then(gather.answers if gather.error is None else [], gather.error)
        return True

    def clear(self) -> None:
        """Forget all of them."""
        self._gathers.clear()
        self._watched.clear()


def get(refs: Any) -> Any:
    """`ray.get`, raising what the actor raised rather than Ray's wrapping of it."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        raise cause(error) from None
    except ActorDiedError as error:
        if NOT_IMPORTED not in str(error):
            raise
        node, why = re.search(r"ip=([^,)]+)", str(error)), str(error).strip().splitlines()[-1]
        raise ValueError(
            f"node {node[1] if node else '?'} has another version of the project, or none ({why}); install the same"
            " version on all nodes"
        ) from error


@contextmanager
def starting() -> Iterator[None]:
    """Where a process is lost meanwhile, alone or with its node, the run can begin again: raises StoreLost."""
    try:
        yield
    except GONE as error:
        if not died(error):
            raise
        raise StoreLost(f"a process was lost while the run started: {short(error)}") from error


def get_all(refs: Mapping[str, Sequence[Ref]]) -> None:
    """Wait for what these names stand for, raising what an actor raised; say for whom every now and then."""
    start_s = time.monotonic()
    waiting = {ref: name for name, answers in refs.items() for ref in answers}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=SAY_EVERY_S)
        for ref in ready:
            get(ref)
            del waiting[ref]
        if not ready:
            say_waiting(time.monotonic() - start_s, list(dict.fromkeys(waiting.values())))


def say_waiting(seconds: float, names: Sequence[str]) -> None:
    """On stderr, while a run starts."""
    print(f"waiting since {seconds:.0f} s for {listed(names)} to start", file=sys.stderr, flush=True)


def listed(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def cause(error: Exception) -> Exception:
    """What an actor's method raised, where it is a user's mistake or the system's refusal; else the error itself."""
    inner = error.cause if isinstance(error, RayTaskError) else None
    return inner if isinstance(inner, ValueError | OSError) else error


def died(error: Exception) -> bool:
    """Whether the actor that was asked is gone, and not one that it asked in turn."""
    return isinstance(error, GONE) and not isinstance(error, RayTaskError)


def mistake(error: RayError, others: Sequence[Ref]) -> Exception:
    """What to tell of `error`: where another of these answers is a mistake, that; the rest follows from it.

    A worker that finds a mistake leaves its island, and those left see only that.
    """
    found = [cause(error)]
    for ref in ray.wait(list(others), num_returns=len(others), timeout=OTHERS_S)[0]:
        try:
            ray.get(ref)
        except RayError as other:
            found.append(cause(other))
    return next((e for e in found if not isinstance(e, RayError)), found[0])


def raise_errors(answers: list[Any], error: RayError | None) -> None:
    """What to do with answers that say nothing."""
    if error is not None:
        raise cause(error) from None


def short(error: Exception) -> str:
    """The error in one line."""
    error = cause(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {lines[0] if lines else ''}"
