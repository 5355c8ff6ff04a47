"""The least pace and those not seen, against a look through all sources."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diloco.messages import ShardId, SourceId
from diloco.paces import Paces
from diloco.progress import SourceView


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 9.0)), max_size=30))
def test_the_least_is_the_minimum(told: list[tuple[int, float]]) -> None:
    sources = {SourceId(i): SourceView(source=SourceId(i), shard=ShardId(i)) for i in range(5)}
    paces = Paces(sources)
    for number, pace_s in told:
        before_s = sources[SourceId(number)].pace_s
        sources[SourceId(number)].pace_s = pace_s
        paces.after(SourceId(number), before_s)
        seen = [source.pace_s for source in sources.values() if source.pace_s is not None]
        assert paces.least_s == min(seen)
        assert paces.unseen == {n for n, source in sources.items() if source.pace_s is None}


def test_nobody_was_seen() -> None:
    assert Paces({}).least_s is None


def test_what_was_known_before_is_found() -> None:
    sources = {SourceId(i): SourceView(source=SourceId(i), shard=ShardId(i)) for i in range(3)}
    sources[SourceId(1)].pace_s, sources[SourceId(2)].pace_s = 3.0, 2.0
    paces = Paces(sources)
    assert (paces.least_s, paces.unseen) == (2.0, {SourceId(0)})
