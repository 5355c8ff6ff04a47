"""Lines of metrics.jsonl that the coordinator writes: events and reports as flat records."""

from __future__ import annotations

import math

from diloco.events import Committed, Log
from diloco.messages import Report
from diloco.views import Counters


def committed(event: Committed, counters: Counters) -> Log:
    """What a round's outer steps looked like; norms and cosines are over all modules together."""
    stats = event.stats
    size = len(stats[0].gram)
    gram = [[sum(s.gram[i][j] for s in stats) for j in range(size)] for i in range(size)]
    norms = [math.sqrt(max(gram[i][i], 0.0)) for i in range(size)]
    pairs = [(i, j) for i in range(size) for j in range(i) if norms[i] > 0 and norms[j] > 0]
    cosines = [gram[i][j] / (norms[i] * norms[j]) for i, j in pairs]
    record: dict[str, object] = {
        "event": "commit",
        "round": stats[0].round + 1,
        "outer/version": max(s.version for s in stats),
        "outer/update_norm": math.sqrt(sum(s.update_square for s in stats)),
        "outer/contribution_norm": sum(norms) / size,
        "outer/contribution_norms": norms,
        "outer/cosine": sum(cosines) / len(cosines) if cosines else None,
        "outer/cosines": cosines,
        "outer/contributors": list(stats[0].sources),
        "outer/staleness": 0,
        "total/tokens": counters.tokens,
        "total/bytes_up": counters.bytes_up,
        "total/bytes_down": counters.bytes_down,
        "total/seconds_waiting": counters.waiting_s,
    }
    return Log(record=record)


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
        **report.metrics,
        "inner/tokens_per_s": report.tokens / report.seconds if report.seconds > 0 else None,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "comm/bytes_up": report.bytes_up,
        "comm/bytes_down": report.bytes_down,
        "comm/seconds_waiting": report.waiting_s,
    }
    return Log(record=record)


def warning(message: str, round_: int) -> Log:
    """Something the user should know; the run goes on."""
    return Log(record={"event": "warning", "round": round_, "message": message})
