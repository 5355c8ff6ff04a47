"""How long nothing was heard, when it is time to look whether somebody is late, and who lives without contributing."""

from __future__ import annotations

from collections import Counter

from diloco import records
from diloco.events import Committed, Event, Log, Tick
from diloco.messages import SourceId
from diloco.views import RunView

STALL_S = 120.0  # without any event but ticks, before it is said who is awaited
LOOK_EVERY_S = 1.0  # how often to look, while much is heard
SILENT_ROUNDS = 3  # without a contribution that counts, before it is said that an island only lives
SILENT_STEPS = 10  # the same where sources run free, in outer steps for each island, since some are much slower


class Watch:
    """The coordinator's sense of time; it has no clock but the events'."""

    def __init__(self) -> None:
        self._heard_s, self._patience_s = 0.0, STALL_S
        self._look_s = LOOK_EVERY_S
        self._silent: Counter[SourceId] = Counter()  # outer steps without a contribution of that living island

    def look(self, event: Event) -> bool:
        """Take note of an event; whether it is time to look for the late."""
        if not isinstance(event, Tick):
            self._heard_s, self._patience_s = event.now_s, STALL_S
            if event.now_s < self._look_s:
                return False
        self._look_s = event.now_s + LOOK_EVERY_S
        return True

    def parted(self, event: Committed, run: RunView) -> list[Log]:
        """Who lives, and takes no part: alive and contributing are not the same (pitfall L25)."""
        if run.moving:  # a source has no island of its own
            return []
        living = [island.source for island in run.islands.values() if island.alive]
        most = SILENT_STEPS * len(living) if run.free else SILENT_ROUNDS
        told = []
        for stats in event.stats:
            if run.fragment_of(stats.module) == 0 and run.counts_for_all(stats.module):
                self._silent.update(living)
                for source in stats.sources:
                    del self._silent[source]
                told += [source for source in living if self._silent[source] == most]
        return [records.silent(source, most, len(living), run.round) for source in told]

    def stalled(self, now_s: float, run: RunView) -> list[Log]:
        """A round that stalls says who has not arrived; each time after twice as long."""
        if now_s - self._heard_s < self._patience_s:
            return []
        self._patience_s *= 2
        awaited = sorted({source for module in run.modules.values() for source in module.awaited})
        return [records.stalled(now_s - self._heard_s, awaited, run.round)]
