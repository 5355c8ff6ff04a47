"""Patience: how long to wait for something, from how long it took before. All deadlines come from this one knob."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from diloco.messages import IslandId

HICCUP_S = 6.0  # what anything may take longer than usual on a busy machine
UNKNOWN_S = 60.0  # what anything may take of which too little was seen
LEAST_SEEN = 3  # times, before it is said how long something usually takes
REMEMBERED = 16  # of the last so many is known how long they took


def most_s(seen: Sequence[float], patience: float) -> float | None:
    """How long is waited for what took `seen` seconds before; None: for ever, since too little was seen.

    The median, and beyond that `patience` times the median absolute deviation, or a hiccup if that is longer. So what
    is always slow is waited for, and what stalls is not. `patience` 0 waits for ever.
    """
    if not patience or len(seen) < LEAST_SEEN:
        return None
    median = statistics.median(seen)
    deviation = statistics.median(abs(seconds - median) for seconds in seen)
    return median + patience * max(deviation, HICCUP_S)


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """Somebody who has been at something for longer than patience allows."""

    who: IslandId
    kind: str
    spent_s: float
    usual_s: float | None  # None: too little was seen

    @property
    def said(self) -> str:
        """For people."""
        usual = f", which usually takes {self.usual_s:.1f} s" if self.usual_s is not None else ""
        return f"no progress for {self.spent_s:.0f} s in a {self.kind}{usual}"


@dataclass(kw_only=True)
class _Work:
    kind: str
    given_s: float
    size: float


@dataclass(kw_only=True)
class Pulse:
    """Who is at work since when. On each of its lanes an island does one thing after the other, in order.

    What is of one `kind` takes time in proportion to its size.
    """

    patience: float
    _work: dict[tuple[IslandId, str], deque[_Work]] = field(default_factory=dict)  # by island and lane
    _ended_s: dict[tuple[IslandId, str], float] = field(default_factory=dict)
    _seen: dict[tuple[IslandId, str], deque[float]] = field(default_factory=dict)  # by kind: seconds, of one size

    def begin(self, who: IslandId, kind: str, now_s: float, *, size: float = 1.0, lane: str = "") -> None:
        """`who` was given something to do."""
        self._work.setdefault((who, lane), deque()).append(_Work(kind=kind, given_s=now_s, size=size))

    def end(self, who: IslandId, now_s: float, *, lane: str = "") -> None:
        """The first of what `who` was given is done."""
        queue = self._work.get((who, lane))
        if not queue:
            return
        spent_s = self._spent_s((who, lane), now_s)
        work = queue.popleft()
        self._ended_s[who, lane] = now_s
        self._seen.setdefault((who, work.kind), deque(maxlen=REMEMBERED)).append(spent_s / work.size)

    def drop(self, who: IslandId) -> None:
        """`who` is gone, with all that was to be done."""
        self._work = {key: queue for key, queue in self._work.items() if key[0] != who}

    def overdue(self, now_s: float) -> list[Overdue]:
        """Those who have been at one thing for too long."""
        if not self.patience:
            return []
        found = []
        for key, queue in self._work.items():
            if not queue:
                continue
            work, spent_s = queue[0], self._spent_s(key, now_s)
            seen = [seconds * work.size for seconds in self._seen.get((key[0], work.kind), ())]
            limit_s = most_s(seen, self.patience)
            if spent_s > (self.patience * UNKNOWN_S if limit_s is None else limit_s):
                usual_s = None if limit_s is None else statistics.median(seen)
                found.append(Overdue(who=key[0], kind=work.kind, spent_s=spent_s, usual_s=usual_s))
        return found

    def _spent_s(self, key: tuple[IslandId, str], now_s: float) -> float:
        return now_s - max(self._work[key][0].given_s, self._ended_s.get(key, 0.0))
