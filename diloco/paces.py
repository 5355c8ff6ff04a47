"""Paces: who is fastest, and of whom nothing was seen, known without looking through all sources each time."""

from __future__ import annotations

from collections.abc import Mapping

from diloco.messages import SourceId
from diloco.progress import SourceView


class Paces:
    """Follows the measured `pace_s` of these sources; `after` must be told of each that changed."""

    def __init__(self, sources: Mapping[SourceId, SourceView]) -> None:
        self._sources = sources
        self.unseen = {number for number, source in sources.items() if source.pace_s is None}
        self._fastest: SourceId | None = None
        self._find()

    @property
    def least_s(self) -> float | None:
        """Seconds a step of the fastest; None where nobody was seen."""
        return None if self._fastest is None else self._sources[self._fastest].pace_s

    def after(self, number: SourceId, before_s: float | None) -> None:
        """This source's pace was `before_s`, and may be another now."""
        pace_s, least_s = self._sources[number].pace_s, self.least_s
        if pace_s is None:
            return
        self.unseen.discard(number)
        if number == self._fastest and before_s is not None and pace_s > before_s:
            self._find()
        elif least_s is None or pace_s < least_s:
            self._fastest = number

    def _find(self) -> None:
        seen = {number: source.pace_s for number, source in self._sources.items() if source.pace_s is not None}
        self._fastest = min(seen, key=seen.__getitem__) if seen else None
