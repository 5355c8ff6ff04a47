"""Lines of metrics.jsonl that the coordinator writes: events and reports as flat records."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diloco.events import Committed, Joined, Leaving, Log, Lost, Received, Saved
from diloco.messages import CommitStats, ModuleKey, Reason, Report, SourceId, Task
from diloco.progress import IslandView
from diloco.views import RunView

WHY = {
    Reason.shape: "has the wrong names or shapes in module {module}",
    Reason.version: "is from a version that module {module} never had",
    Reason.not_finite: "is not finite in module {module}",
    Reason.norm: "has an absurd norm{detail}",
    Reason.duplicate: "was heard before and counts once",
    Reason.zombie: "is of an attempt that was given up with its island",
}


def committed(event: Committed, run: RunView) -> list[Log]:
    """What the outer steps looked like, of those modules together that took theirs on the same contributions."""
    alike: dict[object, list[CommitStats]] = {}
    for stats in event.stats:
        heard = (stats.round, run.fragment_of(stats.module), stats.sources, stats.rounds, stats.scale)
        alike.setdefault(heard, []).append(stats)
    return [_commit(group, run) for group in alike.values()]


def _commit(stats: Sequence[CommitStats], run: RunView) -> Log:
    """Norms and cosines are over all these modules together."""
    counters = run.counters
    size = len(stats[0].gram)
    gram = [[sum(s.gram[i][j] for s in stats) for j in range(size)] for i in range(size)]
    norms = [math.sqrt(max(gram[i][i], 0.0)) for i in range(size)]
    pairs = [(i, j) for i in range(size) for j in range(i) if norms[i] > 0 and norms[j] > 0]
    cosines = [gram[i][j] / (norms[i] * norms[j]) for i, j in pairs]
    stalest = max((s.staleness for s in stats), key=sum)
    record: dict[str, object] = {
        "event": "commit",
        "round": stats[0].round + 1,
        "fragment": run.fragment_of(stats[0].module),
        "fragments": len(run.fragments),
        "outer/version": max(s.version for s in stats),
        "outer/update_norm": math.sqrt(sum(s.update_square for s in stats)),
        "outer/contribution_norm": sum(norms) / size,
        "outer/contribution_norms": norms,
        "outer/cosine": sum(cosines) / len(cosines) if cosines else None,
        "outer/cosines": cosines,
        "outer/contributors": list(stats[0].sources),
        "outer/staleness": sum(stalest) / len(stalest),
        "outer/stalenesses": list(stalest),
        "outer/rounds": list(stats[0].rounds),
        "outer/scale": stats[0].scale,
        "outer/alive": run.alive(),
        "outer/participating": len(set(stats[0].sources)),
        "outer/weight": _weight(stats[0], run),
        "total/rounds": run.round,
        "total/tokens": counters.tokens,
        "total/bytes_up": counters.bytes_up,
        "total/bytes_down": counters.bytes_down,
        "total/bytes_inside": counters.bytes_inside,
        "total/bytes_sent": counters.bytes_sent,
        "total/seconds_waiting": counters.waiting_s,
    }
    return Log(record=record)


def _weight(stats: CommitStats, run: RunView) -> float:
    """The examples behind the contributors' data, as a share of those behind all who live or contributed: 0 to 1.

    Staleness damping is not in it: see `outer/scale`.
    """
    behind = dict(zip(stats.sources, stats.weights, strict=True))  # who contributed twice counts once
    living = [run.sources[island.source] for island in run.islands.values() if island.alive]
    examples = run.shard_examples
    everyone = {source.source: float(examples[source.shard % len(examples)]) for source in living} | behind
    return sum(behind.values()) / sum(everyone.values())


def segment(report: Report) -> Log:
    """A finished task of an island."""
    task = report.task
    record: dict[str, object] = {
        "event": "segment",
        "round": task.round,
        "island": task.island,
        "source": task.source,
        "segment": task.segment,
        "step": task.first_step + task.steps,
        "steps": task.steps,
        **report.metrics,
        "inner/tokens_per_s": report.tokens / report.seconds if report.seconds > 0 else None,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "clock_seconds": report.clock_s,
        "comm/bytes_up": report.bytes_up,
        "comm/bytes_down": report.bytes_down,
        "comm/bytes_inside": report.bytes_inside,
        "comm/seconds_waiting": report.waiting_s,
    }
    return Log(record=record)


def evaluated(report: Report) -> Log:
    """The global weights after some rounds."""
    return Log(record={"event": "evaluation", "round": report.task.round, **report.metrics})


def saved(event: Saved, round_: int) -> Log:
    """A checkpoint of that many rounds, or why there is none."""
    if event.error:
        return warning(f"the checkpoint {event.path} could not be written: {event.error}", round_)
    return Log(record={"event": "checkpoint", "round": round_, "path": event.path, "seconds": event.seconds})


def lost(event: Lost, round_: int) -> Log:
    """An island is gone."""
    return Log(record={"event": "lost", "round": round_, "island": event.island, "message": event.reason})


def leaving(event: Leaving, round_: int) -> Log:
    """An island's node goes away soon."""
    return warning(f"the node of island {event.island} is leaving; the island ends its round", round_)


def left(island: IslandView, now_s: float) -> Lost:
    """A leaving island has handed over all that it had."""
    return Lost(now_s=now_s, island=island.island, reason="its node is leaving; all its work was handed over")


def joined(event: Joined, round_: int) -> Log:
    """An island is there."""
    return Log(record={"event": "joined", "round": round_, "island": event.island})


def late(event: Received, round_: int) -> Log:
    """A contribution that nobody waits for any more."""
    turn = event.turn
    return warning(f"a contribution of source {turn.source} to round {turn.round} came too late", round_)


def left_out(source: SourceId, left: int, round_: int) -> Log:
    """A round that ended without a source, since it had been waited for long enough."""
    text = f"round {left} went on without source {source}"
    return Log(record={"event": "late", "round": round_, "source": source, "of_round": left, "message": text})


def stale(event: Received, staleness: int, round_: int) -> Log:
    """A contribution that was made from weights that are too old."""
    text = f"a contribution of source {event.turn.source} is {staleness} versions old and was refused"
    source = event.turn.source
    told = {"island": source, "source": source, "staleness": staleness, "message": text}
    return Log(record={"event": "stale", "round": round_, **told})


def rejected(event: Received, reason: Reason, module: ModuleKey, detail: str, round_: int) -> Log:
    """A bad contribution; `module`: the part that is, or its first one. None of it counts on any."""
    turn, why = event.turn, WHY[reason].format(module=module, detail=detail)
    text = f"a contribution of source {turn.source} to round {turn.round} {why}; all of it was rejected"
    told = {"source": turn.source, "module": module, "of_round": turn.round, "reason": reason.value}
    return Log(record={"event": "warning", "round": round_, **told, "message": text})


def fresh_state(task: Task, round_: int) -> Log:
    """A source in mid-run whose optimizer state is not there, or was thrown away."""
    text = f"source {task.source} starts with empty optimizer state at step {task.first_step}, and a warm-up"
    return warning(text, round_)


def stalled(seconds: float, awaited: Sequence[SourceId], round_: int) -> Log:
    """Who has not arrived at a barrier."""
    return warning(f"nothing was heard for {seconds:.0f} s; the round waits for the sources {list(awaited)}", round_)


def silent(source: SourceId, steps: int, alive: int, round_: int) -> Log:
    """An island that lives, but does not contribute."""
    text = f"of {alive} islands alive, source {source} has had no part in the last {steps} outer steps"
    return warning(text, round_)


def warning(message: str, round_: int) -> Log:
    """Something the user should know; the run goes on."""
    return Log(record={"event": "warning", "round": round_, "message": message})
