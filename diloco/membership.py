"""Membership: islands that are gone, that are there, and that are about to leave."""

from __future__ import annotations

from diloco import records
from diloco.events import Leaving, Log
from diloco.messages import IslandId
from diloco.progress import IslandView, SourceView
from diloco.pushes import Pushes
from diloco.seats import Bench
from diloco.views import RunView


def lose(island: IslandView, run: RunView, bench: Bench | None, pushes: Pushes) -> list[SourceView]:
    """An island is gone, with all that it was given. Returns the sources that it had, which it has no more."""
    run.leaving.discard(island.island)
    island.alive, island.holds, island.trains = False, {}, None
    sources = bench.lost(island.island) if bench else [run.sources[island.source]]
    for source in sources:
        pushes.forget(source.source)
        run.lose(source)
    return sources


def join(number: IslandId, run: RunView) -> SourceView:
    """An island is there. Returns the source that it has, or had last."""
    run.counters.islands_joined += 1
    island = run.islands[number]
    island.alive = True
    return run.sources[island.source]


def leave(event: Leaving, run: RunView) -> list[Log]:
    """An island's node has announced that it goes away."""
    if not run.islands[event.island].alive or event.island in run.leaving:
        return []
    run.leaving.add(event.island)
    return [records.leaving(event, run.round)]


def begins_nothing(island: IslandView, run: RunView) -> bool:
    """Whether it is leaving, and what it is to do next would begin a round."""
    return island.island in run.leaving and run.sources[island.source].segment == 0


def departed(run: RunView, pushes: Pushes) -> list[IslandView]:
    """The leaving islands that have done and handed over all that they were given."""
    islands = [run.islands[number] for number in sorted(run.leaving)]
    return [island for island in islands if not island.queued and not pushes.under_way(island.source)]


def too_few(run: RunView) -> bool:
    """Whether no outer step is to be taken, since so many islands are gone."""
    return run.min_islands > 0 and run.alive() < run.min_islands
