"""What the coordinator knows of a run: plain data, updated event by event, checkpointed as JSON."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from diloco.counters import Counters
from diloco.messages import EVALUATOR, Commit, IslandId, ModuleKey, Report, ShardId, SlotName, SourceId, Task, Turn
from diloco.norms import Norms
from diloco.paces import Paces
from diloco.pool import Pool, Stretch
from diloco.progress import BestRound, IslandView, ModuleView, SourceView

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
    splits: tuple[str, ...] = ("validation",)  # what is evaluated: one for all by the first path, or one for each path
    best_folder: str = ""  # where the best weights of each path are kept; "" = the last ones count
    best: dict[int, BestRound] = field(default_factory=dict)  # by path, where they are
    fragments: tuple[tuple[SlotName, ...], ...] = ()  # slots that are exchanged together; () = all at once
    free: bool = False  # nobody waits for another
    patience: float = 0.0  # how far beyond the usual is waited for an island; 0 = for ever
    min_islands: int = 0  # with fewer of them no outer step is taken
    moving: bool = False  # sources go from island to island; what a lost island did not finish is done by another
    pool: Pool | None = None  # where sources run free of each other: the data that they draw from
    gathered: dict[IslandId, float] = field(default_factory=dict)  # handed over and free -> when they may go on
    sources: dict[SourceId, SourceView] = field(default_factory=dict)
    islands: dict[IslandId, IslandView] = field(default_factory=dict)
    leaving: set[IslandId] = field(default_factory=set)  # their nodes have announced that they go away
    modules: dict[ModuleKey, ModuleView] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    norms: Norms = field(default_factory=Norms)  # of the contributions that counted
    ahead: Counters = field(default_factory=Counters)  # of `counters`: what was finished of rounds after the present
    round: int = 0  # rounds that all modules have committed
    opened_s: dict[tuple[int, int], float] = field(default_factory=dict)  # when (round, fragment) began to be awaited
    evaluator: IslandView = field(default_factory=lambda: IslandView(island=EVALUATOR, source=SourceId(0)))
    pushes_s: deque[float] = field(default_factory=lambda: deque(maxlen=OBSERVED_ARRIVALS))  # to hand something over
    turn_ends_s: dict[int, float] = field(default_factory=dict)  # when who was first in a turn is expected at its end
    round_ends_s: float = 0.0  # when the last of the rounds that were begun is expected at its end
    arrival_s: dict[SourceId, deque[float]] = field(default_factory=dict)  # how long after that its source was heard

    def __post_init__(self) -> None:
        self.fragments = self.fragments or (tuple(self.paths[0]),)
        places = [(slot, index) for index, slots in enumerate(self.fragments) for slot in slots]
        self._fragment_of = {path[slot]: index for path in self.paths for slot, index in places}
        # A contribution counts once, and so does an outer step: with the first module of its fragment.
        self._counted = {path[slots[0]] for path in self.paths for slots in self.fragments}
        # Kept, so that nothing need look through all islands to find those that share a module.
        self._paths_through: dict[ModuleKey, list[int]] = {}
        for index, key in ((index, key) for index, path in enumerate(self.paths) for key in path.values()):
            self._paths_through.setdefault(key, []).append(index)

    def hold(self, held: Mapping[IslandId, Iterable[ModuleKey]]) -> None:
        """These islands, and the evaluator, have the values that these modules start with."""
        for island, keys in held.items():
            view = self.evaluator if island == EVALUATOR else self.islands[island]
            view.holds = dict.fromkeys(keys, 0)

    def sit_down(self) -> None:
        """Look through all sources and islands, once."""
        self._sources_on: list[list[SourceId]] = [[] for _ in self.paths]
        for source in self.sources.values():
            self._sources_on[source.path].append(source.source)
        self._sources_through = {
            key: tuple(sorted(source for path in paths for source in self._sources_on[path]))
            for key, paths in self._paths_through.items()
        }
        self.paces = Paces(self.sources)

    def path_of(self, source: SourceView) -> Mapping[SlotName, ModuleKey]:
        """Which module fills which slot for `source`."""
        return self.paths[source.path]

    def paths_through(self, key: ModuleKey) -> int:
        """How many paths a module is part of."""
        return len(self._paths_through[key])

    def counts_for_all(self, key: ModuleKey) -> bool:
        """Whether all sources' contributions are counted with this module."""
        return key in self._counted and len(self._paths_through[key]) == len(self.paths)

    def sources_through(self, key: ModuleKey) -> tuple[SourceId, ...]:
        """All sources whose path a module is part of, in order."""
        return self._sources_through[key]

    def fragment_of(self, key: ModuleKey) -> int:
        """With which fragment a module is exchanged."""
        return self._fragment_of[key]

    def keys(self, source: SourceView, fragment: int) -> list[ModuleKey]:
        """The modules that `source` exchanges with a fragment."""
        path = self.path_of(source)
        return [path[slot] for slot in self.fragments[fragment]]

    def trained(self, report: Report, now_s: float) -> None:
        """An island's finished task."""
        source = self.sources[report.task.source]
        before_s = source.pace_s
        source.trained(report, now_s)
        self.paces.after(source.source, before_s)
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
        if ready_s > now_s and all(number in self.gathered for number, view in self.islands.items() if view.alive):
            self.gathered = dict.fromkeys(self.gathered, now_s)
        return self.ready(now_s)

    def heard(self) -> list[ModuleKey]:
        """The modules of whose present round somebody was heard."""
        return [key for key, module in self.modules.items() if module.heard]

    def alive(self) -> int:
        """How many islands there are."""
        return sum(view.alive for view in self.islands.values())

    def ready(self, now_s: float) -> list[IslandId]:
        """The gathered islands that may go on."""
        return [island for island, ready_s in self.gathered.items() if ready_s <= now_s]

    def staleness(self, source: SourceView, keys: Sequence[ModuleKey]) -> int:
        """How many versions these modules have taken since the source's island installed them, at most."""
        holds = source.held if self.moving else self.islands[IslandId(source.source)].holds
        return max(self.modules[key].version - holds.get(key, self.modules[key].version) for key in keys)

    def give(self, task: Task, now_s: float) -> None:
        """A task is given out."""
        source = self.sources[task.source]
        if self.pool is not None:
            pace_s, start_s = source.pace_s or 0.0, max(now_s, source.free_s)
            source.free_s = start_s + task.steps * pace_s
            if task.segment == 0:
                self.round_ends_s = max(self.round_ends_s, start_s + task.round_steps * pace_s)
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
        if self.moving:  # a round is done again as a whole; what of it was heard already comes too late then
            source.round = source.position // self.inner_steps
            source.restart(source.round * self.inner_steps)
            return
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

    def hopeless(self, commits: Sequence[Commit]) -> list[ModuleKey]:
        """Modules to which nobody's last contribution was sound, now that these rounds end."""
        if self.free:
            return [key for key, m in self.modules.items() if m.rejected >= len(self.sources_through(key))]
        return [commit.module for commit in commits if not commit.sources and self.modules[commit.module].rejected]

    def observe(self, turn: Turn, now_s: float) -> None:
        """A contribution arrived, perhaps too late: how long did it take?"""
        opened_s = self.opened_s.get((turn.round, turn.fragment))
        if opened_s is not None:
            self.arrival_s.setdefault(turn.source, deque(maxlen=OBSERVED_ARRIVALS)).append(now_s - opened_s)

    def open_rounds(self, keys: Sequence[ModuleKey], now_s: float) -> None:
        """Await, for a module's present round, all living islands whose path holds it and that take part by then."""
        if self.free:
            return
        alike: dict[tuple[int, tuple[int, ...]], list[ModuleKey]] = {}
        for key in keys:
            alike.setdefault((self.modules[key].round, tuple(self._paths_through[key])), []).append(key)
        for (round_, paths), group in alike.items():
            self.opened_s.setdefault((round_, self.fragment_of(group[0])), now_s)
            if len(self.opened_s) > REMEMBERED_TURNS:
                del self.opened_s[next(iter(self.opened_s))]  # the oldest
            if round_ == self.rounds:
                continue
            there = [source for path in paths for source in self._sources_on[path] if self._takes_part(source, round_)]
            for key in group:
                self.modules[key].awaited.update(there)

    def _takes_part(self, source: SourceId, round_: int) -> bool:
        alive = self.moving or self.islands[IslandId(source)].alive
        return alive and self.sources[source].began <= round_

    def commit(self, commits: Sequence[Commit], now_s: float) -> None:
        """The modules took these steps, or ended their round without one; their next round opens."""
        counted = [c for c in commits if c.sources and c.module in self._counted]
        self.counters.outer_steps += len(counted)
        tokens = [self.modules[commit.module].arrivals[key].tokens for commit in counted for key in commit.keys]
        self.counters.accepted += len(tokens)
        self.counters.tokens += sum(tokens)
        self.norms.remember(counted, self.modules, len(self.sources))
        for commit in commits:
            module = self.modules[commit.module]
            module.version += bool(commit.sources)
            module.round, module.rejected, module.dropped, module.folded = commit.round + 1, 0, 0, 0
            module.arrivals = {key: arrival for key, arrival in module.arrivals.items() if key not in commit.keys}
            module.awaited = set()
        self.open_rounds([commit.module for commit in commits], now_s)

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
            module.round, module.rejected, module.dropped, module.folded = self.round, 0, 0, 0
            module.arrivals.clear()
            module.awaited.clear()
        if self.pool is not None:
            self.gathered = {}
            self.pool = self.new_pool(self.pool.drawn)
        self.open_rounds(list(self.modules), 0.0)
