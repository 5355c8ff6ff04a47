"""Hearing: what is taken note of when the store has judged a contribution."""

from __future__ import annotations

import math

from diloco import records
from diloco.events import Log, Received
from diloco.messages import Settled
from diloco.progress import Arrival, SourceView, Work
from diloco.schedule import Schedule
from diloco.views import RunView


def heard(event: Received, source: SourceView, run: RunView, schedule: Schedule) -> list[Log]:
    """The contribution counts from now on, or it is late, stale or bad: what is to be logged of that."""
    turn, keys = event.turn, [verdict.module for verdict in event.verdicts]
    work = source.hand_over(turn.round, turn.fragment)
    run.observe(turn, event.now_s)
    modules = [run.modules[key] for key in keys]
    if work:
        run.pushes_s.append(event.now_s - work[-1].ended_s)
    if not schedule.counts(run, turn, keys):
        _account(work, run)
        return [late(event, run)]
    bad = [verdict for verdict in event.verdicts if not verdict.good]
    staleness = run.staleness(source, keys)
    stale = not bad and schedule.refuses(staleness)
    source.settle(Settled(round=turn.round, fragment=turn.fragment, accepted=not bad and not stale))
    _account(work, run, in_vain=stale)
    arrival = Arrival(
        examples=float(run.shard_examples[work[-1].shard if work else source.shard]),
        tokens=sum(done.tokens for done in work),
        norm=math.hypot(*[verdict.norm for verdict in event.verdicts]),
        staleness=staleness,
        steps=source.sent.get(turn.fragment, 0) - source.got.get(turn.fragment, 0),
        now_s=event.now_s,
    )
    for module in modules:
        module.awaited.discard(source.source)
        if bad:
            module.rejected += 1
        elif not stale:
            module.arrivals[turn.round, source.source] = arrival
    if bad:
        source.broken = True
        run.counters.rejected += 1
        return [records.rejected(event, bad[0], run.round)]
    if stale:
        run.counters.stale += 1
        return [records.stale(event, staleness, run.round)]
    return []


def late(event: Received, run: RunView) -> Log:
    """Nobody waits for it any more."""
    run.counters.late += 1
    return records.late(event, run.round)


def _account(work: list[Work], run: RunView, *, in_vain: bool = False) -> None:
    if run.pool is None:
        return
    for done in work:
        if in_vain:
            run.pool.give_back(done.stretch)
        else:
            run.pool.hand_over(done.steps)
