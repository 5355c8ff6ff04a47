"""Seats: which island lends its workers to which source, where there are as many, and where sources take turns."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from diloco.messages import Commit, IslandId, ModuleKey, Modules, ShardId, SourceId, Task
from diloco.progress import IslandView, ModuleView, SourceView
from diloco.schedule import NoMore, Schedule, Wait
from diloco.views import RunView
from diloco.waiting import Waiting


def begin(run: RunView, modules: Modules, islands: int) -> None:
    """A run at its start: source i reads shard i and trains path i modulo paths, on island i if there is one."""
    run.modules = {key: ModuleView() for key in modules.shards}
    place(run, islands)


def place(run: RunView, islands: int) -> None:
    """Give each island its source, all of them alive; those that are new, or had been away, take part from now on.

    Sources not seen before start at the present round's position. Where sources move, all that were seen before wait
    for an island.
    """
    count = len(run.shard_examples) if run.moving else islands
    run.sources = {source: view for source, view in run.sources.items() if source < count}
    for module in run.modules.values():
        module.awaited &= run.sources.keys()
    for view in run.sources.values():
        view.island = None
    for index in range(count):
        source = SourceId(index)
        if source not in run.sources:
            run.sources[source] = SourceView(
                source=source,
                shard=ShardId(index),
                path=index % len(run.paths),
                position=run.round * run.inner_steps,
                island=IslandId(index) if run.moving and index < islands else None,
            )
    run.islands.clear()
    for index in range(islands):
        run.islands[IslandId(index)] = IslandView(island=IslandId(index), source=SourceId(index % count))
    run.sit_down()
    for source_view in run.sources.values():
        _await(run, source_view)


def _await(run: RunView, source: SourceView) -> None:
    if run.free:
        return
    modules = [run.modules[key] for key in run.path_of(source).values()]
    if source.whole and not run.moving:
        source.round = source.began = max(module.round for module in modules)
    for module in modules:
        if source.segment == 0 and module.round == source.round < run.rounds:
            module.awaited.add(source.source)


def begin_anew(run: RunView, keys: Sequence[ModuleKey]) -> list[Commit]:
    """Nobody is left in the rounds of these modules: who is there takes part in the newest of them.

    Returns how the older ones end: without a step.
    """
    newest = max(run.modules[key].round for key in keys)
    for source in run.sources.values():
        if source.whole and source.began > newest:
            source.round = source.began = newest
    return [
        Commit(module=key, round=run.modules[key].round, sources=(), weights=())
        for key in keys
        if run.modules[key].round < newest
    ]


class Bench:
    """The sources without an island, where they move. A free island takes the one that is furthest back.

    A source keeps its island as long as there is no other to be trained. It is asked for again when a module that it
    lacked has stepped, so that a task costs the same however many paths there are.
    """

    def __init__(self, run: RunView, schedule: Schedule) -> None:
        self._run, self._schedule = run, schedule
        self._ready: list[tuple[int, SourceId]] = []  # a heap of (round, source): to be asked for
        self._waiting: Waiting[SourceId] = Waiting()
        self._unsaved: set[SourceId] = set()  # ready, but for what their last island is to save
        for source in run.sources.values():
            if source.island is None:
                self.sit(source)

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """What an island should do, for its own source or another, which then is its own."""
        own = run.sources[island.source]
        answer: Task | Wait | NoMore = NoMore()
        if own.island == island.island:
            answer = self._schedule.next_task(island, run, now_s)
            if isinstance(answer, Task) or not own.loose:
                return answer
        task = self._of_another(island, run, now_s)
        if task is None:
            island.source = own.source
            return Wait()
        if own.island == island.island:
            own.island = None
            self._wait(own.source, answer)
        run.sources[task.source].island = island.island
        return task

    def sit(self, source: SourceView) -> None:
        """A source has lost its island, or never had one."""
        source.island = None
        heapq.heappush(self._ready, (source.round, source.source))

    def lost(self, island: IslandId) -> list[SourceView]:
        """Those sources of which an island has taken something along: they sit here now."""
        own = [s for s in self._run.sources.values() if s.island == island or (s.saving and s.last == island)]
        for source in own:
            self._unsaved.discard(source.source)
            self.sit(source)
        return own

    def stepped(self, keys: Iterable[ModuleKey]) -> None:
        """These modules took a step: who waited for one of them may be ready."""
        for number in self._waiting.on(keys):
            self._waiting.discard(number)
            heapq.heappush(self._ready, (self._run.sources[number].round, number))

    def saved(self, source: SourceView) -> bool:
        """What belongs to it was kept; whether it was only that which another island waited for."""
        source.kept, source.saving = True, max(source.saving - 1, 0)
        waited = source.source in self._unsaved and not source.saving
        if waited:
            self._unsaved.discard(source.source)
            self.sit(source)
        return waited

    def _of_another(self, island: IslandView, run: RunView, now_s: float) -> Task | None:
        while self._ready:
            _, island.source = heapq.heappop(self._ready)
            source = run.sources[island.source]
            if source.saving:
                self._unsaved.add(source.source)
            if source.saving or source.island is not None:
                continue
            answer = self._schedule.next_task(island, run, now_s)
            if isinstance(answer, Task):
                return answer
            self._wait(island.source, answer)
        return None

    def _wait(self, source: SourceId, answer: Task | Wait | NoMore) -> None:
        if isinstance(answer, Wait):
            self._waiting.add(source, answer.keys)


def hand_over(source: SourceView, island: IslandView) -> bool:
    """Before a task: whether the island is to take up what was kept of a source that it does not have.

    Notes what the island holds then: what it held when that was kept, or nothing.
    """
    if (island.trains, source.last) == (source.source, island.island):
        return False
    fresh = island.trains is None and not source.kept  # it has the values that the run starts with, if any
    island.trains, source.last = source.source, island.island
    if not fresh:
        island.holds = {} if source.whole or not source.kept else dict(source.held)
    return source.kept


def note(task: Task, source: SourceView, island: IslandView) -> None:
    """A task was given out: what its island holds then, and whether it may go on without the source."""
    source.held = {} if task.sheds else dict(island.holds)
    source.loose = task.save
    source.saving += task.save
