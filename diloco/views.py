"""What the coordinator knows of a run: plain data, updated event by event, checkpointed as JSON."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diloco.counters import Counters
from diloco.messages import (
    EVALUATOR,
    Commit,
    IslandId,
    ModuleKey,
    Modules,
    Report,
    ShardId,
    SlotName,
    SourceId,
    Task,
    Turn,
)
from diloco.progress import SourceView

REMEMBERED_TURNS = 1000  # of the last so many is known when they were opened
OBSERVED_ARRIVALS = 16  # of a source: of the last so many is known how long they took


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A sound contribution that waits for its commit; one record for all modules that it is to."""

    examples: float  # its weight
    tokens: int  # trained on for it
    norm: float  # over all those modules


@dataclass(kw_only=True)
class ModuleView:
    """What is known of one module."""

    version: int = 0  # outer steps taken
    round: int = 0  # the round that its next commit belongs to
    awaited: set[SourceId] = field(default_factory=set)  # who takes part in that round and was not heard yet
    arrivals: dict[SourceId, Arrival] = field(default_factory=dict)
    rejected: int = 0  # contributions to that round that were refused
    dropped: int = 0  # contributions to that round that the schedule left out

    @property
    def heard(self) -> bool:
        """Whether anybody has finished the present round."""
        return bool(self.arrivals or self.rejected or self.dropped)


@dataclass(kw_only=True)
class IslandView:
    """One island now, or the evaluator; not checkpointed, since islands come and go."""

    island: IslandId
    source: SourceId
    alive: bool = True
    queued: int = 0  # tasks given out and not finished
    holds: dict[ModuleKey, int] = field(default_factory=dict)  # the versions that it has installed

    def give(self, task: Task) -> dict[ModuleKey, int | None]:
        """What is to be pulled for a task: what it does not hold, as updates on what it does."""
        asked = {task.modules[slot]: version for slot, version in task.install.items()}
        wants = {key: self.holds.get(key) for key, version in asked.items() if self.holds.get(key) != version}
        self.holds |= asked
        return wants


@dataclass(kw_only=True)
class RunView:
    """Settings of the run and the state of its sources and modules."""

    seed: int
    rounds: int
    inner_steps: int
    segment_steps: int  # 0 = rounds are not cut
    eval_every: int  # rounds; 0 = only at the start and the end
    save_every: int  # rounds; 0 = only at the end
    paths: tuple[Mapping[SlotName, ModuleKey], ...]
    shard_examples: list[int]  # by shard
    fragments: tuple[tuple[SlotName, ...], ...] = ()  # slots that are exchanged together; () = all at once
    sources: dict[SourceId, SourceView] = field(default_factory=dict)
    islands: dict[IslandId, IslandView] = field(default_factory=dict)
    modules: dict[ModuleKey, ModuleView] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    ahead: Counters = field(default_factory=Counters)  # of `counters`: what was finished of rounds after the present
    round: int = 0  # rounds that all modules have committed
    opened_s: dict[tuple[int, int], float] = field(default_factory=dict)  # when (round, fragment) began to be awaited
    evaluator: IslandView = field(default_factory=lambda: IslandView(island=EVALUATOR, source=SourceId(0)))
    arrival_s: dict[SourceId, deque[float]] = field(default_factory=dict)  # how long after that its source was heard

    def __post_init__(self) -> None:
        self.fragments = self.fragments or (tuple(self.paths[0]),)
        places = [(slot, index) for index, slots in enumerate(self.fragments) for slot in slots]
        self._fragment_of = {path[slot]: index for path in self.paths for slot, index in places}
        # Kept, so that nothing need look through all islands to find those that share a module.
        self._paths_through: dict[ModuleKey, list[int]] = {}
        for index, key in ((index, key) for index, path in enumerate(self.paths) for key in path.values()):
            self._paths_through.setdefault(key, []).append(index)

    def begin(self, modules: Modules, islands: int) -> None:
        """A run at its start: source i contributes for island i, reads shard i and trains path i modulo paths."""
        self.modules = {key: ModuleView() for key in modules.shards}
        self.place_sources(islands)

    def hold(self, held: Mapping[IslandId, Iterable[ModuleKey]]) -> None:
        """These islands, and the evaluator, have the values that these modules start with."""
        for island, keys in held.items():
            view = self.evaluator if island == EVALUATOR else self.islands[island]
            view.holds = dict.fromkeys(keys, 0)

    def place_sources(self, islands: int) -> None:
        """Give each island its source, all of them alive; those that are new, or had been away, take part from now on.

        Sources not seen before start at the present round's position.
        """
        self.islands.clear()
        self._islands_on: list[list[IslandView]] = [[] for _ in self.paths]
        self.sources = {source: view for source, view in self.sources.items() if source < islands}
        for module in self.modules.values():
            module.awaited &= self.sources.keys()
        for index in range(islands):
            source = SourceId(index)
            if source not in self.sources:
                position = self.round * self.inner_steps
                self.sources[source] = SourceView(
                    source=source, shard=ShardId(index), path=index % len(self.paths), position=position
                )
            view = self.sources[source]
            self.islands[IslandId(index)] = island = IslandView(island=IslandId(index), source=source)
            self._islands_on[view.path].append(island)
            modules = [self.modules[key] for key in self.path_of(view).values()]
            if view.whole:
                view.round = view.began = max(module.round for module in modules)
            for module in modules:
                if view.segment == 0 and module.round == view.round < self.rounds:
                    module.awaited.add(view.source)

    def path_of(self, source: SourceView) -> Mapping[SlotName, ModuleKey]:
        """Which module fills which slot for `source`."""
        return self.paths[source.path]

    def fragment_of(self, key: ModuleKey) -> int:
        """With which fragment a module is exchanged."""
        return self._fragment_of[key]

    def keys(self, source: SourceView, fragment: int) -> list[ModuleKey]:
        """The modules that `source` exchanges with a fragment."""
        path = self.path_of(source)
        return [path[slot] for slot in self.fragments[fragment]]

    def count(self, report: Report) -> None:
        """An island's finished task."""
        lone = len(self.islands) == 1
        self.counters.count(report, lone=lone)
        if report.task.round > self.round:
            self.ahead.count(report, lone=lone)

    def started(self, now_s: float) -> None:
        """From now on the present rounds are awaited."""
        for key, module in self.modules.items():
            self.opened_s.setdefault((module.round, self.fragment_of(key)), now_s)

    def drop(self, task: Task) -> list[ModuleKey]:
        """A source ended its turn without contributing; its modules that are in that round."""
        exchanged = self.keys(self.sources[task.source], task.fragment)
        keys = [key for key in exchanged if self.modules[key].round == task.round]
        for module in map(self.modules.__getitem__, keys):
            module.awaited.discard(task.source)
            module.dropped += 1
        return keys

    def observe(self, turn: Turn, now_s: float) -> None:
        """A contribution arrived, perhaps too late: how long did it take?"""
        opened_s = self.opened_s.get((turn.round, turn.fragment))
        if opened_s is not None:
            self.arrival_s.setdefault(turn.source, deque(maxlen=OBSERVED_ARRIVALS)).append(now_s - opened_s)

    def open_rounds(self, keys: Sequence[ModuleKey], now_s: float) -> None:
        """Await, for a module's present round, all living islands whose path holds it and that take part by then."""
        alike: dict[tuple[int, tuple[int, ...]], list[ModuleKey]] = {}
        for key in keys:
            alike.setdefault((self.modules[key].round, tuple(self._paths_through[key])), []).append(key)
        for (round_, paths), group in alike.items():
            self.opened_s.setdefault((round_, self.fragment_of(group[0])), now_s)
            if len(self.opened_s) > REMEMBERED_TURNS:
                del self.opened_s[next(iter(self.opened_s))]  # the oldest
            if round_ == self.rounds:
                continue
            there = [island.source for path in paths for island in self._islands_on[path] if island.alive]
            there = [source for source in there if self.sources[source].began <= round_]
            for key in group:
                self.modules[key].awaited.update(there)

    def commit(self, commits: Sequence[Commit], now_s: float) -> None:
        """The modules took these steps, or ended their round without one; their next round opens."""
        self.counters.outer_steps += len({self.fragment_of(commit.module) for commit in commits if commit.sources})
        distinct = {(c.sources, self.fragment_of(c.module)): self.modules[c.module].arrivals for c in commits}
        tokens = [arrivals[source].tokens for (sources, _), arrivals in distinct.items() for source in sources]
        self.counters.accepted += len(tokens)
        self.counters.tokens += sum(tokens)
        for commit in commits:
            module = self.modules[commit.module]
            module.version += bool(commit.sources)
            module.round, module.rejected, module.dropped = module.round + 1, 0, 0
            module.arrivals, module.awaited = {}, set()
        self.open_rounds([commit.module for commit in commits], now_s)

    def begin_anew(self, keys: Sequence[ModuleKey]) -> list[Commit]:
        """Nobody is left in the rounds of these modules: who is there takes part in the newest of them.

        Returns how the older ones end: without a step.
        """
        newest = max(self.modules[key].round for key in keys)
        for source in self.sources.values():
            if source.whole and source.began > newest:
                source.round = source.began = newest
        return [
            Commit(module=key, round=self.modules[key].round, sources=(), weights=())
            for key in keys
            if self.modules[key].round < newest
        ]

    def bare_task(self, island: IslandId, source: SourceView) -> Task:
        """A task that installs, trains and sends nothing: to evaluate, or to save what the source has."""
        return Task(
            source=source.source,
            island=island,
            round=self.round,
            segment=0,
            modules=self.path_of(source),
            install={},
            keep=0.0,
            shard=source.shard,
            first_step=source.position,
            steps=0,
            send=(),
            last=False,
        )

    def evaluation(self) -> Task:
        """The evaluator installs the present global weights and measures them."""
        task = self.bare_task(EVALUATOR, next(iter(self.sources.values())))
        versions = {slot: self.modules[key].version for slot, key in task.modules.items()}
        return replace(task, install=versions, evaluate="validation")

    def save_due(self, round_: int) -> bool:
        """Whether a checkpoint is written once `round_` rounds are committed."""
        return round_ == self.rounds or (self.save_every > 0 and round_ % self.save_every == 0)

    def eval_due(self, round_: int) -> bool:
        """Whether the global weights are evaluated once `round_` rounds are committed."""
        return round_ in (0, self.rounds) or (self.eval_every > 0 and round_ % self.eval_every == 0)

    def restart_rounds(self) -> None:
        """Forget what happened within the present round, so that all train it from its start."""
        for source in self.sources.values():
            source.lose()
            source.round = source.began = self.round
            source.restart(self.round * self.inner_steps)
        for module in self.modules.values():
            module.round, module.rejected, module.dropped = self.round, 0, 0
            module.arrivals.clear()
            module.awaited.clear()
        self.open_rounds(list(self.modules), 0.0)
