"""Folding: contributions are added up in order of source as they come, where it is known whom a step waits for.

So what the store keeps of a module does not grow with the number of paths through it.
"""

from __future__ import annotations

from collections.abc import Iterable

from diloco.events import FoldAll
from diloco.messages import Fold, ModuleKey, SourceId
from diloco.schedule import Schedule
from diloco.views import RunView


def due(keys: Iterable[ModuleKey], run: RunView, schedule: Schedule) -> list[FoldAll]:
    """What is to be added up now that these modules were heard of. Notes it."""
    found = []
    for key in keys:
        planned = schedule.planned(run, key)
        sources = _next(key, planned, run) if len(planned) > 1 else []
        if sources:
            module = run.modules[key]
            weights = tuple(module.arrivals[module.round, source].examples for source in sources)
            found.append(
                Fold(
                    module=key,
                    round=module.round,
                    sources=tuple(sources),
                    weights=weights,
                    planned=planned_weights(planned, run),
                )
            )
    return [FoldAll(folds=tuple(found))] if found else []


def planned_weights(planned: Iterable[SourceId], run: RunView) -> tuple[float, ...]:
    """The examples behind the contributions of these sources, each of which has a shard of its own."""
    return tuple(float(run.shard_examples[run.sources[source].shard]) for source in planned)


def _next(key: ModuleKey, planned: tuple[SourceId, ...], run: RunView) -> list[SourceId]:
    """Those whose turn it is and who were heard, but for who was refused."""
    module, sources = run.modules[key], []
    while module.folded < len(planned) and planned[module.folded] not in module.awaited:
        source = planned[module.folded]
        module.folded += 1
        if (module.round, source) in module.arrivals:
            sources.append(source)
    return sources
