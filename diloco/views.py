"""What the coordinator knows of a run: plain data, updated event by event, checkpointed as JSON."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
from diloco.pool import Pool, Stretch
from diloco.progress import IslandView, ModuleView, SourceView

REMEMBERED_TURNS = 1000  # of the last so many is known when they were opened
OBSERVED_ARRIVALS = 16  # of a source: of the last so many is known how long they took


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
    pool: Pool | None = None  # where sources run free of each other: the data that they draw from
    gathered: dict[IslandId, float] = field(default_factory=dict)  # handed over and free -> when they may go on
    sources: dict[SourceId, SourceView] = field(default_factory=dict)
    islands: dict[IslandId, IslandView] = field(default_factory=dict)
    modules: dict[ModuleKey, ModuleView] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    ahead: Counters = field(default_factory=Counters)  # of `counters`: what was finished of rounds after the present
    round: int = 0  # rounds that all modules have committed
    opened_s: dict[tuple[int, int], float] = field(default_factory=dict)  # when (round, fragment) began to be awaited
    evaluator: IslandView = field(default_factory=lambda: IslandView(island=EVALUATOR, source=SourceId(0)))
    pushes_s: deque[float] = field(default_factory=lambda: deque(maxlen=OBSERVED_ARRIVALS))  # to hand something over
    turn_ends_s: dict[int, float] = field(default_factory=dict)  # when who was first in a turn is expected at its end
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
            if view.whole and self.pool is None:
                view.round = view.began = max(module.round for module in modules)
            for module in modules:
                if view.segment == 0 and module.round == view.round < self.rounds and self.pool is None:
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

    def trained(self, report: Report, now_s: float) -> None:
        """An island finished a task."""
        source = self.sources[report.task.source]
        source.trained(report, now_s)
        if self.pool is not None:
            source.free_s = now_s + source.ahead * (source.pace_s or 0.0)
        lone = len(self.islands) == 1
        self.counters.count(report, lone=lone)
        if report.task.round > self.round:
            self.ahead.count(report, lone=lone)

    def started(self, now_s: float) -> None:
        """From now on the present rounds are awaited."""
        if self.pool is not None:
            idle = [island for island, view in self.islands.items() if self.sources[view.source].idle]
            self.gathered = {island: self.gathered.get(island, now_s) for island in idle}
            return
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

    def gather(self, island: IslandId, ready_s: float, now_s: float) -> list[IslandId]:
        """An island is free, and may go on at `ready_s`: with it, all that wait for the same moment.

        Returns those that may go on now: nobody waits once no one is left who could come.
        """
        self.gathered[island] = ready_s
        if ready_s > now_s and len(self.gathered) == self.alive():
            self.gathered = dict.fromkeys(self.gathered, now_s)
        return self.ready(now_s)

    def alive(self) -> int:
        """How many islands there are."""
        return sum(view.alive for view in self.islands.values())

    def ready(self, now_s: float) -> list[IslandId]:
        """The gathered islands that may go on."""
        return [island for island, ready_s in self.gathered.items() if ready_s <= now_s]

    def staleness(self, source: SourceView, keys: Sequence[ModuleKey]) -> int:
        """How many versions these modules have taken since the source's island installed them, at most."""
        holds = self.islands[IslandId(source.source)].holds
        return max(self.modules[key].version - holds.get(key, self.modules[key].version) for key in keys)

    def give(self, task: Task, now_s: float) -> None:
        """A task is given out."""
        source = self.sources[task.source]
        if self.pool is not None:
            pace_s, start_s = source.pace_s or 0.0, max(now_s, source.free_s)
            source.free_s = start_s + task.steps * pace_s
            if task.segment == 0 and len(self.fragments) > 1:
                self.turn_ends_s.setdefault(task.round, start_s + task.round_steps * pace_s)
            if len(self.turn_ends_s) > REMEMBERED_TURNS:
                del self.turn_ends_s[next(iter(self.turn_ends_s))]
        source.got |= {self.fragment_of(task.modules[slot]): source.taken for slot in task.install}
        source.give(task)
        if task.send:
            source.sent[task.fragment] = source.taken
        self.gathered.pop(task.island, None)
        if self.pool is not None and task.segment == 0:
            self.pool.give(Stretch(shard=task.shard, first_step=task.first_step, steps=task.round_steps))

    def lose(self, source: SourceView) -> None:
        """A source's island is gone; what it had not handed over is to be done again, from a pool by whoever comes."""
        if self.pool is not None:
            self.gathered.pop(IslandId(source.source), None)
            for stretch in source.unfinished():
                self.pool.give_back(stretch)
        source.lose()
        for key in self.path_of(source).values():
            self.modules[key].awaited.discard(source.source)

    @property
    def total_steps(self) -> int:
        """Inner steps of the whole run, over all sources."""
        return self.rounds * self.inner_steps * len(self.shard_examples)

    def own_shard(self, source: SourceView) -> ShardId:
        """The shard that a source has where none are drawn."""
        return ShardId(source.source % len(self.shard_examples))

    def new_pool(self, drawn: bool) -> Pool:
        """The data from the present round on."""
        shards, steps = len(self.shard_examples), self.inner_steps
        return Pool.starting(drawn, shards=shards, steps=self.rounds * steps, done=self.round * steps)

    def rounds_over(self) -> int:
        """Rounds that all modules have ended; where sources run free, those that so much data is worth."""
        if self.pool is None:
            return min(module.round for module in self.modules.values())
        return self.pool.done // (self.inner_steps * len(self.shard_examples))

    def hopeless(self) -> list[ModuleKey]:
        """Where sources run free: modules to which nobody's last contribution was sound."""
        many = len(self.sources) if self.pool is not None else math.inf
        return [key for key, module in self.modules.items() if module.rejected >= many]

    def observe(self, turn: Turn, now_s: float) -> None:
        """A contribution arrived, perhaps too late: how long did it take?"""
        opened_s = self.opened_s.get((turn.round, turn.fragment))
        if opened_s is not None:
            self.arrival_s.setdefault(turn.source, deque(maxlen=OBSERVED_ARRIVALS)).append(now_s - opened_s)

    def open_rounds(self, keys: Sequence[ModuleKey], now_s: float) -> None:
        """Await, for a module's present round, all living islands whose path holds it and that take part by then."""
        if self.pool is not None:
            return  # nobody is waited for
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
        distinct = {(c.keys, self.fragment_of(c.module)): self.modules[c.module].arrivals for c in commits}
        tokens = [arrivals[key].tokens for (keys, _), arrivals in distinct.items() for key in keys]
        self.counters.accepted += len(tokens)
        self.counters.tokens += sum(tokens)
        for commit in commits:
            module = self.modules[commit.module]
            module.version += bool(commit.sources)
            module.round, module.rejected, module.dropped = commit.round + 1, 0, 0
            module.arrivals = {key: arrival for key, arrival in module.arrivals.items() if key not in commit.keys}
            module.awaited = set()
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
        if self.pool is not None:
            self.gathered = {}
            self.pool = self.new_pool(self.pool.drawn)
        self.open_rounds(list(self.modules), 0.0)
