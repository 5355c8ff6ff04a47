"""PathRounds: every path contributes once a round, and a module steps when it has heard all paths through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diloco.messages import Commit, ModuleKey, Task
from diloco.progress import IslandView
from diloco.schedule import Barrier, NoMore, Schedule, Wait
from diloco.views import RunView


@dataclass(kw_only=True)
class PathRounds(Schedule):
    """DiPaCo's rounds (arXiv:2403.10616, section 2.5, Alg. 1): the sources are paths, not islands.

    Source i trains path i modulo paths on shard i; an island takes whichever is furthest back, so that there may be
    fewer islands than paths, or more. There is no barrier over all: a path goes on as soon as its own modules have
    stepped. A module's step is the merge over the paths through it (`merge.by=examples` weighs them by their shards),
    times the square root of their number, since averages over more paths are shorter (`rescale`).

    A path whose island is lost is trained again by another. `lag` and `keep` are those of `schedule=barrier`.
    """

    rescale: bool = True
    replicas: int = 0  # sources of each path, each with a part of its data; 0 = as many as there are islands for
    lag: int = 0  # inner steps between sending a fragment and installing what became of it
    keep: float = 0.0  # share of the local weights that survives an install

    moving = True

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise ValueError(f"schedule.replicas={self.replicas} must not be negative; 0 derives it from islands")
        self._turns = Barrier(lag=self.lag, keep=self.keep, late_mads=0)  # which nobody is late for

    def num_sources(self, islands: int, paths: int) -> int:
        """All replicas of all paths."""
        return paths * (self.replicas or max(islands // paths, 1))

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """As with a barrier."""
        self._turns.check(inner_steps, fragments, islands)

    def overlap_steps(self) -> int:
        """The lag."""
        return self.lag

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """That of a barrier; where the path may then have to wait, all that belongs to it is kept, to go elsewhere."""
        task = self._turns.next_task(island, run, now_s)
        if not isinstance(task, Task):
            return task
        ends = task.round * run.inner_steps + run.sources[task.source].done + task.steps
        waits = (ends - self.lag) % (run.inner_steps // len(run.fragments)) == 0
        save = (waits or task.last) and len(run.sources) > len(run.islands)
        anew = task.last and len(run.fragments) == 1 and self.lag == 0 and self.keep == 0
        return replace(task, save=save, sheds=save and anew)

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """For each module that all paths through it were heard of, in order of path."""
        commits = self._turns.commits(run, touched, now_s)
        if not self.rescale:
            return commits
        return [replace(commit, scale=math.sqrt(run.paths_through(commit.module))) for commit in commits]
