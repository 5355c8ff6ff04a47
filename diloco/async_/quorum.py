"""Quorum: islands that never wait; a fragment steps when enough of them were heard, and those close behind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from diloco.messages import Commit, ModuleKey, SlotName, Task, Turn
from diloco.progress import IslandView, SourceView
from diloco.schedule import NoMore, Schedule, Wait
from diloco.views import RunView


@dataclass(kw_only=True)
class Quorum(Schedule):
    """Decoupled DiLoCo (arXiv:2604.21428): a stall or a loss of one island costs the others nothing.

    Turns are counted through: turn n is about fragment n mod P. After its steps of a turn an island sends the fragment
    and goes on; once it has trained `lag` further steps, it installs what there is, or does so when it is there. The
    fragment steps when `quorum` (K) islands were heard, after a short wait for those close behind. Who comes later
    is dropped, installs what it missed, and goes on with the turn that the others are at.

    That wait is `grace` (gamma) times what is left of `lag` steps after the wait for the quorum and what it takes to
    send and fetch: as long as nobody who was in time has to do without. Times are measured while training.

    A contribution weighs tokens * tokens / steps since the island last installed the fragment: its steps, since steps
    are of as many tokens on all islands. With `by_speed` islands take as many steps in a turn as they can until who was
    first in it ends it, so that slower ones keep up, and those that stalled are there again.
    """

    quorum: int = 1
    lag: int = 2  # inner steps between sending a fragment and installing what became of it
    grace: float = 0.8  # 0 = none
    by_speed: bool = True

    free = True

    def __post_init__(self) -> None:
        if self.quorum < 1:
            raise ValueError(f"schedule.quorum={self.quorum} must be at least 1: islands to be heard")
        if self.lag < 1:
            raise ValueError(f"schedule.lag={self.lag} must be at least 1, since nobody waits for an outer step")
        if not 0 <= self.grace < 1:
            raise ValueError(f"schedule.grace={self.grace} is outside [0, 1): the share of the lag that may be waited")

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """Also, there must be as many islands as are to be heard."""
        super().check(inner_steps, fragments, islands)
        if self.quorum > islands:
            raise ValueError(f"schedule.quorum={self.quorum} is more than islands={islands}; use at most {islands}")
        if self.lag >= inner_steps:
            raise ValueError(f"schedule.lag={self.lag} is not below inner_steps={inner_steps}; use {inner_steps - 1}")

    def overlap_steps(self) -> int:
        """The lag."""
        return self.lag

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """The steps up to the next point where something is sent or may be installed."""
        source, pool = run.sources[island.source], run.pool
        assert pool is not None
        first = source.segment == 0
        turn = max(source.round, _next_turn(run)) if first else source.round
        missing = self._missing(run, island, source) if island.queued else frozenset()
        if missing:
            return Wait(keys=missing)  # it is busy until then, and something may be there in time
        shard, position, turn_steps = source.shard, source.position, source.round_steps
        if first:
            wanted = self.turn_steps(run, source, turn, now_s)
            while source.whole and wanted == 0:  # nothing trained is nothing to send
                turn, wanted = turn + 1, self.turn_steps(run, source, turn + 1, now_s)
            stretch = pool.next(run.own_shard(source), wanted, run.shard_examples, run.seed)
            if stretch is None:
                return NoMore() if pool.exhausted else Wait()
            shard, position, turn_steps = stretch.shard, stretch.first_step, stretch.steps
        steps = self._steps(run, source, turn_steps)
        last = source.done + steps == turn_steps
        fragment = turn % len(run.fragments)
        return Task(
            source=source.source,
            island=island.island,
            round=turn,
            segment=source.segment,
            modules=run.path_of(source),
            install=self._install(run, island, source),
            keep=0.0,
            shard=shard,
            first_step=position,
            steps=steps,
            send=run.fragments[fragment] if last else (),
            last=last,
            round_steps=turn_steps,
            fragment=fragment,
            ends=last,
            fresh=source.broken,
            attempt=source.attempt,
            settled=tuple(source.settled),
        )

    def turn_steps(self, run: RunView, source: SourceView, turn: int, now_s: float) -> int:
        """Of a source's turn: as many as end with those of who was first in it; none where it is late, or slow."""
        steps = run.inner_steps // len(run.fragments)
        if not self.by_speed or source.pace_s is None:
            return steps
        left_s = run.turn_ends_s.get(turn, math.inf) - max(now_s, source.free_s)
        if left_s == math.inf:
            return math.ceil(steps * (run.paces.least_s or 0.0) / source.pace_s)
        return min(max(round(left_s / source.pace_s), 0), steps)

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """The fragments of which enough was heard, and whose wait for others is over."""
        assert run.pool is not None
        commits = []
        for key in touched:
            arrivals = run.modules[key].arrivals
            if not arrivals or not (run.pool.exhausted or self._over(run, key, now_s)):
                continue
            turn = min(turn for turn, _ in arrivals)
            order = [place for place in sorted(arrivals) if place[0] == turn]
            commits.append(
                Commit(
                    module=key,
                    round=turn // len(run.fragments),
                    sources=tuple(source for _, source in order),
                    weights=tuple(float(max(arrivals[place].steps, 1)) for place in order),
                    rounds=tuple(turn for _ in order),
                )
            )
        return commits

    def overdue_s(self, run: RunView) -> float | None:
        """When the first wait for others ends."""
        ends_s = [self._ends_s(run, key) for key, module in run.modules.items() if module.arrivals]
        return min((end_s for end_s in ends_s if end_s is not None), default=None)

    def counts(self, run: RunView, turn: Turn, keys: Sequence[ModuleKey]) -> bool:
        """Until the fragment has stepped."""
        return all(run.modules[key].round <= turn.round // len(run.fragments) for key in keys)

    def _over(self, run: RunView, key: ModuleKey, now_s: float) -> bool:
        end_s = self._ends_s(run, key)
        return end_s is not None and now_s >= end_s

    def _ends_s(self, run: RunView, key: ModuleKey) -> float | None:
        """When a fragment steps with those who were heard; None = too few yet."""
        arrivals = run.modules[key].arrivals
        turn = min(turn for turn, _ in arrivals)
        heard_s = sorted(arrival.now_s for (of, _), arrival in arrivals.items() if of == turn)
        alive = run.alive()
        enough = min(self.quorum, alive)
        if len(heard_s) < enough:
            return None
        if len(heard_s) >= alive:
            return heard_s[-1]
        reached_s = heard_s[enough - 1]
        sync_s = 2 * statistics.median(run.pushes_s) if run.pushes_s else 0.0
        left_s = self.lag * (run.paces.least_s or 0.0) - (reached_s - heard_s[0]) - sync_s
        return reached_s + max(self.grace * left_s, 0.0)

    def _install(self, run: RunView, island: IslandView, source: SourceView) -> dict[SlotName, int]:
        """What is newer than what the island has, but for what it sent within the last `lag` steps."""
        path = run.path_of(source)
        if source.whole or source.broken:
            return {slot: run.modules[key].version for slot, key in path.items()}
        found: dict[SlotName, int] = {}
        for fragment, slots in enumerate(run.fragments):
            if source.taken - source.sent.get(fragment, -self.lag) >= self.lag:
                newer = {slot: run.modules[path[slot]].version for slot in slots}
                found |= {slot: v for slot, v in newer.items() if v > island.holds.get(path[slot], -1)}
        return found

    def _missing(self, run: RunView, island: IslandView, source: SourceView) -> frozenset[ModuleKey]:
        """The modules of fragments that are due and have not taken their outer step."""
        due = [fragment for fragment, at in source.sent.items() if source.taken - at == self.lag]
        path = run.path_of(source)
        keys = [path[slot] for fragment in due for slot in run.fragments[fragment]]
        return frozenset(key for key in keys if run.modules[key].version <= island.holds.get(key, -1))

    def _steps(self, run: RunView, source: SourceView, turn_steps: int) -> int:
        """Up to the turn's end, the next fragment's install, or a segment's end."""
        due = [at + self.lag - source.taken for at in source.sent.values() if at + self.lag > source.taken]
        return min([turn_steps - source.done, *due, *([run.segment_steps] if run.segment_steps else [])])


def _next_turn(run: RunView) -> int:
    """The first turn after the furthest of which the fragment has stepped."""
    turns, done = len(run.fragments), [0]
    for key, module in run.modules.items():
        if module.round:
            done.append((module.round - 1) * turns + run.fragment_of(key) + 1)
    return max(done)
