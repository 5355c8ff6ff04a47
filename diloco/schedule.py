"""Schedules: which island does what next, when enough was heard of a module, and what it counts for.

The only place where the methods differ in time. A schedule holds settings only; it is a pure function
of what the coordinator knows, and time is an argument.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diloco.messages import Commit, ModuleKey, ShardId, SlotName, SourceId, Task, Turn
from diloco.patience import HICCUP_S, most_s
from diloco.progress import Arrivals, IslandView, ModuleView, SourceView
from diloco.views import RunView


@dataclass(frozen=True)
class Wait:
    """Nothing to do for this island until something happens: a time, or an outer step of one of these modules."""

    until_s: float | None = None
    keys: frozenset[ModuleKey] = frozenset()  # none: of any module


@dataclass(frozen=True)
class NoMore:
    """This island's source has trained all its rounds."""


@dataclass(kw_only=True)
class Schedule(ABC):
    """Pure and deterministic: the same views and time give the same answer, and nothing is written."""

    by_fragment: ClassVar[bool] = True  # fragments are exchanged one after the other; else all at once
    free: ClassVar[bool] = False  # sources go on without each other; on data from a pool, unless they move
    drawn: ClassVar[bool] = False  # from the pool's shards by chance, under-served ones first; else each its own
    moving: ClassVar[bool] = False  # sources go from island to island, so that there may be more or fewer of them

    def num_sources(self, islands: int, paths: int) -> int:
        """How many contribute; each has a shard of the data."""
        return islands

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """Raise ValueError where rounds of so many steps cannot have so many turns, all of the same length."""
        if inner_steps % fragments:
            down = inner_steps - inner_steps % fragments
            near = f"{down} or {down + fragments}" if down else f"{fragments}"
            raise ValueError(
                f"inner_steps={inner_steps} is not divisible by the {fragments} fragments of the layout;"
                f" use {near}, or other fragments (layout.layers_per_fragment or count; of paths, layout.fragments)"
            )

    @abstractmethod
    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """What `island` should do after the tasks it has been given so far."""

    @abstractmethod
    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """The outer steps now due for the modules just heard of. One without sources only ends the round."""

    def overlap_steps(self) -> int:
        """Inner steps that go on while an exchange is under way."""
        return 0

    def commits_a_round(self, islands: int) -> int:
        """How many outer steps of a module the contributions of all islands make."""
        return 1

    def overdue_s(self, run: RunView) -> float | None:
        """When `commits` should be asked about all modules though nobody was heard; None = never."""
        return None

    def regroup_s(self, run: RunView, now_s: float) -> float:
        """Where sources run free: when one that has just handed over may go on."""
        return now_s

    def counts(self, run: RunView, turn: Turn, keys: Sequence[ModuleKey]) -> bool:
        """Whether a contribution that has just been judged is in time."""
        return all(run.modules[k].round == turn.round and turn.source in run.modules[k].awaited for k in keys)

    def refuses(self, staleness: int) -> bool:
        """Whether a contribution is not to count, since its module took so many versions meanwhile."""
        return False

    def planned(self, run: RunView, key: ModuleKey) -> tuple[SourceId, ...]:
        """Whom a module's step waits for, whoever is late, in order: they are added up as they come. () = not known."""
        return ()


@dataclass(kw_only=True)
class Barrier(Schedule):
    """Synchronous DiLoCo (arXiv:2311.08105, Alg. 1) and Streaming DiLoCo (arXiv:2501.18512, Alg. 2).

    A module steps when all who take part were heard. With P fragments, fragment p of a round of H inner steps is sent
    after step (p + 1) H / P and installed `lag` (tau) steps later, while training goes on; `keep` (alpha) is the share
    of the local weights that survives. One fragment, lag 0 and keep 0 are plain DiLoCo.

    `drop_probability`: a source's contribution to a round is dropped with this chance; it then neither
    sends nor installs, and keeps its own weights for the next round (section 3.4 of arXiv:2311.08105).

    Late islands: once others were heard, a turn waits for a source no longer than the run's `patience` allows, by how
    long its last ones took. Then it steps without the source.
    """

    lag: int = 0  # inner steps between sending a fragment and installing what became of it
    keep: float = 0.0  # share of the local weights that survives an install
    drop_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ValueError(f"schedule.lag={self.lag} must not be negative; 0 installs before training goes on")
        for name in ("keep", "drop_probability"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"schedule.{name}={vars(self)[name]} is outside [0, 1]")

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """Also, a fragment must be installed before it is sent again."""
        super().check(inner_steps, fragments, islands)
        if self.lag >= inner_steps:
            raise ValueError(
                f"schedule.lag={self.lag} is not below inner_steps={inner_steps}: a fragment would be sent again"
                f" before it is installed; use at most {inner_steps - 1}, better 1 to 5"
            )

    def overlap_steps(self) -> int:
        """The lag."""
        return self.lag

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """The steps up to the next point where something is sent or installed; waits for what is to be installed."""
        source = run.sources[island.source]
        path = run.path_of(source)
        first = source.segment == 0
        oldest = min(run.modules[key].round for key in path.values()) if first else 0
        round_ = max(source.round, oldest)  # who came too late goes on with what is awaited now
        if round_ >= run.rounds:
            return NoMore()
        due = self._due(run, round_, source)
        if source.whole and oldest < round_:
            return Wait(keys=frozenset(key for key in path.values() if run.modules[key].round < round_))
        if due is not None:
            missing = frozenset(key for key in run.keys(source, due[1]) if run.modules[key].round <= due[0])
            if missing:
                return Wait(keys=missing)
        refused = due is not None and source.refused(*due)
        slots: Sequence[SlotName] = ()
        if source.whole or refused:
            slots = tuple(path)
        elif due is not None:
            slots = run.fragments[due[1]]
        dropped = due is not None and self._drops(run, due[0], source)
        fragment = source.done * len(run.fragments) // run.inner_steps
        steps = self._steps(run, source.done)
        ends = (source.done + steps) * len(run.fragments) == (fragment + 1) * run.inner_steps
        last = source.done + steps == run.inner_steps
        return Task(
            source=source.source,
            island=island.island,
            round=round_,
            segment=source.segment,
            modules=path,
            install={slot: run.modules[path[slot]].version for slot in slots},
            keep=0.0 if source.whole or refused else 1.0 if dropped else self.keep,
            shard=source.shard,
            first_step=source.position,
            steps=steps,
            send=run.fragments[fragment] if ends and not self._drops(run, round_, source) else (),
            last=last,
            round_steps=run.inner_steps,
            fragment=fragment,
            ends=ends,
            fresh=refused,
            attempt=source.attempt,
            save=last and run.save_due(round_ + 1),
            settled=tuple(source.settled),
        )

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """A commit for each module of which nobody is awaited any more, in order of source."""
        ready: list[Commit] = []
        arrivals: Arrivals = {}
        sources: tuple[SourceId, ...] = ()
        weights: tuple[float, ...] = ()
        for key in touched:
            module = run.modules[key]
            if module.awaited and not self._overdue(run, key, now_s):
                continue
            if module.arrivals != arrivals:  # those of one path are most often alike
                arrivals = module.arrivals
                sources = tuple(sorted(source for _, source in arrivals))
                weights = tuple(arrivals[module.round, source].examples for source in sources)
            ready.append(Commit(module=key, round=module.round, sources=sources, weights=weights))
        return ready

    def overdue_s(self, run: RunView) -> float | None:
        """When the patience with the late ends; only once somebody else was heard."""
        waiting = {(m.round, run.fragment_of(key)): m for key, m in run.modules.items() if m.awaited and m.arrivals}
        ends_s = [self._ends_s(run, turn, module) for turn, module in waiting.items()]
        return min((end_s for end_s in ends_s if end_s is not None), default=None)

    def _overdue(self, run: RunView, key: ModuleKey, now_s: float) -> bool:
        module = run.modules[key]
        turn = (module.round, run.fragment_of(key))
        if not module.arrivals or now_s - run.opened_s.get(turn, now_s) < run.patience * HICCUP_S:
            return False  # in most cases; the rest takes time to know
        end_s = self._ends_s(run, turn, module)
        return end_s is not None and now_s >= end_s

    def _ends_s(self, run: RunView, turn: tuple[int, int], module: ModuleView) -> float | None:
        """How long a turn is waited for: as long as for the source with the latest deadline; None: for ever."""
        if turn not in run.opened_s:
            return None
        longest_s = 0.0
        for source in module.awaited:
            limit_s = most_s(run.arrival_s.get(source, ()), run.patience)
            if limit_s is None:
                return None
            longest_s = max(longest_s, limit_s)
        return run.opened_s[turn] + longest_s

    def _due(self, run: RunView, round_: int, source: SourceView) -> tuple[int, int] | None:
        """(round, fragment) whose outcome is to be installed before the source's next step."""
        turn_steps = run.inner_steps // len(run.fragments)
        sent_steps = round_ * run.inner_steps + source.done - self.lag  # after so many in all was that fragment sent
        if sent_steps <= 0 or sent_steps % turn_steps:
            return None
        due = divmod(sent_steps // turn_steps - 1, len(run.fragments))
        return due if due[0] >= source.began else None

    def _steps(self, run: RunView, done: int) -> int:
        """Up to the next point of the round where something is sent or installed, or a segment ends."""
        turn_steps = run.inner_steps // len(run.fragments)
        steps = min(turn_steps - done % turn_steps, turn_steps - (done - self.lag) % turn_steps)
        return min(steps, run.segment_steps) if run.segment_steps else steps

    def _drops(self, run: RunView, round_: int, source: SourceView) -> bool:
        if not self.drop_probability:
            return False
        return random.Random(f"drop/{run.seed}/{round_}/{source.source}").random() < self.drop_probability


def free_segment(island: IslandView, run: RunView, *, shard: ShardId, first_step: int, round_steps: int) -> Task:
    """The next segment of a round of `round_steps` of a source that runs free, from step `first_step` of a shard.

    The round's first segment takes the newest weights of all modules, and its last one sends them all.
    """
    source = run.sources[island.source]
    path = run.path_of(source)
    first, left = source.segment == 0, round_steps - source.done
    steps = min(run.segment_steps or left, left)
    last = steps == left
    return Task(
        source=source.source,
        island=island.island,
        round=source.round,
        segment=source.segment,
        modules=path,
        install={slot: run.modules[key].version for slot, key in path.items()} if first else {},
        keep=0.0,
        shard=shard,
        first_step=first_step,
        steps=steps,
        send=tuple(path) if last else (),
        last=last,
        round_steps=round_steps,
        ends=last,
        fresh=first and source.broken,
        attempt=source.attempt,
        settled=tuple(source.settled),
    )
