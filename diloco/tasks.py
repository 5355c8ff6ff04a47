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


def evaluation(run: RunView) -> Task:
    """The evaluator installs the present global weights and measures them."""
    task = bare(run, EVALUATOR, next(iter(run.sources.values())))
    versions = {slot: run.modules[key].version for slot, key in task.modules.items()}
    return replace(task, install=versions, evaluate="validation")
