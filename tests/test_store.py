"""ModuleStore: what it keeps, merges, hands out, measures and saves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK
from diloco.merge import Mean, MeanBy
from diloco.messages import (
    Commit,
    CommitStats,
    Contribution,
    IslandId,
    ModuleKey,
    Reason,
    Snapshot,
    SourceId,
    State,
    Tensors,
)
from diloco.outer import Nesterov, OuterOptimizer, Sgd
from diloco.store import MEASURED_SOURCES, ModuleStore

CODECS = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8(), "int4": Int4(), "topk": TopK()}
KEY, OTHER = ModuleKey("whole.0/0"), ModuleKey("whole.1/0")


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(3, generator=generator)}


def flat(values: Tensors) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([value.double().numpy().reshape(-1) for value in values.values()])


def make_store(
    outer: OuterOptimizer | None = None, codec: Codec | None = None, by: MeanBy = MeanBy.uniform
) -> ModuleStore:
    codec = codec or Float32()
    store = ModuleStore(outer=outer or Nesterov(), merge=Mean(by=by), codec=codec, codec_down=Float32())
    for index, key in enumerate((KEY, OTHER)):
        payload = Float32().encode(tensors(100 + index))
        store.fill([Snapshot(module=key, version=0, base_version=None, payload=payload)])
    return store


def contribution(
    delta: Tensors,
    *,
    source: int = 0,
    round_: int = 0,
    key: ModuleKey = KEY,
    codec: Codec | None = None,
    base_version: int = 0,
) -> Contribution:
    return Contribution(
        module=key,
        source=SourceId(source),
        island=IslandId(source),
        round=round_,
        base_version=base_version,
        payload=(codec or Float32()).encode(delta),
    )


def commit(
    *sources: int, round_: int = 0, weights: tuple[float, ...] = (), scale: float = 1.0, key: ModuleKey = KEY
) -> Commit:
    return Commit(
        module=key,
        round=round_,
        sources=tuple(map(SourceId, sources)),
        weights=weights or (1.0,) * len(sources),
        scale=scale,
    )


def values(store: ModuleStore, key: ModuleKey = KEY) -> Tensors:
    (snapshot,) = store.pull({key: None})
    return Float32().decode(snapshot.payload)


# --- commits ---


def test_a_commit_moves_the_weights_against_the_mean() -> None:
    store = make_store(Sgd(lr=1.0))
    for source in (0, 1):
        assert store.push(contribution(tensors(source), source=source)).good
    assert store.commit(commit(0, 1)) == 1
    expected = flat(tensors(100)) - (flat(tensors(0)) + flat(tensors(1))) / 2
    np.testing.assert_allclose(flat(values(store)), expected, rtol=1e-6, atol=1e-6)


def test_outer_state_is_not_empty_after_the_first_commit() -> None:
    """The optimizer works on the tensors that are handed out."""
    store = make_store(Nesterov(lr=0.7, momentum=0.9))
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    state = store.state()[KEY].tensors
    np.testing.assert_allclose(state["outer/momentum/w"].numpy(), tensors(0)["w"].numpy())
    expected = flat(tensors(100)) - 0.7 * 1.9 * flat(tensors(0))
    np.testing.assert_allclose(flat(values(store)), expected, rtol=1e-5, atol=1e-6)


def test_only_the_named_sources_count_with_their_weights_and_the_scale() -> None:
    store = make_store(Sgd(lr=1.0), by=MeanBy.examples)
    for source in range(3):
        store.push(contribution(tensors(source), source=source))
    store.commit(commit(0, 2, weights=(30.0, 10.0), scale=2.0))
    expected = flat(tensors(100)) - 2 * (0.75 * flat(tensors(0)) + 0.25 * flat(tensors(2)))
    np.testing.assert_allclose(flat(values(store)), expected, rtol=1e-5, atol=1e-5)


def test_another_module_is_left_alone() -> None:
    store = make_store()
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    assert store.pull({KEY: None, OTHER: None})[1].version == 0
    assert np.array_equal(flat(values(store, OTHER)), flat(tensors(101)))


def test_what_was_not_used_is_dropped_with_its_round() -> None:
    store = make_store()
    for source in range(3):
        store.push(contribution(tensors(source), source=source))
    store.push(contribution(tensors(9), source=0, round_=1))
    store.commit(commit(0, 1))
    left = store.state()[KEY].meta["inbox"]
    assert [(entry["source"], entry["round"]) for entry in left] == [(0, 1)]


def test_master_values_and_outer_state_are_float32_whatever_the_wire() -> None:
    store = make_store(codec=BFloat16())
    store.push(contribution(tensors(0), codec=BFloat16()))
    store.commit(commit(0))
    assert {value.dtype for value in store.state()[KEY].tensors.values()} == {torch.float32}


# --- pushes ---


def test_a_verdict_says_the_norm() -> None:
    verdict = make_store().push(contribution(tensors(0), source=3, round_=2))
    assert (verdict.module, verdict.source, verdict.round) == (KEY, 3, 2)
    assert verdict.good
    assert verdict.norm == pytest.approx(float(np.linalg.norm(flat(tensors(0)))), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_one_element_that_is_not_finite_is_seen(codec: Codec, bad: float) -> None:
    store = make_store(codec=codec)
    delta = tensors(0)
    delta["b"][1] = bad
    verdict = store.push(contribution(delta, codec=codec))
    assert (verdict.finite, verdict.shape_ok, verdict.good) == (False, True, False)
    assert store.state()[KEY].meta["inbox"] == []


def test_large_finite_values_are_finite() -> None:
    """The square of 1e30 is beyond float32, the value is not."""
    verdict = make_store().push(contribution({"w": torch.full((4, 3), 1e30), "b": torch.zeros(3)}))
    assert verdict.finite
    assert verdict.norm == pytest.approx(1e30 * math.sqrt(12))


@pytest.mark.parametrize(
    "delta",
    [
        {"w": torch.ones(4, 3)},
        {"w": torch.ones(4, 3), "b": torch.ones(3), "c": torch.ones(1)},
        {"w": torch.ones(3, 4), "b": torch.ones(3)},
        {"w": torch.ones(12), "b": torch.ones(3)},
        {},
    ],
    ids=["too few", "too many", "transposed", "flat", "none"],
)
def test_wrong_names_or_shapes_are_seen(delta: Tensors) -> None:
    verdict = make_store().push(contribution(delta))
    assert not verdict.shape_ok
    assert not verdict.good


@pytest.mark.parametrize(("base_version", "good"), [(-1, False), (0, True), (1, True), (2, False), (10**9, False)])
def test_a_version_that_the_module_never_had_is_refused(base_version: int, good: bool) -> None:
    store = make_store()
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    verdict = store.push(contribution(tensors(1), round_=1, base_version=base_version))
    assert (verdict.version_ok, verdict.good, verdict.reason) == (good, good, None if good else Reason.version)
    assert (verdict.finite, verdict.shape_ok) == (True, True)
    assert len(store.state()[KEY].meta["inbox"]) == good


def test_of_several_things_that_are_wrong_one_is_named() -> None:
    nan = {name: value * math.nan for name, value in tensors(0).items()}
    store = make_store()
    assert store.push(contribution({}, base_version=5)).reason is Reason.shape
    assert store.push(contribution(nan, source=1, base_version=5)).reason is Reason.version
    assert store.push(contribution(nan, source=2)).reason is Reason.not_finite


@pytest.mark.parametrize("kind", ["truncated", "too long", "header of another", "another codec", "no header"])
def test_what_cannot_be_decoded_is_refused_like_a_wrong_shape(kind: str) -> None:
    """A broken sender must not end the store, and with it the run."""
    sent = contribution(tensors(0))
    payload = sent.payload
    broken = {
        "truncated": replace(payload, body=payload.body[:-4]),
        "too long": replace(payload, body=np.concatenate([payload.body, payload.body[:8]])),
        "header of another": replace(payload, header=Float32().encode({"w": torch.ones(2)}).header),
        "another codec": BFloat16().encode(tensors(0)),
        "no header": replace(payload, header=b""),
    }[kind]
    store = make_store()
    verdict = store.push(replace(sent, payload=broken))
    assert not verdict.good
    assert not verdict.shape_ok
    assert store.state()[KEY].meta["inbox"] == []


def test_a_second_push_gets_the_first_verdict_and_changes_nothing() -> None:
    store = make_store(Sgd(lr=1.0))
    first = store.push(contribution(tensors(0)))
    bad = {name: value * math.nan for name, value in tensors(0).items()}
    assert store.push(contribution(bad)) == first
    store.commit(commit(0))
    np.testing.assert_allclose(flat(values(store)), flat(tensors(100)) - flat(tensors(0)), rtol=1e-6, atol=1e-6)


def test_a_rejected_one_is_not_replaced_by_a_second_push() -> None:
    store = make_store()
    bad = {name: value * math.nan for name, value in tensors(0).items()}
    assert not store.push(contribution(bad)).good
    assert not store.push(contribution(tensors(0))).good


@pytest.mark.parametrize("first_is_good", [True, False])
def test_a_later_attempt_takes_the_place_of_the_earlier_one(first_is_good: bool) -> None:
    """The island died and its round was trained again: what it had sent before does not count."""
    store = make_store(Sgd(lr=1.0))
    earlier = contribution({n: t if first_is_good else t * math.nan for n, t in tensors(0).items()})
    later = replace(contribution(tensors(1)), attempt=1)
    store.push(earlier)
    verdict = store.push(later)
    assert verdict.good
    assert store.push(earlier) == verdict  # however late that comes
    store.commit(commit(0))
    np.testing.assert_allclose(flat(values(store)), flat(tensors(100)) - flat(tensors(1)), rtol=1e-6, atol=1e-6)


def test_a_later_attempt_that_is_bad_leaves_nothing_of_the_earlier_one() -> None:
    store = make_store()
    store.push(contribution(tensors(0)))
    bad = contribution({name: value * math.nan for name, value in tensors(0).items()})
    assert not store.push(replace(bad, attempt=1)).good
    assert store.state()[KEY].meta["inbox"] == []


# --- snapshots ---


def test_a_snapshot_is_encoded_once_for_each_version() -> None:
    store = make_store()
    (first,) = store.pull({KEY: None})
    (second,) = store.pull({KEY: None})
    assert first is second
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    (third,) = store.pull({KEY: None})
    assert (first.version, third.version) == (0, 1)
    assert np.array_equal(flat(Float32().decode(first.payload)), flat(tensors(100)))  # not written over by the step


@pytest.mark.parametrize("measured", [False, True])
def test_a_snapshot_that_was_given_out_never_changes(measured: bool) -> None:
    """Nor does it matter whether the copy for the next step was made ahead."""
    store, bodies, kept = make_store(), [], []
    for round_ in range(4):
        kept += store.pull({KEY: None})
        bodies.append(kept[-1].payload.body.copy())
        store.push(contribution(tensors(round_), round_=round_))
        store.commit(commit(0, round_=round_))
        if measured:
            store.measure()
    assert [snapshot.version for snapshot in kept] == [0, 1, 2, 3]
    assert [snapshot.payload.body.tobytes() for snapshot in kept] == [body.tobytes() for body in bodies]
    plain, momentum = Float32().decode(kept[0].payload), {n: torch.zeros_like(t) for n, t in tensors(0).items()}
    for round_ in range(3):
        Nesterov().step(plain, tensors(round_), {f"momentum/{n}": value for n, value in momentum.items()})
    assert Float32().encode(plain).body.tobytes() == bodies[3].tobytes()


def test_who_has_the_newest_version_gets_nothing() -> None:
    store = make_store()
    assert store.pull({KEY: 0}) == []
    assert [s.module for s in store.pull({KEY: 0, OTHER: None})] == [OTHER]
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    assert [s.version for s in store.pull({KEY: 0})] == [1]


# --- statistics ---


def test_the_statistics_equal_numpy() -> None:
    store = make_store(Nesterov(), codec=BFloat16())
    before = flat(values(store))
    deltas = {source: BFloat16().decode(BFloat16().encode(tensors(source))) for source in (0, 2, 5)}
    for source in deltas:
        store.push(contribution(tensors(source), source=source, codec=BFloat16()))
    store.commit(commit(0, 2, 5))
    (stats,) = store.measure()
    assert (stats.module, stats.round, stats.version, stats.sources) == (KEY, 0, 1, (0, 2, 5))
    stacked = np.stack([flat(delta) for delta in deltas.values()])
    np.testing.assert_allclose(np.array(stats.gram), stacked @ stacked.T, rtol=1e-5)
    assert stats.update_square == pytest.approx(float(((flat(values(store)) - before) ** 2).sum()), rel=1e-5)
    assert store.measure() == []  # told once


def test_many_sources_are_measured_in_part() -> None:
    store = make_store()
    sources = range(MEASURED_SOURCES + 3)
    for source in sources:
        store.push(contribution(tensors(source), source=source))
    store.commit(commit(*sources))
    (stats,) = store.measure()
    assert stats.sources == tuple(sources)
    assert len(stats.gram) == MEASURED_SOURCES


def test_the_update_is_known_also_where_nobody_pulled_before() -> None:
    """As after a resume within a round: the islands have their weights already."""
    store = make_store(Sgd(lr=1.0))
    store.push(contribution(tensors(0)))
    store.commit(commit(0))
    (stats,) = store.measure()
    assert stats.update_square == pytest.approx(float((flat(tensors(0)) ** 2).sum()), rel=1e-5)


# --- checkpoints ---


def assert_equal_states(left: dict[ModuleKey, State], right: dict[ModuleKey, State]) -> None:
    assert list(left) == list(right)
    for key in left:
        assert left[key].meta == right[key].meta
        assert list(left[key].tensors) == list(right[key].tensors)
        for name, value in left[key].tensors.items():
            other = right[key].tensors[name]
            assert value.dtype == other.dtype
            assert value.numpy().tobytes() == other.numpy().tobytes()


def used_store(codec: Codec) -> ModuleStore:
    """One with a step behind it, an inbox of two rounds and a refused contribution."""
    store = make_store(codec=codec)
    for source in (0, 1):
        store.push(contribution(tensors(source), source=source, codec=codec))
    store.commit(commit(0, 1))
    for source in (1, 0):
        store.push(contribution(tensors(10 + source), source=source, round_=1, codec=codec))
    store.push(contribution({"w": torch.ones(1)}, source=2, round_=1, codec=codec))
    store.push(contribution(tensors(20), source=3, round_=1, codec=codec, base_version=9))
    store.push(contribution(tensors(30), source=1, round_=2, codec=codec))
    return store


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_loaded_store_holds_the_same_inbox_included(codec: Codec) -> None:
    store = used_store(codec)
    loaded = ModuleStore(outer=Nesterov(), merge=Mean(), codec=codec, codec_down=Float32())
    loaded.load_state(store.state())
    assert_equal_states(loaded.state(), store.state())
    assert loaded.outer_digests() == store.outer_digests()
    assert [(e["source"], e["round"]) for e in loaded.state()[KEY].meta["inbox"]] == [(1, 1), (0, 1), (1, 2)]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_loaded_store_goes_on_to_the_same_bits(codec: Codec) -> None:
    store = used_store(codec)
    loaded = ModuleStore(outer=Nesterov(), merge=Mean(), codec=codec, codec_down=Float32())
    loaded.load_state(store.state())
    statistics: list[list[CommitStats]] = []
    for each in (store, loaded):
        each.measure()
        assert each.push(contribution(tensors(77), source=0, round_=1, codec=codec)).good  # known already
        assert each.commit(commit(0, 1, round_=1)) == 2
        each.push(contribution(tensors(40), source=0, round_=2, codec=codec))
        assert each.commit(commit(0, 1, round_=2)) == 3
        statistics.append(each.measure())
    assert_equal_states(loaded.state(), store.state())
    assert [s.gram for s in statistics[0]] == [s.gram for s in statistics[1]]


def test_a_saved_state_does_not_change_with_the_store() -> None:
    """It is written while the store goes on."""
    store = used_store(Float32())
    state = store.state()
    kept = {name: value.clone() for name, value in state[KEY].tensors.items()}
    store.commit(commit(0, 1, round_=1))
    for name, value in kept.items():
        assert torch.equal(state[KEY].tensors[name], value)


def test_digests_of_the_outer_state_name_parameters() -> None:
    import hashlib

    store = make_store()
    store.push(contribution(tensors(0)))
    before = store.outer_digests()
    store.commit(commit(0))
    digests = store.outer_digests()
    assert set(digests) == {f"{key}:momentum/{name}" for key in (KEY, OTHER) for name in ("w", "b")}
    changed = {name for name in digests if digests[name] != before[name]}
    assert changed == {f"{KEY}:momentum/w", f"{KEY}:momentum/b"}
    expected = hashlib.sha256(tensors(0)["w"].numpy().tobytes()).hexdigest()
    assert digests[f"{KEY}:momentum/w"] == expected
