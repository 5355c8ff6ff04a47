"""Updates sent down: the store, those who follow it and those who join have the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diloco.anchors import Anchors
from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK
from diloco.layout import Whole
from diloco.merge import Mean
from diloco.messages import Commit, Contribution, IslandId, ModuleKey, Modules, Snapshot, SourceId, Tensors
from diloco.outer import Nesterov
from diloco.replica import Single
from diloco.store import ModuleStore

CODECS = {
    "bfloat16": BFloat16(),
    "int8": Int8(),
    "int4": Int4(),
    "int4 with feedback": Int4(error_feedback=True),
    "topk": TopK(density=0.1),
}
KEY = ModuleKey("whole.0/0")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(13, 17), nn.Linear(17, 3)


def make(codec_down: Codec) -> tuple[ModuleStore, Modules, Tensors]:
    """A store that holds one module, what it starts with, and the layout."""
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in Model().named_parameters()}
    modules = Whole().build({name: tuple(value.shape) for name, value in start.items()}, 1)
    store = ModuleStore(outer=Nesterov(), merge=Mean(), codec=Float32(), codec_down=codec_down)
    store.fill([Snapshot(module=KEY, version=0, base_version=None, payload=Float32().encode(start))])
    return store, modules, start


def step(store: ModuleStore, start: Tensors, round_: int) -> None:
    """One outer step with a random contribution."""
    generator = torch.Generator().manual_seed(round_)
    delta = {name: torch.randn(value.shape, generator=generator) * 0.01 for name, value in start.items()}
    store.push(
        Contribution(
            module=KEY,
            source=SourceId(0),
            island=IslandId(0),
            round=round_,
            base_version=round_,
            payload=Float32().encode(delta),
        )
    )
    store.commit(Commit(module=KEY, round=round_, sources=(SourceId(0),), weights=(1.0,)))


def full(store: ModuleStore) -> Tensors:
    (snapshot,) = store.pull({KEY: None})
    assert snapshot.base_version is None
    return Float32().decode(snapshot.payload)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", CODECS)
def test_after_a_hundred_rounds_all_have_the_same_bits(name: str) -> None:
    store, modules, start = make(CODECS[name])
    model = Model()
    follower = Anchors(Single(model), CODECS[name])
    versions = {slot: 0 for slot in modules.slots}
    follower.install(modules, store.pull({KEY: None}), versions, 0.0)
    for round_ in range(100):
        step(store, start, round_)
        (update,) = store.pull({KEY: round_})
        assert (update.base_version, update.version) == (round_, round_ + 1)
        versions = {slot: round_ + 1 for slot in versions}
        follower.install(modules, [update], versions, 0.0)
        assert same(follower.values, full(store)), f"after round {round_}"
    assert not same(follower.values, start)
    assert same({n: p.detach() for n, p in model.named_parameters()}, follower.values)
    joiner = Anchors(Single(Model()), CODECS[name])
    joiner.install(modules, store.pull({KEY: None}), versions, 0.0)
    assert same(joiner.values, follower.values)


def test_only_who_has_exactly_the_version_before_gets_an_update() -> None:
    store, _, start = make(Int4())
    for round_ in range(3):
        step(store, start, round_)
    kinds = {have: [s.base_version for s in store.pull({KEY: have})] for have in (None, 0, 1, 2, 3)}
    assert kinds == {None: [None], 0: [None], 1: [None], 2: [2], 3: []}
    (update,), (values,) = store.pull({KEY: 2}), store.pull({KEY: None})
    assert update.payload.nbytes < values.payload.nbytes


def test_float32_sends_full_values_down() -> None:
    store, _, start = make(Float32())
    step(store, start, 0)
    assert [s.base_version for s in store.pull({KEY: 0})] == [None]


@pytest.mark.parametrize("name", CODECS)
def test_the_store_saved_and_loaded_goes_on_to_the_same_bits(name: str) -> None:
    """What `codec_down` lost so far is part of its state."""
    store, _, start = make(CODECS[name])
    for round_ in range(5):
        step(store, start, round_)
    loaded = ModuleStore(outer=Nesterov(), merge=Mean(), codec=Float32(), codec_down=CODECS[name])
    loaded.load_state(store.state())
    for each in (store, loaded):
        for round_ in range(5, 8):
            step(each, start, round_)
    assert same(full(store), full(loaded))


def test_what_rounding_lost_downwards_comes_later() -> None:
    """With feedback the sum of what was sent down stays within one update's error of the exact path."""
    exact, _, start = make(Float32())
    errors = {}
    for name, codec in (("without", Int4()), ("with", Int4(error_feedback=True))):
        store, _, _ = make(codec)
        exact, _, _ = make(Float32())
        for round_ in range(60):
            step(store, start, round_)
            step(exact, start, round_)
        errors[name] = sum(float((value - full(exact)[n]).square().sum()) for n, value in full(store).items())
    assert errors["with"] < 0.5 * errors["without"]


def test_an_update_on_another_version_is_not_installed() -> None:
    store, modules, start = make(Int8())
    follower = Anchors(Single(Model()), Int8())
    follower.install(modules, store.pull({KEY: None}), {slot: 0 for slot in modules.slots}, 0.0)
    for round_ in range(2):
        step(store, start, round_)
    with pytest.raises(AssertionError, match="an update on another version"):
        follower.install(modules, store.pull({KEY: 1}), {slot: 2 for slot in modules.slots}, 0.0)
