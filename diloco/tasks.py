"""Tasks without steps: to evaluate, or to save what a source has."""

from __future__ import annotations

from dataclasses import replace

from diloco.messages import EVALUATOR, IslandId, Task
from diloco.progress import SourceView
from diloco.views import RunView


def bare(run: RunView, island: IslandId, source: SourceView) -> Task:
    """A task that installs, trains and sends nothing."""
    return Task(
        source=source.source,
        island=island,
        round=run.round,
        segment=0,
        modules=run.path_of(source),
        install={},
        keep=0.0,
        shard=source.shard,
        first_step=source.position,
        steps=0,
        send=(),
        last=False,
    )


def exports(run: RunView) -> list[Task]:
    """Each living island is to save what it has of its source."""
    alive = [island for island in run.islands.values() if island.alive]
    own = [(island.island, run.sources[island.source]) for island in alive]
    return [
        replace(bare(run, island, source), save=True)
        for island, source in own
        if not run.moving or (source.island == island and source.last == island)
    ]


def present(run: RunView, path: int = 0) -> Task:
    """The evaluator installs the present global weights of a path.

    Always for the same source: modules that paths share stay where they are.
    """
    modules = run.paths[path]
    versions = {slot: run.modules[key].version for slot, key in modules.items()}
    return replace(bare(run, EVALUATOR, next(iter(run.sources.values()))), modules=modules, install=versions)


def evaluation(run: RunView, index: int = 0) -> Task:
    """The evaluator measures the present global weights on what is held out; of several splits, on that of a path."""
    return replace(present(run, index % len(run.paths)), evaluate=run.splits[index])
