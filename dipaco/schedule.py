"""Schedules of paths: a module steps when it has heard all paths through it, or each time it hears one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diloco.folding import planned_weights
from diloco.messages import Commit, ModuleKey, SourceId, Task, Turn
from diloco.progress import IslandView, SourceView
from diloco.schedule import Barrier, NoMore, Schedule, Wait, free_segment
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
        _check_replicas(self.replicas)
        self._turns = Barrier(lag=self.lag, keep=self.keep)

    def num_sources(self, islands: int, paths: int) -> int:
        """All replicas of all paths."""
        return _num_sources(self.replicas, islands, paths)

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
        """For each module that all paths through it were heard of, in order of path. Nobody is ever late."""
        heard = [key for key in touched if not run.modules[key].awaited]
        return [
            replace(
                commit,
                planned=planned_weights(self.planned(run, commit.module), run),
                scale=math.sqrt(run.paths_through(commit.module)) if self.rescale else 1.0,
            )
            for commit in self._turns.commits(run, heard, now_s)
        ]

    def planned(self, run: RunView, key: ModuleKey) -> tuple[SourceId, ...]:
        """All paths through it."""
        return run.sources_through(key)


@dataclass(kw_only=True)
class PathFirstCome(Schedule):
    """Asynchronous paths: each contribution is an outer step of every module of its path, and nobody waits for another.

    As with `path_rounds` the sources are paths, and an island takes whichever is furthest back; a path goes on with the
    newest weights as soon as its own contribution was heard, whatever the others do. A module of P_le paths so takes
    P_le steps (times replicas) in a round: with `outer=delayed_nesterov` its momentum moves once in as many
    (arXiv:2401.09135, Alg. 3, for each module by the number of its own paths), and a round of contributions that do
    not depend on the weights comes to the step of `path_rounds`. Each is weighed by its shard (`by_shard`), times the
    square root of P_le (`rescale`), times (1 + staleness) ** -damping.
    """

    rescale: bool = True
    by_shard: bool = True  # else all count alike
    damping: float = 0.0  # 0.5 is the polynomial baseline of arXiv:2401.09135
    replicas: int = 0  # as path_rounds'

    free = True
    moving = True

    def __post_init__(self) -> None:
        _check_replicas(self.replicas)
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"schedule.damping={self.damping} must not be negative; 0 = none, 0.5 = polynomial")

    def num_sources(self, islands: int, paths: int) -> int:
        """All replicas of all paths."""
        return _num_sources(self.replicas, islands, paths)

    def check(self, inner_steps: int, fragments: int, islands: int) -> None:
        """A contribution has all modules of its path."""
        if fragments > 1:
            raise ValueError(
                f"schedule=path_first_come exchanges all of a path at once, and the layout has {fragments} fragments:"
                " use layout.fragments=1, or schedule=path_rounds"
            )

    def commits_a_round(self, islands: int) -> int:
        """One of each contribution."""
        return islands

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        """The next segment of the source's round; the first one takes the newest weights."""
        source = run.sources[island.source]
        if source.round >= run.rounds:
            return NoMore()
        if source.segment == 0 and not source.idle:
            return Wait(keys=frozenset(run.path_of(source).values()))  # what it handed over is not judged yet
        task = free_segment(island, run, shard=source.shard, first_step=source.position, round_steps=run.inner_steps)
        return replace(task, save=task.last and len(run.sources) > len(run.islands))

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        """A step for each contribution. A module's round is that of the path through it which is furthest back."""
        return [commit for key in touched for commit in self._commits(run, key)]

    def counts(self, run: RunView, turn: Turn, keys: Sequence[ModuleKey]) -> bool:
        """It is never too late."""
        return True

    def _commits(self, run: RunView, key: ModuleKey) -> list[Commit]:
        module, through = run.modules[key], run.sources_through(key)
        round_ = min(_heard_rounds(run.sources[source]) for source in through) - 1
        if not module.arrivals:  # it was refused
            return [Commit(module=key, round=round_, sources=(), weights=())] if round_ >= module.round else []
        total = sum(planned_weights(through, run)) if self.by_shard else 0.0
        steps = []
        for (of_round, source), arrival in sorted(module.arrivals.items()):
            share = len(through) * arrival.examples / total if self.by_shard else 1.0
            root = math.sqrt(run.paths_through(key)) if self.rescale else 1.0
            staleness = module.version - run.sources[source].held.get(key, module.version)  # this module's own
            steps.append(
                Commit(
                    module=key,
                    round=round_,
                    sources=(source,),
                    weights=(arrival.examples,),
                    rounds=(of_round,),
                    scale=share * root * (1 + staleness) ** -self.damping,
                )
            )
        return steps


def _heard_rounds(source: SourceView) -> int:
    """Of how many rounds a source has handed over its contribution."""
    return source.work[0].round if source.work else source.round


def _num_sources(replicas: int, islands: int, paths: int) -> int:
    return paths * (replicas or max(islands // paths, 1))


def _check_replicas(replicas: int) -> None:
    if replicas < 0:
        raise ValueError(f"schedule.replicas={replicas} must not be negative; 0 derives it from islands")
