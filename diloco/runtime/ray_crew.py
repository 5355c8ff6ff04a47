"""The islands of a run on Ray, and its evaluator, as they come and go: placed, started, given up for lost, replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError

from diloco.events import Event, Joined, Leaving, Noticed
from diloco.messages import EVALUATOR, IslandId, Modules, SourceId
from diloco.patience import Overdue, Pulse
from diloco.runtime import ray_start
from diloco.runtime.base import Job
from diloco.runtime.ray_island import RayIsland
from diloco.runtime.ray_place import Packed, Where
from diloco.runtime.ray_refs import SAY_EVERY_S, Pending, get, get_all, mistake, say_waiting
from diloco.runtime.ray_save import Saver

MAX_FAILED_STARTS = 3  # in a row, before there is a pause
PAUSE_S = 30.0  # longer with each further one
LOOK_EVERY_S = 5.0  # whether a node is about to leave, or something is missing
MISSING_S = 15.0  # without a place, before that is said: what was ended holds its own for some seconds
SAY_MISSING_EVERY_S = 60.0


class Crew:
    """The driver's handles of the islands that there are, or that are being waited for."""

    def __init__(self, job: Job, packed: Packed, pending: Pending, saver: Saver, tell: Callable[[Event], None]) -> None:
        self.handles: dict[IslandId, RayIsland] = {}
        self.where: dict[IslandId, Where] = {}  # the worker that sends, of those that are there
        self.pulse = Pulse(patience=job.patience)
        self._job, self._packed, self._pending, self._saver, self._tell = job, packed, pending, saver, tell
        self._start_s = time.monotonic()
        self._failed: dict[IslandId, int] = {}  # starts in a row, without a finished task
        self._later: dict[IslandId, float] = {}  # to be started anew at that time
        self._coming: dict[IslandId, float] = {}  # being started, since when
        self._placed: set[IslandId] = set()  # of those
        self._looked_s, self._said_s = 0.0, -math.inf
        self.leaving: set[str] = set()  # nodes that have announced that they go away

    def now_s(self) -> float:
        """The driver's clock; a resumed run's goes on from where it was."""
        return time.monotonic() - self._start_s

    def resumed(self, now_s: float) -> None:
        """The clock goes on from there."""
        self._start_s -= now_s
        self._coming = {island: at_s + now_s for island, at_s in self._coming.items()}

    # --- the start ---

    def start(self) -> None:
        """Ask for all actors at once, so that their imports overlap. Ray keeps what has no place yet in a queue."""
        for index in [EVALUATOR, *range(self._job.islands)]:
            self.handles[IslandId(index)] = RayIsland(self._job, self._packed, IslandId(index))

    def place(self) -> list[str]:
        """Wait until there are as many islands as there is room for, of those that the run is to have.

        Returns their nodes, each once, in the order of the islands.
        """
        waiting = {handle.where(): island for island, handle in self.handles.items() if island != EVALUATOR}
        found: dict[IslandId, Where] = {}
        begun_s = said_s = time.monotonic()
        while len(found) < min(self._job.islands, ray_start.room(self._job)):  # nodes may be lost meanwhile
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
            found |= {waiting.pop(ref): get(ref) for ref in ready}
            if not ready and time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                say_waiting(said_s - begun_s, [self.name(island) for island in sorted(waiting.values())])
        self.where = found
        return list(dict.fromkeys(found[island].node for island in sorted(found)))

    def setup(self, modules: Modules) -> None:
        """Tell the islands that are there, and wait until they are ready; the others are followed."""
        self._modules = modules
        there = [EVALUATOR, *sorted(self.where)]
        get_all({f"island {i}": self.handles[i].built for i in there if i != EVALUATOR})
        answers = {island: self.handles[island].setup(modules) for island in there}
        for island, refs in answers.items():
            self._here(island, get(refs))
        for island in self.absent():
            self._follow(island)

    def absent(self) -> frozenset[IslandId]:
        """Those for which there is no place yet."""
        return frozenset(self.handles.keys() - self.where.keys())

    # --- while the run goes on ---

    def well(self, island: IslandId) -> None:
        """It has finished a task."""
        self._failed.pop(island, None)

    def replace(self, island: IslandId) -> RayIsland:
        """New actors in the place of those of an island of which one died, or of the evaluator."""
        self._saver.forget(self.handles[island])
        self._end(island)
        revived = self.handles[island] = RayIsland(self._job, self._packed, island)
        return revived

    def revive_evaluator(self) -> None:
        """A new one, at once. Raises RuntimeError where it dies again and again."""
        self._count_failure(EVALUATOR)
        if self._failed[EVALUATOR] > MAX_FAILED_STARTS:
            raise RuntimeError(f"the evaluator died {MAX_FAILED_STARTS} times without finishing a task")
        node = self.where[EVALUATOR]
        self.warn("the evaluator is gone, and is started again")
        refs = self.replace(EVALUATOR).setup(self._modules)
        self.where[EVALUATOR] = node  # where the driver is
        self.pulse.begin(EVALUATOR, "start", self.now_s())  # before what it is asked meanwhile

        def ready(answers: list[Any], error: RayError | None) -> None:
            if error is None:
                self.pulse.end(EVALUATOR, self.now_s())
                self._here(EVALUATOR, answers)

        self._pending.add(refs, ready)

    def respawn(self, island: IslandId) -> None:
        """Start an island anew; answered by `Joined`. Later, if it died again and again.

        Raises RuntimeError where nobody else is there.
        """
        self._count_failure(island)
        if self._failed[island] <= MAX_FAILED_STARTS:
            self.replace(island)
            self._follow(island)
            return
        times = f"island {island} died {self._failed[island]} times without a finished task"
        self._postpone(island, RuntimeError(times))

    def look(self) -> list[Overdue]:
        """Who has made no progress for too long; every now and then also what is missing, and who will leave."""
        now_s = self.now_s()
        for island in [island for island, at_s in self._later.items() if at_s <= now_s]:
            del self._later[island]
            self.replace(island)
            self._follow(island)
        if now_s - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now_s
            self.leaving = ray_start.draining()
            for island, where in self.where.items():
                if where.node in self.leaving and island != EVALUATOR:
                    self._tell(Leaving(now_s=now_s, island=island))
            self._say_missing(now_s)
        return self.pulse.overdue(now_s)

    def name(self, island: IslandId) -> str:
        """For people."""
        return "the evaluator" if island == EVALUATOR else f"island {island}"

    def warn(self, message: str) -> None:
        """For the log."""
        self._tell(Noticed(now_s=self.now_s(), record={"event": "warning", "message": message}))

    def kill(self) -> None:
        """End all of them."""
        for handle in self.handles.values():
            handle.kill()

    # --- inside ---

    def _count_failure(self, island: IslandId) -> None:
        self._failed[island] = self._failed.get(island, 0) + 1

    def _end(self, island: IslandId) -> None:
        """What is left of it."""
        self.handles[island].kill()
        self.pulse.drop(island)
        self.where.pop(island, None)

    def _postpone(self, island: IslandId, why: Exception) -> None:
        """It cannot be started now: again after a pause. Raises `why` where nobody else is there."""
        self._end(island)
        self._coming.pop(island, None)
        if not self.where.keys() - {EVALUATOR}:
            raise why
        pause_s = PAUSE_S * max(self._failed.get(island, 0) - MAX_FAILED_STARTS, 1)
        self._later[island] = self.now_s() + pause_s
        self.warn(f"{why}; island {island} is started again in {pause_s:.0f} s")

    def _here(self, island: IslandId, answers: list[Where]) -> None:
        """All its workers have answered where they are."""
        self.where[island] = answers[0]
        kind: dict[str, object] = {"kind": "evaluator"} if island == EVALUATOR else {"kind": "island", "island": island}
        for rank, where in enumerate(answers):
            self.record(where, {**kind, "rank": rank})

    def record(self, where: Where, names: Mapping[str, object]) -> None:
        """Tell of a process of the run: who watches it from outside knows it by its number."""
        self._tell(Noticed(now_s=self.now_s(), record={"event": "process", **names, **asdict(where)}))

    def _say_missing(self, now_s: float) -> None:
        waiting = sorted(i for i in self._coming if i not in self._placed and now_s - self._coming[i] > MISSING_S)
        if waiting and now_s - self._said_s > SAY_MISSING_EVERY_S:
            self._said_s = now_s
            self.warn(ray_start.missing(self._job, waiting))

    def _follow(self, island: IslandId) -> None:
        """See an island through its start, which may have to wait for a place."""
        handle = self.handles[island]
        self._coming[island] = self.now_s()
        self._placed.discard(island)

        def current() -> bool:
            return self.handles[island] is handle

        def placed() -> None:
            if current():
                self._placed.add(island)
                self.pulse.begin(island, "start", self.now_s())

        def ready(answers: list[Any], error: RayError | None) -> None:
            if not current():
                return
            if error is not None and not handle.broken(error):
                return self._postpone(island, mistake(error, handle.built))
            if error is not None:
                return self.respawn(island)
            # Only now, since older checkpoints are dropped while it starts.
            own = bool(self._saver.newest) and not self._job.moving
            where = list(reversed(answers[len(handle.built) :]))
            loading = handle.load(self._saver.newest, SourceId(island)) if own else []
            self._pending.add(loading, lambda found, error: loaded(found, error, where))

        def loaded(found: list[Any], error: RayError | None, where: list[Where]) -> None:
            if not current():
                return
            if error is not None or len(set(found)) > 1:  # a worker died, or that checkpoint was dropped meanwhile
                return self.respawn(island)
            self.pulse.end(island, self.now_s())
            self._coming.pop(island)
            self._here(island, where)
            self._tell(Joined(now_s=self.now_s(), island=island))

        self._pending.watch(handle.where(), placed)
        refs = [*handle.built, *reversed(handle.setup(self._modules))]
        self._pending.add(refs, ready, at_first_error=True)
