"""Waiting: the islands for which there was nothing to do, and what may change that."""

from __future__ import annotations

from collections.abc import Iterable

from diloco.messages import IslandId, ModuleKey


class Waiting:
    """So that an outer step asks only for those islands to which it may make a difference."""

    def __init__(self) -> None:
        self._keys: dict[IslandId, frozenset[ModuleKey]] = {}
        self._anything: set[IslandId] = set()
        self._by_key: dict[ModuleKey, set[IslandId]] = {}

    def add(self, island: IslandId, keys: frozenset[ModuleKey] = frozenset()) -> None:
        """It waits for an outer step of one of `keys`; without any, of whatever module."""
        if self._keys.get(island) == keys:
            return
        self.discard(island)
        self._keys[island] = keys
        for key in keys:
            self._by_key.setdefault(key, set()).add(island)
        if not keys:
            self._anything.add(island)

    def discard(self, island: IslandId) -> None:
        """It waits no longer."""
        for key in self._keys.pop(island, frozenset()):
            self._by_key[key].discard(island)
        self._anything.discard(island)

    def all(self) -> list[IslandId]:
        """In order."""
        return sorted(self._keys)

    def on(self, keys: Iterable[ModuleKey]) -> list[IslandId]:
        """Those that an outer step of these modules may let go on, in order."""
        return sorted(self._anything.union(*(self._by_key.get(key, ()) for key in keys)))
