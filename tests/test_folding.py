"""Contributions that are added up as they come: the same bits as all at once, and memory that does not grow."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from diloco import folding
from diloco.codec import Codec, Float32, Int8
from diloco.inbox import MEASURED_SOURCES
from diloco.merge import RDA, Mean, MeanBy, Merge
from diloco.messages import Commit, Contribution, Fold, IslandId, ModuleKey, ShardId, Snapshot, SourceId, Tensors
from diloco.outer import Nesterov
from diloco.progress import Arrival, ModuleView, SourceView
from diloco.schedule import Barrier
from diloco.store import ModuleStore
from diloco.views import RunView

KEY = ModuleKey("whole/0")
MANY = 12
WEIGHTS = tuple(10.0 + 7 * i for i in range(MANY))


def tensors(seed: int) -> Tensors:
    return {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))}


def filled(merge: Merge, codec: Codec) -> ModuleStore:
    store = ModuleStore(outer=Nesterov(), merge=merge, codec=codec, codec_down=Float32())
    store.fill([Snapshot(module=KEY, version=0, base_version=None, payload=Float32().encode(tensors(100)))])
    return store


def sent(source: int, codec: Codec, attempt: int = 0, seed: int | None = None) -> Contribution:
    return Contribution(
        module=KEY,
        source=SourceId(source),
        island=IslandId(0),
        round=0,
        base_version=0,
        payload=codec.encode(tensors(source if seed is None else seed)),
        attempt=attempt,
    )


def commit(sources: list[int], planned: tuple[float, ...] = WEIGHTS) -> Commit:
    return Commit(
        module=KEY,
        round=0,
        sources=tuple(map(SourceId, sources)),
        weights=tuple(WEIGHTS[source] for source in sources),
        planned=planned,
        scale=3.0,
    )


def fold(sources: list[int]) -> Fold:
    chosen = commit(sources)
    return Fold(module=KEY, round=0, sources=chosen.sources, weights=chosen.weights, planned=WEIGHTS)


def values(store: ModuleStore) -> torch.Tensor:
    (snapshot,) = store.pull({KEY: None})
    return Float32().decode(snapshot.payload)["w"]


@pytest.mark.parametrize("codec", [Float32(), Int8()], ids=["float32", "int8"])
@pytest.mark.parametrize("merge", [Mean(), Mean(by=MeanBy.examples), RDA()], ids=["uniform", "examples", "rda"])
@pytest.mark.parametrize("steps", [[], [1], [5], [1, 2, 3], [12]])
def test_folded_or_not_the_step_is_the_same_to_the_bit(merge: Merge, codec: Codec, steps: list[int]) -> None:
    """`steps`: how many are folded at a time, while the rest is still to come."""
    expected, store = filled(merge, codec), filled(merge, codec)
    for source in range(MANY):
        expected.push(sent(source, codec))
    expected.commit(commit(list(range(MANY)), planned=()))
    there = 0
    for count in steps:
        for source in range(there, there + count):
            store.push(sent(source, codec))
        store.fold(fold(list(range(there, there + count))))
        store.fold(fold(list(range(there, there + count))))  # told twice, as after a resume
        there += count
    for source in range(there, MANY):
        store.push(sent(source, codec))
    store.commit(commit(list(range(MANY))))
    assert torch.equal(values(store), values(expected))
    for ours, theirs in zip(store.measure(), expected.measure(), strict=True):
        assert ours == theirs  # norms, cosines, staleness


def test_a_mean_over_those_that_came_whenever_they_were_folded() -> None:
    """Sources 2 and 7 were refused. Against the mean by hand, in float64."""
    present = [source for source in range(MANY) if source not in (2, 7)]
    total = sum(WEIGHTS[source] for source in present)
    mean = sum(WEIGHTS[source] / total * tensors(source)["w"].double() for source in present)
    expected = tensors(100)["w"].double() - 0.7 * 1.9 * 3.0 * mean
    found = []
    for early in (0, 3, 6, len(present)):
        store = filled(Mean(by=MeanBy.examples), Float32())
        for source in present:
            store.push(sent(source, Float32()))
        store.fold(fold(present[:early]))
        store.commit(commit(present))
        found.append(values(store))
        torch.testing.assert_close(found[-1].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(found[0], other) for other in found)


def test_memory_does_not_grow_with_the_contributions_that_were_folded() -> None:
    held = {}
    size = sent(0, Float32()).payload.nbytes
    for count in (MEASURED_SOURCES, 4 * MEASURED_SOURCES, 32 * MEASURED_SOURCES):
        store = filled(Mean(), Float32())
        planned = (1.0,) * count
        for source in range(count):
            store.push(sent(source, Float32()))
            one = replace(fold([0]), sources=(SourceId(source),), weights=(1.0,), planned=planned)
            store.fold(one)
        state = store.state()[KEY].tensors
        held[count] = sum(v.nbytes for name, v in state.items() if name.startswith(("inbox/", "sum/")))
        assert held[count] <= (MEASURED_SOURCES + 1) * size
    assert len(set(held.values())) == 1


def test_a_store_saved_between_two_folds_goes_on_to_the_same_bits() -> None:
    straight, first = (filled(Mean(by=MeanBy.examples), Int8()) for _ in range(2))
    for source in range(MANY):
        straight.push(sent(source, Int8()))
    straight.commit(commit(list(range(MANY))))
    for source in range(10):
        first.push(sent(source, Int8()))
    first.fold(fold(list(range(10))))
    second = ModuleStore(outer=Nesterov(), merge=Mean(by=MeanBy.examples), codec=Int8(), codec_down=Float32())
    second.load_state(first.state())
    for source in (10, 11):
        second.push(sent(source, Int8()))
    second.fold(fold([10]))
    second.commit(commit(list(range(MANY))))
    assert torch.equal(values(second), values(straight))


def test_a_later_attempt_does_not_replace_what_was_folded() -> None:
    once, twice = filled(Mean(), Float32()), filled(Mean(), Float32())
    for store in (once, twice):
        store.push(sent(0, Float32()))
        store.fold(replace(fold([0]), planned=(1.0, 1.0), weights=(1.0,)))
    assert twice.push(sent(0, Float32(), attempt=1, seed=99)).attempt == 0
    for store in (once, twice):
        store.push(sent(1, Float32()))
        store.commit(replace(commit([0, 1], planned=(1.0, 1.0)), weights=(1.0, 1.0)))
    assert torch.equal(values(once), values(twice))


@dataclass(kw_only=True)
class Planning(Barrier):
    """A barrier that knows whom it waits for."""

    def planned(self, run: RunView, key: ModuleKey) -> tuple[SourceId, ...]:
        return run.sources_through(key)


def view(sources: int) -> RunView:
    run = RunView(
        seed=0,
        rounds=9,
        inner_steps=1,
        segment_steps=0,
        eval_every=0,
        save_every=0,
        paths=({"whole": KEY},),  # type: ignore[dict-item]
        shard_examples=[10 + i for i in range(sources)],
    )
    for index in range(sources):
        run.sources[SourceId(index)] = SourceView(source=SourceId(index), shard=ShardId(index))
    run.modules[KEY] = ModuleView(round=4, awaited=set(run.sources))
    run.sit_down()
    return run


@pytest.mark.parametrize("seed", range(20))
def test_each_is_folded_once_and_in_order_whatever_the_order_of_arrival(seed: int) -> None:
    """One is refused; it has no share, and nobody waits for it."""
    run, order, found = view(9), list(range(9)), []
    random.Random(seed).shuffle(order)
    refused = order[seed % 9]
    module = run.modules[KEY]
    for count, source in enumerate(order):
        module.awaited.discard(SourceId(source))
        if source != refused:
            arrival = Arrival(examples=10.0 + source, tokens=1, norm=1.0)
            module.arrivals[4, SourceId(source)] = arrival
        for command in folding.due([KEY], run, Planning()):
            for part in command.folds:
                assert part.round == 4 and part.planned == tuple(10.0 + i for i in range(9))
                assert part.weights == tuple(10.0 + i for i in part.sources)
                found += part.sources
        heard = set(order[: count + 1])
        prefix = next((i for i in range(9) if i not in heard), 9)
        assert found == [i for i in range(prefix) if i != refused]
    assert folding.due([KEY], run, Barrier()) == []
