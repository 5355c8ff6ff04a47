"""Who is asked again after an outer step."""

from __future__ import annotations

from diloco.messages import IslandId, ModuleKey
from diloco.waiting import Waiting

A, B, C = (ModuleKey(f"slot/{name}") for name in "abc")


def test_only_those_that_wait_for_it_or_for_anything() -> None:
    waiting = Waiting()
    waiting.add(IslandId(3), frozenset({A}))
    waiting.add(IslandId(1), frozenset({A, B}))
    waiting.add(IslandId(2))
    waiting.add(IslandId(0), frozenset({C}))
    assert waiting.on([A]) == [1, 2, 3]
    assert waiting.on([B, C]) == [0, 1, 2]
    assert waiting.all() == [0, 1, 2, 3]


def test_what_one_waits_for_may_change() -> None:
    waiting = Waiting()
    waiting.add(IslandId(0), frozenset({A}))
    waiting.add(IslandId(0), frozenset({B}))
    assert (waiting.on([A]), waiting.on([B])) == ([], [0])
    waiting.add(IslandId(0))
    assert waiting.on([A]) == [0]
    waiting.discard(IslandId(0))
    waiting.discard(IslandId(0))
    assert (waiting.on([A]), waiting.all()) == ([], [])
