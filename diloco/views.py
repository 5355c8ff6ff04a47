"""What the coordinator knows of a run: plain data, updated event by event, checkpointed as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diloco.messages import Commit, IslandId, ModuleKey, Modules, Report, ShardId, SlotName, SourceId, Task


@dataclass(kw_only=True)
class Arrival:
    """A sound contribution that waits for its commit."""

    examples: float  # its weight
    norm: float


@dataclass(kw_only=True)
class ModuleView:
    """What is known of one module."""

    version: int = 0  # outer steps taken
    round: int = 0  # the round that its next commit belongs to
    awaited: set[SourceId] = field(default_factory=set)  # who takes part in that round and was not heard yet
    arrivals: dict[SourceId, Arrival] = field(default_factory=dict)
    rejected: int = 0  # contributions to that round that were refused


@dataclass(kw_only=True)
class SourceView:
    """Where one source stands: the next task to give out, and what is known of the last ones."""

    source: SourceId
    shard: ShardId
    path: int = 0
    round: int = 0
    segment: int = 0
    position: int = 0  # steps of its shard that were given out
    round_start: int = 0  # position at which its round began
    safe_position: int = 0  # up to here its work was handed over; from here it is given out again after a loss
    dropped: bool = False  # its last round did not count: it keeps its own weights
    pending_tokens: int = 0  # trained on, not yet committed
    settled: list[tuple[int, bool]] = field(default_factory=list)  # verdicts that it was not told yet

    def give(self, task: Task) -> None:
        """Move on past a task that was given out."""
        self.position += task.steps
        self.settled = []
        self.segment += 1
        if task.last:
            self.round, self.segment = self.round + 1, 0
            self.round_start = self.position
            self.dropped = not task.send

    def hand_over(self) -> None:
        """Its round's work has left the island: a loss of the island does not lose it any more."""
        self.safe_position = self.round_start

    def rewind(self, round_: int) -> None:
        """Give out again what was not handed over; it takes part from `round_` on."""
        self.position = self.round_start = self.safe_position
        self.round, self.segment, self.pending_tokens = round_, 0, 0


@dataclass(kw_only=True)
class IslandView:
    """One island now; not checkpointed, since islands come and go."""

    island: IslandId
    source: SourceId
    alive: bool = True
    queued: int = 0  # tasks given out and not finished


@dataclass(kw_only=True)
class Counters:
    """What the summary needs of the whole history of a run, also over resumes."""

    tokens: int = 0  # behind committed contributions only
    outer_steps: int = 0
    accepted: int = 0
    rejected: int = 0
    late: int = 0
    islands_lost: int = 0
    islands_joined: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    inner_steps: int = 0  # finished, over all islands
    inner_s: float = 0.0  # spent in them
    waiting_s: float = 0.0
    train_s: float = 0.0  # wall seconds from the first task to the last event, kept by who drives the run
    initial_val_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluated_round: int = -1

    def count(self, report: Report) -> None:
        """An island's finished task."""
        self.inner_steps += report.task.steps
        self.inner_s += report.seconds
        self.waiting_s += report.waiting_s
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down

    def count_evaluation(self, round_: int, loss: float) -> None:
        """The global weights' validation loss after `round_` rounds."""
        self.val_loss, self.evaluated_round = loss, round_
        if self.initial_val_loss is None:
            self.initial_val_loss = loss
        self.best_val_loss = loss if self.best_val_loss is None else min(loss, self.best_val_loss)


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

    def begin(self, modules: Modules, islands: int) -> None:
        """A run at its start: source i contributes for island i, reads shard i and trains path i modulo paths."""
        self.modules = {key: ModuleView() for key in modules.shards}
        self.place_sources(islands)

    def place_sources(self, islands: int) -> None:
        """Give each island its source; sources not seen before start at the present round's position."""
        for index in range(islands):
            source = SourceId(index)
            start = self.round * self.inner_steps
            if source not in self.sources:
                self.sources[source] = SourceView(
                    source=source,
                    shard=ShardId(index),
                    path=index % len(self.paths),
                    round=self.round,
                    position=start,
                    round_start=start,
                    safe_position=start,
                )
            self.islands[IslandId(index)] = IslandView(island=IslandId(index), source=source)
        self.sources = {source: view for source, view in self.sources.items() if source < islands}

    def path_of(self, source: SourceView) -> Mapping[SlotName, ModuleKey]:
        """Which module fills which slot for `source`."""
        return self.paths[source.path]

    def open_round(self, key: ModuleKey) -> None:
        """Await all living islands whose path holds the module, for its present round."""
        module = self.modules[key]
        if module.round == self.rounds:
            return
        slot = SlotName(key.rpartition("/")[0])
        for island in self.islands.values():
            if island.alive and self.path_of(self.sources[island.source]).get(slot) == key:
                module.awaited.add(island.source)

    def excuse(self, source: SourceId, keys: Iterable[ModuleKey]) -> None:
        """Do not await `source` for these modules' present round any more."""
        for key in keys:
            self.modules[key].awaited.discard(source)

    def took_part(self, key: ModuleKey) -> bool:
        """Whether anybody was heard, or excused by the schedule, in the module's present round."""
        module = self.modules[key]
        if module.arrivals or module.rejected:
            return True
        others = (self.sources[island.source] for island in self.islands.values() if island.alive)
        return any(source.round > module.round for source in others)

    def commit(self, commits: Sequence[Commit]) -> None:
        """The modules took these steps, or ended their round without one; their next round opens."""
        self.counters.outer_steps += any(commit.sources for commit in commits)
        contributors = {source for commit in commits for source in commit.sources}
        self.counters.accepted += len(contributors)
        for source in contributors:
            self.counters.tokens += self.sources[source].pending_tokens
            self.sources[source].pending_tokens = 0
        for commit in commits:
            module = self.modules[commit.module]
            module.version += bool(commit.sources)
            module.round, module.rejected = module.round + 1, 0
            module.arrivals.clear()
            self.open_round(commit.module)

    def save_due(self, round_: int) -> bool:
        """Whether a checkpoint is written once `round_` rounds are committed."""
        return round_ == self.rounds or (self.save_every > 0 and round_ % self.save_every == 0)

    def eval_due(self, round_: int) -> bool:
        """Whether the global weights are evaluated once `round_` rounds are committed."""
        return round_ in (0, self.rounds) or (self.eval_every > 0 and round_ % self.eval_every == 0)

    def checkpoint_name(self) -> str:
        """`round-000005` between rounds; with the furthest step where some sources are within one."""
        steps = max((source.position - source.round_start for source in self.sources.values()), default=0)
        within = any(source.segment > 0 or source.round > self.round for source in self.sources.values())
        return f"round-{self.round:06d}" + (f"-steps-{steps:06d}" if within else "")

    def restart_rounds(self) -> None:
        """Forget what happened within the present round, so that it is trained again from its start."""
        for source in self.sources.values():
            source.round, source.segment, source.pending_tokens = self.round, 0, 0
            source.position = source.round_start = source.safe_position = self.round * self.inner_steps
            source.dropped = False
        for module in self.modules.values():
            module.round, module.rejected = self.round, 0
            module.arrivals.clear()

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
        """Take back what `to_json` gave."""
        self.round = saved["round"]
        self.counters = Counters(**saved["counters"])
        self.sources = {}
        for entry in saved["sources"]:
            settled = [(round_, accepted) for round_, accepted in entry["settled"]]
            self.sources[entry["source"]] = SourceView(**{**entry, "settled": settled})
        for key, entry in saved["modules"].items():
            arrivals = {SourceId(int(s)): Arrival(**arrival) for s, arrival in entry["arrivals"].items()}
            awaited = {SourceId(source) for source in entry["awaited"]}
            self.modules[ModuleKey(key)] = ModuleView(**{**entry, "awaited": awaited, "arrivals": arrivals})
