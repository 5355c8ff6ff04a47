"""Schedules: which island does what next, when enough was heard of a module, and what it counts for.

The only place where the methods differ in time. A schedule holds settings only; it is a pure function
of what the coordinator knows, and time is an argument.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from diloco.messages import Commit, ModuleKey, SourceId, Task
from diloco.views import Arrival, IslandView, RunView, SourceView


@dataclass(frozen=True)
class Wait:
    """Nothing to do for this island until something happens, or until a time."""

    until_s: float | None = None


@dataclass(frozen=True)
class NoMore:
    """This island's source has trained all its rounds."""


@dataclass(kw_only=True)
class Schedule(ABC):
    """Pure and deterministic: the same views and time give the same answer, and nothing is written."""

    @abstractmethod
    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """What `island` should do after the tasks it has been given so far."""

    @abstractmethod
    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """The outer steps now due for the modules just heard of. One without sources only ends the round."""


@dataclass(kw_only=True)
class Barrier(Schedule):
    """Synchronous DiLoCo (arXiv:2311.08105, Alg. 1): a module steps when all who take part were heard.

    `drop_probability`: a source's contribution to a round is dropped with this chance; it then neither
    sends nor installs, and keeps its own weights for the next round (section 3.4 of the paper).
    """

    drop_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_probability <= 1:
            raise ValueError(f"schedule.drop_probability={self.drop_probability} is outside [0, 1]")

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """The next segment of the source's round; the first one only once its modules took their last step."""
        source = run.sources[island.source]
        if source.round >= run.rounds:
            return NoMore()
        path = run.path_of(source)
        if source.segment == 0 and any(run.modules[key].round < source.round for key in path.values()):
            return Wait()
        steps = run.inner_steps - source.done
        if run.segment_steps:
            steps = min(steps, run.segment_steps)
        last = source.done + steps == run.inner_steps
        first = source.segment == 0
        return Task(
            source=source.source,
            island=island.island,
            round=source.round,
            segment=source.segment,
            modules=path,
            install={slot: run.modules[key].version for slot, key in path.items()} if first else {},
            keep=1.0 if source.dropped else 0.0,
            shard=source.shard,
            first_step=source.position,
            steps=steps,
            send=() if not last or self._drops(run, source) else tuple(path),
            last=last,
            attempt=source.attempt,
            save=last and run.save_due(source.round + 1),
            settled=tuple(source.settled),
        )

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """A commit for each module of which nobody is awaited any more, in order of source."""
        ready: list[Commit] = []
        arrivals: dict[SourceId, Arrival] = {}
        sources: tuple[SourceId, ...] = ()
        weights: tuple[float, ...] = ()
        for key in touched:
            module = run.modules[key]
            if module.awaited:
                continue
            if module.arrivals != arrivals:  # those of one path are most often alike
                arrivals = module.arrivals
                sources = tuple(sorted(arrivals))
                weights = tuple(arrivals[source].examples for source in sources)
            ready.append(Commit(module=key, round=module.round, sources=sources, weights=weights))
        return ready

    def _drops(self, run: RunView, source: SourceView) -> bool:
        if not self.drop_probability:
            return False
        return random.Random(f"drop/{run.seed}/{source.round}/{source.source}").random() < self.drop_probability
