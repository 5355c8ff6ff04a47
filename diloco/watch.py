"""How long nothing was heard, and when it is time to look whether somebody is late."""

from __future__ import annotations

from diloco import records
from diloco.events import Event, Log, Tick
from diloco.views import RunView

STALL_S = 120.0  # without any event but ticks, before it is said who is awaited
LOOK_EVERY_S = 1.0  # how often to look, while much is heard


class Watch:
    """The coordinator's sense of time; it has no clock but the events'."""

    def __init__(self) -> None:
        self._heard_s, self._patience_s = 0.0, STALL_S
        self._look_s = LOOK_EVERY_S

    def look(self, event: Event) -> bool:
        """Take note of an event; whether it is time to look for the late."""
        if not isinstance(event, Tick):
            self._heard_s, self._patience_s = event.now_s, STALL_S
            if event.now_s < self._look_s:
                return False
        self._look_s = event.now_s + LOOK_EVERY_S
        return True

    def stalled(self, now_s: float, run: RunView) -> list[Log]:
        """A round that stalls says who has not arrived; each time after twice as long."""
        if now_s - self._heard_s < self._patience_s:
            return []
        self._patience_s *= 2
        awaited = sorted({source for module in run.modules.values() for source in module.awaited})
        return [records.stalled(now_s - self._heard_s, awaited, run.round)]
