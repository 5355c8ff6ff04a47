"""Contributions that were handed to the store and not judged yet, put back into the order in which they were sent."""

from __future__ import annotations

from diloco.events import Received
from diloco.messages import SourceId, Turn


class Pushes:
    """Shards of the store answer in any order; a source's verdicts are heard in the order of its turns.

    So the outer steps of fragments have their order too, and a checkpoint at a round's end holds none of the next.
    """

    def __init__(self) -> None:
        self._turns: dict[SourceId, list[Turn]] = {}
        self._early: dict[Turn, Received] = {}

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, turn: Turn) -> None:
        """Handed to the store."""
        self._turns.setdefault(turn.source, []).append(turn)

    def under_way(self, source: SourceId) -> bool:
        """Whether something of that source is not judged yet."""
        return source in self._turns

    def judged(self, event: Received) -> list[Received]:
        """What can be heard now: nothing, if an earlier turn of that source is not judged."""
        turns = self._turns.get(event.turn.source, [])
        if event.turn not in turns:
            return [event]  # its island was given up for lost
        self._early[event.turn] = event
        heard = []
        while turns and turns[0] in self._early:
            heard.append(self._early.pop(turns.pop(0)))
        if not turns:
            del self._turns[event.turn.source]
        return heard

    def forget(self, source: SourceId) -> None:
        """Its island is gone; what of its own is judged from now on is heard at once."""
        for turn in self._turns.pop(source, []):
            self._early.pop(turn, None)
