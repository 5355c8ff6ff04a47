"""Schedules without a barrier: every contribution is applied as it comes, or as soon as there are a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diloco.async_.speed import steps_by_speed
from diloco.messages import Commit, IslandId, ModuleKey, Task, Turn
from diloco.progress import IslandView
from diloco.schedule import NoMore, Schedule, Wait, free_segment
from diloco.views import RunView


@dataclass(kw_only=True)
class FirstCome(Schedule):
    """Asynchronous Local-SGD (arXiv:2401.09135, section 3): each contribution is an outer step, in order of arrival.

    An island takes all modules, trains `inner_steps` on a shard that is due, and hands over; then it waits at most
    `grace_s` for others, so that those which arrive within that time go on from the same weights. The outer step itself
    waits for nobody. With `batch`, an outer step takes the mean of so many contributions (FedBuff).

    Staleness is how many versions were made between what a contribution started from and its outer step. The merged
    contribution is multiplied by (1 + staleness) ** -damping; one that is older than `max_staleness` is refused, and
    its data is trained on again.
    """

    batch: int = 1  # contributions of an outer step
    grace_s: float = 0.0  # inf = until all islands are there
    by_speed: bool = False  # slower islands take fewer steps, so that all take about as long (DyLU)
    speeds: list[float] = field(default_factory=list)  # relative ones, one an island; empty = measured while training
    draw: bool = True  # the next shard is drawn, under-served ones first (Eq. 2); else each island keeps its own
    damping: float = 0.0  # 0.5 is the paper's polynomial baseline
    max_staleness: int = -1  # -1 = any

    by_fragment = False
    free = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"schedule.batch={self.batch} must be at least 1: contributions of an outer step")
        if not self.grace_s >= 0:
            raise ValueError(f"schedule.grace_s={self.grace_s} must not be negative; 0 waits for nobody")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"schedule.damping={self.damping} must not be negative; 0 = none, 0.5 = the paper's")
        if self.max_staleness < -1:
            raise ValueError(f"schedule.max_staleness={self.max_staleness} must not be negative; -1 accepts any")
        if any(not 0 < speed < math.inf for speed in self.speeds):
            raise ValueError(f"schedule.speeds={self.speeds} must hold positive numbers, steps a second or relative")
        if self.speeds and not self.by_speed:
            raise ValueError("schedule.speeds counts only with schedule.by_speed=true")

    @property
    def drawn(self) -> bool:  # type: ignore[override]
        """From the pool's shards by chance."""
        return self.draw

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """There must be a speed for each island."""
        if self.speeds and len(self.speeds) != islands:
            raise ValueError(f"schedule.speeds has {len(self.speeds)} numbers for {islands} islands; give one each")

    def commits_a_round(self, islands: int) -> int:
        """One of each island's, or of a batch of them."""
        return max(islands // self.batch, 1)

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """The next segment of the source's round; the first one takes the newest weights."""
        source, pool = run.sources[island.source], run.pool
        assert pool is not None
        shard, position, round_steps = source.shard, source.position, source.round_steps
        if source.segment == 0:
            if not source.idle:
                return Wait()  # what it handed over is not judged yet
            if run.gathered.get(island.island, now_s) > now_s:
                return Wait(run.gathered[island.island])
            own = run.own_shard(source)
            stretch = pool.next(own, self.steps(island, run, now_s), run.shard_examples, run.seed)
            if stretch is None:
                return NoMore() if pool.exhausted else Wait()  # what others have may come back
            shard, position, round_steps = stretch.shard, stretch.first_step, stretch.steps
        return free_segment(island, run, shard=shard, first_step=position, round_steps=round_steps)

    def steps(self, island: IslandView, run: RunView, now_s: float) -> int:
        """Of an island's next round; where there is a grace, fewer if it is then through when the others are.

        Rounds that are equally long but out of step would stay so, and no grace would ever bring them together.
        """
        if not self.by_speed:
            return run.inner_steps
        pace_s = run.sources[island.source].pace_s
        steps = self._by_speed(island, run)
        together = round((run.round_ends_s - now_s) / pace_s) if pace_s and self.grace_s else 0
        return min(steps, together) if together >= steps / 2 else steps

    def _by_speed(self, island: IslandView, run: RunView) -> int:
        if self.speeds:
            return steps_by_speed(self.speeds[island.source], max(self.speeds), run.inner_steps)
        pace_s, least_s = run.sources[island.source].pace_s, run.paces.least_s
        if pace_s is None or least_s is None:
            return run.inner_steps
        return steps_by_speed(1 / pace_s, 1 / least_s, run.inner_steps)

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """A commit for each module that has enough contributions; at the end of all data, what there is."""
        assert run.pool is not None
        enough = 1 if run.pool.exhausted else self.batch
        commits = []
        for key in touched:
            arrivals = run.modules[key].arrivals
            if len(arrivals) < enough:
                continue
            order = sorted(arrivals)
            scales = [(1 + arrivals[place].staleness) ** -self.damping for place in order]
            commits.append(
                Commit(
                    module=key,
                    round=run.round,
                    sources=tuple(source for _, source in order),
                    weights=tuple(arrivals[place].examples for place in order),
                    rounds=tuple(round_ for round_, _ in order),
                    scale=sum(scales) / len(scales),
                )
            )
        return commits

    def regroup_s(self, run: RunView, now_s: float) -> float:
        """With those that still wait for others, or as the first of the next ones.

        Where speeds are measured, the first round waits for all: cycles that are as long as each other but begin at
        different times would never come together.
        """
        measured = self.by_speed and not self.speeds
        if measured and any(run.islands[IslandId(source)].alive for source in run.paces.unseen):
            return math.inf
        waiting_s = [ready_s for ready_s in run.gathered.values() if ready_s >= now_s]
        return waiting_s[-1] if waiting_s else now_s + self.grace_s

    def counts(self, run: RunView, turn: Turn, keys: Sequence[ModuleKey]) -> bool:
        """It is never too late."""
        return True

    def refuses(self, staleness: int) -> bool:
        """One that is too old."""
        return 0 <= self.max_staleness < staleness
