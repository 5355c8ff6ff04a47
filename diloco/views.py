"""What the coordinator knows of a run: plain data, updated event by event, checkpointed as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diloco.counters import Counters
from diloco.messages import Commit, IslandId, ModuleKey, Modules, Report, ShardId, SlotName, SourceId, Task


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
class Work:
    """A round that a source has begun and not handed over: what is lost with its island."""

    round: int
    start: int  # the source's position at its first step
    tokens: int = 0  # trained on so far


@dataclass(kw_only=True)
class SourceView:
    """Where one source stands: the next task to give out, and what it has not handed over."""

    source: SourceId
    shard: ShardId
    path: int = 0
    round: int = 0
    segment: int = 0
    done: int = 0  # steps of the present round that were given out
    position: int = 0  # steps of its shard that were given out
    dropped: bool = False  # its last round did not count: it keeps its own weights
    attempt: int = 0  # how often its work was lost
    work: list[Work] = field(default_factory=list)
    settled: list[tuple[int, bool]] = field(default_factory=list)  # verdicts that it was not told yet

    def give(self, task: Task) -> None:
        """Move on past a task that was given out."""
        if task.segment == 0:
            self.work.append(Work(round=task.round, start=task.first_step))
        self.position += task.steps
        self.done += task.steps
        self.settled = []
        self.segment += 1
        if task.last:
            self.round, self.segment, self.done = self.round + 1, 0, 0
            self.dropped = not task.send

    def trained(self, report: Report) -> None:
        """A task of its present work is finished."""
        for work in self.work:
            if work.round == report.task.round:
                work.tokens += report.tokens

    def hand_over(self, round_: int) -> int:
        """The work up to a round, dropped ones included, has left the island. Returns the tokens behind it."""
        tokens = sum(work.tokens for work in self.work if work.round <= round_)
        self.work = [work for work in self.work if work.round > round_]
        return tokens

    def lose(self) -> None:
        """Its island is gone, and what was not handed over will be given out again."""
        if self.work:
            self.position = self.work[0].start
        self.work, self.segment, self.done, self.dropped = [], 0, 0, False
        self.attempt += 1


@dataclass(kw_only=True)
class IslandView:
    """One island now; not checkpointed, since islands come and go."""

    island: IslandId
    source: SourceId
    alive: bool = True
    queued: int = 0  # tasks given out and not finished


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
    sources: dict[SourceId, SourceView] = field(default_factory=dict)
    islands: dict[IslandId, IslandView] = field(default_factory=dict)
    modules: dict[ModuleKey, ModuleView] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    round: int = 0  # rounds that all modules have committed

    def __post_init__(self) -> None:
        # Kept, so that nothing need look through all islands to find those that share a module.
        self._paths_through: dict[ModuleKey, list[int]] = {}
        for index, key in ((index, key) for index, path in enumerate(self.paths) for key in path.values()):
            self._paths_through.setdefault(key, []).append(index)

    def begin(self, modules: Modules, islands: int) -> None:
        """A run at its start: source i contributes for island i, reads shard i and trains path i modulo paths."""
        self.modules = {key: ModuleView() for key in modules.shards}
        self.place_sources(islands)

    def place_sources(self, islands: int) -> None:
        """Give each island its source, all of them alive; await those that the present round can still hear.

        Sources not seen before start at the present round's position.
        """
        self.islands.clear()
        self._islands_on: list[list[IslandView]] = [[] for _ in self.paths]
        for index in range(islands):
            source = SourceId(index)
            if source not in self.sources:
                self.sources[source] = SourceView(
                    source=source,
                    shard=ShardId(index),
                    path=index % len(self.paths),
                    round=self.round,
                    position=self.round * self.inner_steps,
                )
            self.islands[IslandId(index)] = island = IslandView(island=IslandId(index), source=source)
            self._islands_on[self.sources[source].path].append(island)
        self.sources = {source: view for source, view in self.sources.items() if source < islands}
        for key, module in self.modules.items():
            module.awaited &= self.sources.keys()
            lent = [island.source for path in self._paths_through[key] for island in self._islands_on[path]]
            for view in map(self.sources.__getitem__, lent):
                if view.round <= module.round < self.rounds:
                    view.round = module.round  # it may have been away for some rounds
                    module.awaited.add(view.source)

    def path_of(self, source: SourceView) -> Mapping[SlotName, ModuleKey]:
        """Which module fills which slot for `source`."""
        return self.paths[source.path]

    def open_rounds(self, keys: Sequence[ModuleKey]) -> None:
        """Await all living islands whose path holds a module, for its present round."""
        alike: dict[tuple[int, tuple[int, ...]], list[ModuleKey]] = {}
        for key in keys:
            alike.setdefault((self.modules[key].round, tuple(self._paths_through[key])), []).append(key)
        for (round_, paths), group in alike.items():
            if round_ == self.rounds:
                continue
            alive = [island.source for path in paths for island in self._islands_on[path] if island.alive]
            for key in group:
                self.modules[key].awaited.update(alive)
            for source in (self.sources[name] for name in alive if not self.sources[name].work):
                source.round = round_  # also one that came back and waited

    def commit(self, commits: Sequence[Commit]) -> None:
        """The modules took these steps, or ended their round without one; their next round opens."""
        self.counters.outer_steps += any(commit.sources for commit in commits)
        distinct = {commit.sources: self.modules[commit.module].arrivals for commit in commits}
        tokens = {source: arrivals[source].tokens for sources, arrivals in distinct.items() for source in sources}
        self.counters.accepted += len(tokens)
        self.counters.tokens += sum(tokens.values())
        for commit in commits:
            module = self.modules[commit.module]
            module.version += bool(commit.sources)
            module.round, module.rejected, module.dropped = module.round + 1, 0, 0
            module.arrivals = {}
        self.open_rounds([commit.module for commit in commits])

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

    def save_due(self, round_: int) -> bool:
        """Whether a checkpoint is written once `round_` rounds are committed."""
        return round_ == self.rounds or (self.save_every > 0 and round_ % self.save_every == 0)

    def eval_due(self, round_: int) -> bool:
        """Whether the global weights are evaluated once `round_` rounds are committed."""
        return round_ in (0, self.rounds) or (self.eval_every > 0 and round_ % self.eval_every == 0)

    def checkpoint_name(self) -> str:
        """`round-000005` between rounds; with the furthest step where some sources are within one."""
        steps = max(s.done if s.round == self.round else self.inner_steps for s in self.sources.values())
        between = all(source.done == 0 and source.round == self.round for source in self.sources.values())
        return f"round-{self.round:06d}" + ("" if between else f"-steps-{steps:06d}")

    def restart_rounds(self) -> None:
        """Forget what happened within the present round, so that all train it from its start."""
        for source in self.sources.values():
            source.lose()
            source.round, source.position = self.round, self.round * self.inner_steps
        for module in self.modules.values():
            module.round, module.rejected, module.dropped = self.round, 0, 0
            module.arrivals.clear()
            module.awaited.clear()
        self.open_rounds(list(self.modules))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: progress, not settings."""
        return {
            "round": self.round,
            "sources": [asdict(source) for source in self.sources.values()],
            "modules": {
                key: {**asdict(module), "awaited": sorted(module.awaited)} for key, module in self.modules.items()
            },
            "counters": asdict(self.counters),
        }

    def load_json(self, saved: Mapping[str, Any]) -> None:
        """Take back what `to_json` gave, for the islands that there are now."""
        self.round = saved["round"]
        self.counters = Counters(**saved["counters"])
        self.sources = {}
        for entry in saved["sources"]:
            settled = [(round_, accepted) for round_, accepted in entry["settled"]]
            work = [Work(**begun) for begun in entry["work"]]
            self.sources[entry["source"]] = SourceView(**{**entry, "settled": settled, "work": work})
        for key, entry in saved["modules"].items():
            arrivals = {SourceId(int(s)): Arrival(**arrival) for s, arrival in entry["arrivals"].items()}
            awaited = {SourceId(source) for source in entry["awaited"]}
            self.modules[ModuleKey(key)] = ModuleView(**{**entry, "awaited": awaited, "arrivals": arrivals})
        self.place_sources(len(self.islands))
