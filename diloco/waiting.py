"""Waiting: the islands, or sources, for which there was nothing to do, and what may change that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from diloco.messages import IslandId, ModuleKey, SourceId

Who = TypeVar("Who", IslandId, SourceId)


class Waiting(Generic[Who]):
    """So that an outer step asks only for those to which it may make a difference."""

    def __init__(self) -> None:
        self._keys: dict[Who, frozenset[ModuleKey]] = {}
        self._anything: set[Who] = set()
        self._by_key: dict[ModuleKey, set[Who]] = {}

    def add(self, who: Who, keys: frozenset[ModuleKey] = frozenset()) -> None:
        """It waits for an outer step of one of `keys`; without any, of whatever module."""
        if self._keys.get(who) == keys:
            return
        self.discard(who)
        self._keys[who] = keys
        for key in keys:
            self._by_key.setdefault(key, set()).add(who)
        if not keys:
            self._anything.add(who)

    def discard(self, who: Who) -> None:
        """It waits no longer."""
        for key in self._keys.pop(who, frozenset()):
            self._by_key[key].discard(who)
        self._anything.discard(who)

    def all(self) -> list[Who]:
        """In order."""
        return sorted(self._keys)

    def on(self, keys: Iterable[ModuleKey]) -> list[Who]:
        """Those that an outer step of these modules may let go on, in order."""
        return sorted(self._anything.union(*(self._by_key.get(key, ()) for key in keys)))
