"""Store and coordinator together: neither the order of arrival nor a repetition changes a bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK
from diloco.events import CommitAll, Push, Received, Run
from diloco.merge import Mean, MeanBy
from diloco.messages import Contribution, ModuleKey, Shape, SlotName, Snapshot, SourceId, Task, Tensors, Turn, Verdict
from diloco.outer import Nesterov
from diloco.store import ModuleStore
from tests.toy import FakeRuntime, make_view

SHAPES: dict[str, dict[str, Shape]] = {
    "whole.0": {"a": (7,), "b": (2, 3)},
    "whole.1": {"c": (4, 4), "d": ()},
}
CODECS = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8(), "int4": Int4(), "topk": TopK()}
ISLANDS, ROUNDS = 4, 3


def random_tensors(slot: str, *seed: int) -> Tensors:
    """Of mixed sizes, so that the order of additions shows in the last bits."""
    generator = torch.Generator().manual_seed(hash((slot == "whole.1", *seed)) % 2**31)
    return {n: torch.randn(s, generator=generator) * 10.0 ** (seed[-1] % 5 - 2) for n, s in SHAPES[slot].items()}


class WithStores(FakeRuntime):
    """Islands whose contributions are random numbers, and two shards of a real store."""

    def __init__(self, *, codec: Codec | None = None, seed: int = 0) -> None:
        super().__init__(make_view(islands=ISLANDS, rounds=ROUNDS, segment_steps=0), seed=seed)
        self.codec = codec or Float32()
        self.replaced: dict[tuple[str, int, int], Tensors] = {}  # (slot, source, round) -> what is sent instead
        self.repeat = 1
        self.stores: dict[ModuleKey, ModuleStore] = {}
        for slot in SHAPES:
            merge = Mean(by=MeanBy.examples)
            store = ModuleStore(outer=Nesterov(), merge=merge, codec=self.codec, codec_down=Float32())
            payload = Float32().encode(random_tensors(slot, 99))
            key = ModuleKey(f"{slot}/0")
            store.fill([Snapshot(module=key, version=0, base_version=None, payload=payload)])
            self.stores[key] = store

    def contribution(self, task: Task, slot: SlotName) -> Contribution:
        sent = (str(slot), int(task.source), task.round)
        delta = self.replaced.get(sent, random_tensors(slot, task.round, task.source))
        return Contribution(
            module=task.modules[slot],
            source=task.source,
            island=task.island,
            round=task.round,
            base_version=task.round,
            payload=self.codec.encode(delta),
        )

    def verdicts(self, task: Task) -> tuple[Verdict, ...]:
        found: tuple[Verdict, ...] = ()
        for _ in range(self.repeat):
            sent = [self.contribution(task, slot) for slot in task.send]
            found = tuple(self.stores[c.module].push(c) for c in sent)
        return found

    def commit(self, command: CommitAll) -> None:
        for commit in command.commits:
            assert self.stores[commit.module].commit(commit) == self.view.modules[commit.module].version

    def run(self) -> WithStores:
        self.start()
        self.go()
        assert self.stop is not None
        assert self.stop.status == "finished"
        return self

    def bits(self) -> dict[str, bytes]:
        """All values and outer state."""
        return {
            f"{key}:{name}": value.numpy().tobytes()
            for key, store in self.stores.items()
            for name, value in store.state()[key].tensors.items()
            if not name.startswith("inbox/")
        }


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_order_of_arrival_does_not_change_a_bit(codec: Codec, seed: int) -> None:
    expected = WithStores(codec=codec).run()
    found = WithStores(codec=codec, seed=seed).run()
    assert found.bits() == expected.bits()
    assert found.commits() == expected.commits()


def test_the_orders_tried_do_differ() -> None:
    """Else the test above would show nothing."""
    orders = set()
    for seed in range(5):
        runtime = WithStores(seed=seed)
        arrivals: list[int] = []
        verdicts = runtime.verdicts

        def noted(task: Task, verdicts=verdicts, arrivals=arrivals) -> tuple[Verdict, ...]:  # type: ignore[no-untyped-def]
            arrivals.append(int(task.source))
            return verdicts(task)  # type: ignore[no-any-return]

        runtime.verdicts = noted  # type: ignore[method-assign]
        runtime.run()
        orders.add(tuple(arrivals))
    assert len(orders) > 1


def test_another_order_of_adding_would_show() -> None:
    """The numbers are such that merging in order of arrival would give other bits."""
    deltas = [random_tensors("whole.0", 0, source) for source in range(ISLANDS)]
    copies = [{name: value.clone() for name, value in delta.items()} for delta in reversed(deltas)]
    first, second = Mean().combine(deltas, [1.0] * 4), Mean().combine(copies, [1.0] * 4)
    assert not torch.equal(first["a"], second["a"])


def test_the_result_is_that_of_a_plain_loop() -> None:
    """Against torch's SGD on the weighted mean in float64."""
    runtime = WithStores().run()
    weights = np.array([10.0, 20.0, 30.0, 40.0])
    for slot in SHAPES:
        start = random_tensors(slot, 99)
        params = {name: value.double().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.SGD(list(params.values()), lr=0.7, momentum=0.9, nesterov=True)
        for round_ in range(ROUNDS):
            deltas = [random_tensors(slot, round_, source) for source in range(ISLANDS)]
            for name, p in params.items():
                stacked = np.stack([delta[name].double().numpy() for delta in deltas])
                p.grad = torch.from_numpy(np.asarray(np.average(stacked, axis=0, weights=weights)))
            optimizer.step()
        found = runtime.stores[ModuleKey(f"{slot}/0")].state()[ModuleKey(f"{slot}/0")].tensors
        for name, p in params.items():
            torch.testing.assert_close(found[f"values/{name}"].double(), p.detach(), rtol=2e-6, atol=2e-4)


@pytest.mark.parametrize("repeat", [2, 3])
def test_a_second_push_of_the_same_contribution_does_not_count(repeat: int) -> None:
    expected = WithStores().run()
    runtime = WithStores()
    runtime.repeat = repeat
    assert runtime.run().bits() == expected.bits()


def test_a_second_push_with_other_content_does_not_count_either() -> None:
    """Who was cut off in the middle may send again; what was judged is what counts."""
    expected = WithStores().run()
    runtime = WithStores()
    runtime.start()
    pushed: list[Task] = []
    while runtime.stop is None:
        command = runtime.ready()[0]
        runtime.answer(command)
        if isinstance(command, Push) and command.task not in pushed:
            pushed.append(command.task)
            for slot in command.task.send:
                again = runtime.contribution(command.task, slot)
                other = replace(again, payload=Float32().encode({n: t * 0 for n, t in random_tensors(slot, 0).items()}))
                runtime.stores[again.module].push(other)
    assert runtime.bits() == expected.bits()


BAD = {
    "nan": lambda t: {**t, "c": torch.full((4, 4), math.nan)},
    "one_infinite": lambda t: {**t, "d": torch.tensor(math.inf)},
    "minus_infinite": lambda t: {**t, "d": torch.tensor(-math.inf)},
    "misshapen": lambda t: {**t, "c": t["c"].reshape(16)},
    "a_name_too_few": lambda t: {"c": t["c"]},
    "a_name_too_many": lambda t: {**t, "e": torch.ones(1)},
    "another_name": lambda t: {"c": t["c"], "x": t["d"]},
    "nothing": lambda t: {},
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_shard_rejects_all_of_a_contribution(kind: str) -> None:
    """Source 2 sends something bad to the second shard in round 1; neither shard merges anything of it."""
    runtime = WithStores()
    runtime.replaced["whole.1", 2, 1] = BAD[kind](random_tensors("whole.1", 1, 2))
    runtime.run()
    assert [c.sources for c in runtime.commits() if c.round == 1] == [(0, 1, 3), (0, 1, 3)]
    assert [c.sources for c in runtime.commits() if c.round != 1] == [(0, 1, 2, 3)] * 4
    counters = runtime.view.counters
    assert (counters.rejected, counters.accepted, counters.late) == (1, 11, 0)
    (warning,) = runtime.logged("warning")
    assert "source 2" in warning["message"]
    assert "whole.1/0" in warning["message"]
    # the good half would have changed the first shard: there, too, it is as if it had never been sent
    without = WithStores()
    without.replaced["whole.0", 2, 1] = {"bad": torch.ones(1)}
    without.run()
    assert runtime.bits() == without.bits()


def test_what_a_lost_island_had_sent_is_counted_and_not_merged() -> None:
    """Source 3 dies after it sent; its contribution to round 0 reaches the store before and after the commit."""
    expected = WithStores()
    expected.replaced["whole.0", 3, 0] = {"bad": torch.ones(1)}
    expected.run()
    for late_by in ("before the commit", "after the commit"):
        runtime = WithStores()
        runtime.start()
        own = next(c for c in runtime.asked if isinstance(c, Run) and c.task.island == 3)
        runtime.answer(own)
        (push,) = [c for c in runtime.asked if isinstance(c, Push)]
        runtime.lose(3)
        if late_by == "before the commit":
            runtime.answer(push)
        runtime.answer(next(c for c in runtime.asked if not isinstance(c, Run | Push)))  # it comes back
        while runtime.view.round == 0:
            runtime.answer(next(c for c in runtime.ready() if c is not push))
        if late_by == "after the commit":
            runtime.answer(push)
        assert [c.sources for c in runtime.commits() if c.round == 0] == [(0, 1, 2)] * 2
        assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
        runtime.go()
        assert runtime.stop is not None
        assert [c.sources for c in runtime.commits() if c.round > 0] == [(0, 1, 2, 3)] * 4
        assert runtime.bits() == expected.bits()


def test_an_unknown_source_is_not_heard() -> None:
    runtime = WithStores()
    runtime.start()
    verdict = Verdict(module=ModuleKey("whole.0/0"), source=SourceId(77), round=0, finite=True, shape_ok=True, norm=1.0)
    runtime.tell(Received(now_s=1.0, turn=Turn(source=SourceId(77), round=0, fragment=0), verdicts=(verdict,)))
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    assert runtime.commits() == []
