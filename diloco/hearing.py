"""Hearing: what is taken note of when the store has judged a contribution."""

from __future__ import annotations

import math

from diloco import records
from diloco.events import Log, Received
from diloco.messages import ModuleKey, Reason, Settled
from diloco.progress import Arrival, SourceView, Work
from diloco.schedule import Schedule
from diloco.views import RunView


def heard(event: Received, source: SourceView, run: RunView, schedule: Schedule) -> list[Log]:
    """The contribution counts from now on, or it is late, stale or bad: what is to be logged of that."""
    turn, keys = event.turn, [verdict.module for verdict in event.verdicts]
    source.heard = [event.attempt, turn.round, turn.fragment]
    work = source.hand_over(turn.round, turn.fragment)
    run.observe(turn, event.now_s)
    modules = [run.modules[key] for key in keys]
    if work:
        run.pushes_s.append(event.now_s - work[-1].ended_s)
    if not schedule.counts(run, turn, keys):
        _account(work, run)
        run.counters.late += 1
        return [records.late(event, run.round)]
    norm = math.hypot(*[verdict.norm for verdict in event.verdicts])
    bad = _fault(event, norm, run)
    staleness = run.staleness(source, keys)
    stale = not bad and schedule.refuses(staleness)
    source.settle(Settled(round=turn.round, fragment=turn.fragment, accepted=not bad and not stale))
    _account(work, run, in_vain=stale)
    arrival = Arrival(
        examples=float(run.shard_examples[work[-1].shard if work else source.shard]),
        tokens=sum(done.tokens for done in work),
        norm=norm,
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
        return [_reject(event, *bad, run)]
    if stale:
        run.counters.stale += 1
        return [records.stale(event, staleness, run.round)]
    return []


def unheard(event: Received, source: SourceView | None, run: RunView) -> Log:
    """It is of an attempt that was given up with its island, or was heard before: that one's verdict stands."""
    again = source is not None and source.attempt == event.attempt
    reason = Reason.duplicate if again else Reason.zombie
    return _reject(event, reason, event.verdicts[0].module, "", run)


def _fault(event: Received, norm: float, run: RunView) -> tuple[Reason, ModuleKey, str] | None:
    """What is wrong with a contribution, with which part of it, and how much too large it is."""
    for verdict in event.verdicts:
        if verdict.reason is not None:
            return verdict.reason, verdict.module, ""
    first = event.verdicts[0].module
    allowed = run.norms.allowed(first)
    return (Reason.norm, first, f" ({norm:.4g}, at most {allowed:.4g})") if norm > allowed else None


def _reject(event: Received, reason: Reason, module: ModuleKey, detail: str, run: RunView) -> Log:
    run.counters.reject(reason)
    return records.rejected(event, reason, module, detail, run.round)


def _account(work: list[Work], run: RunView, *, in_vain: bool = False) -> None:
    if run.pool is None:
        return
    for done in work:
        if in_vain:
            run.pool.give_back(done.stretch)
        else:
            run.pool.hand_over(done.steps)
