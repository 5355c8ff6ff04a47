"""Island: install, train, contribute; and what of a source survives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diloco.checkpoint import read_source, write_source
from diloco.codec import BFloat16, Codec, Float32
from diloco.data import Data
from diloco.inner import AdamW, Inner, Muon, RateSchedule, Sgd
from diloco.island import Island
from diloco.layout import Whole
from diloco.messages import (
    Contribution,
    IslandId,
    ModuleKey,
    Settled,
    ShardId,
    Snapshot,
    SourceId,
    State,
    Task,
    Tensors,
)
from diloco.replica import Single
from diloco.workload import Batch, Workload
from tests.toy import Constant, Line, Perceptron, Remembering, WithBatchNorm

TOTAL_STEPS = 40


def make_island(
    workload: Workload | None = None, inner: Inner | None = None, *, codec: Codec | None = None, accumulation: int = 1
) -> Island:
    workload = workload or Line()
    island = Island(
        workload=workload,
        corpus=workload.corpus(Data(), seed=0, shards=2),
        inner=inner or AdamW(lr=0.01),
        codec=codec or Float32(),
        codec_down=Float32(),
        replica=Single(workload.build_model(5)),
        accumulation=accumulation,
        seed=5,
        total_steps=TOTAL_STEPS,
    )
    island.setup(Whole().build(island.shapes(), 2))
    return island


def path_of(island: Island) -> dict[str, ModuleKey]:
    return dict(Whole().build(island.shapes(), 2).paths[0])


def task(
    island: Island,
    *,
    steps: int,
    first_step: int = 0,
    install: bool = False,
    send: bool = False,
    only: tuple[str, ...] = (),
    **more: object,
) -> Task:
    path = path_of(island)
    given: dict[str, object] = {
        "source": SourceId(0),
        "island": IslandId(0),
        "round": 0,
        "segment": 0,
        "modules": path,
        "install": {slot: 3 for slot in path} if install else {},
        "keep": 0.0,
        "shard": ShardId(0),
        "first_step": first_step,
        "steps": steps,
        "send": tuple(path) if send else only,
        "last": send,
    }
    return Task(**{**given, **more})  # type: ignore[arg-type]


def snapshots(island: Island, *, seed: int = 0, version: int = 3) -> list[Snapshot]:
    """Random global values."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    modules = Whole().build(island.shapes(), 2)
    for slot, key in modules.paths[0].items():
        values = {n: torch.randn(island.shapes()[n], generator=generator) for n in modules.slots[slot]}
        payload = Float32().encode(values)
        found.append(Snapshot(module=key, version=version, base_version=None, payload=payload))
    return found


def values_of(items: list[Snapshot]) -> Tensors:
    return {name: value for item in items for name, value in Float32().decode(item.payload).items()}


def delta_of(contributions: list[Contribution], codec: Codec | None = None) -> Tensors:
    return {name: value for c in contributions for name, value in (codec or Float32()).decode(c.payload).items()}


def part(state: State, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


# --- install and contribute ---


@pytest.mark.parametrize("codec", [Float32(), BFloat16()], ids=["float32", "bfloat16"])
def test_no_steps_give_a_contribution_of_exactly_zero(codec: Codec) -> None:
    island = make_island(codec=codec)
    island.run(task(island, steps=3, install=True), snapshots(island))
    _, sent = island.run(task(island, steps=0, first_step=3, install=True, send=True), snapshots(island, seed=1))
    delta = delta_of(sent, codec)
    assert set(delta) == set(island.shapes())
    for value in delta.values():
        assert value.count_nonzero() == 0


def test_the_contribution_is_what_was_installed_minus_what_there_is() -> None:
    island = make_island()
    installed = snapshots(island)
    report, sent = island.run(task(island, steps=4, install=True, send=True), installed)
    local = part(island.export(SourceId(0)), "local/")
    for name, value in delta_of(sent).items():
        assert torch.equal(value, values_of(installed)[name] - local[name])
        assert value.count_nonzero() > 0
    assert [c.module for c in sent] == list(path_of(island).values())
    assert {(c.source, c.island, c.round, c.base_version) for c in sent} == {(0, 0, 0, 3)}
    assert report.bytes_up == sum(c.payload.nbytes for c in sent)
    assert report.bytes_down == sum(s.payload.nbytes for s in installed)


def test_the_anchor_is_what_was_installed() -> None:
    island = make_island()
    installed = snapshots(island)
    island.run(task(island, steps=4, install=True), installed)
    assert bits(part(island.export(SourceId(0)), "anchor/")) == bits(values_of(installed))


def test_a_later_segment_keeps_the_anchor() -> None:
    island = make_island()
    installed = snapshots(island)
    island.run(task(island, steps=2, install=True), installed)
    _, sent = island.run(task(island, steps=2, first_step=2, send=True), [])
    local = part(island.export(SourceId(0)), "local/")
    for name, value in delta_of(sent).items():
        assert torch.equal(value, values_of(installed)[name] - local[name])


def test_keep_leaves_the_local_weights_and_takes_the_new_anchor() -> None:
    island = make_island()
    island.run(task(island, steps=3, install=True), snapshots(island))
    before = part(island.export(SourceId(0)), "local/")
    newer = snapshots(island, seed=1, version=4)
    asked = task(island, steps=0, first_step=3, install=True, keep=1.0, send=True)
    _, sent = island.run(replace(asked, install=dict.fromkeys(asked.install, 4)), newer)
    after = island.export(SourceId(0))
    assert bits(part(after, "local/")) == bits(before)
    assert bits(part(after, "anchor/")) == bits(values_of(newer))
    for name, value in delta_of(sent).items():
        assert torch.equal(value, values_of(newer)[name] - before[name])
    assert {c.base_version for c in sent} == {4}


def test_only_the_slots_asked_for_are_sent() -> None:
    island = make_island()
    slot = next(iter(path_of(island)))
    _, sent = island.run(task(island, steps=1, install=True, only=(slot,)), snapshots(island))
    assert [c.module for c in sent] == [f"{slot}/0"]


def test_the_digest_of_the_weights_is_over_the_values_in_order_of_name() -> None:
    island = make_island()
    installed = snapshots(island)
    island.install(installed)
    digest = hashlib.sha256()
    for _, value in sorted(values_of(installed).items()):
        digest.update(value.numpy().astype("<f4").tobytes())
    assert island.weights_sha256() == digest.hexdigest()


def test_what_fills_the_store_is_the_model_that_the_seed_gives() -> None:
    island = make_island()
    modules = Whole().build(island.shapes(), 2)
    found = values_of(island.initial(list(modules.shards)))
    expected = dict(Line().build_model(5).named_parameters())
    assert bits(found) == bits({name: expected[name].detach() for name in found})
    assert set(found) == set(expected)


def test_given_values_fill_the_store_instead() -> None:
    island = make_island()
    modules = Whole().build(island.shapes(), 2)
    given = values_of(snapshots(island, seed=9)) | {"more": torch.ones(2)}
    keys = list(modules.shards)
    found = values_of(island.initial(keys, dict.fromkeys(keys, given)))
    assert bits(found) == bits({n: given[n] for n in island.shapes()})
    short = {name: value for name, value in given.items() if name != "first.bias"}
    with pytest.raises(ValueError, match=r"first\.bias"):
        island.initial(keys, dict.fromkeys(keys, short))
    with pytest.raises(ValueError, match=r"first\.weight.*\(4, 4\)"):
        island.initial(keys, dict.fromkeys(keys, given | {"first.weight": torch.ones(4, 5)}))


def test_tied_weights_are_stored_and_sent_once() -> None:
    island = make_island()
    _, sent = island.run(task(island, steps=1, install=True, send=True), snapshots(island))
    assert "first.weight" in delta_of(sent)
    assert "last.weight" not in delta_of(sent)
    elements = sum(c.payload.body.nbytes for c in sent) // 4
    assert elements == 4 * 4 + 4 + 4 + 4 + 4


@dataclass(kw_only=True)
class PartlyFrozen(Line):
    def build_model(self, seed: int) -> nn.Module:
        model = super().build_model(seed)
        assert isinstance(model, Perceptron)
        model.norm.weight.requires_grad_(False)
        return model


def test_frozen_parameters_are_no_part_of_a_slot_and_do_not_move() -> None:
    island = make_island(PartlyFrozen())
    assert "norm.weight" not in island.shapes()
    _, sent = island.run(task(island, steps=2, install=True, send=True), snapshots(island))
    assert "norm.weight" not in delta_of(sent)
    assert island._replica.model.get_parameter("norm.weight").unique().tolist() == [1.0]


def test_a_model_with_batch_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="batch statistics"):
        make_island(WithBatchNorm())


# --- training ---


def reference(inner: list[torch.optim.Optimizer], model: nn.Module, workload: Line, steps: range) -> list[float]:
    """A plain loop."""
    losses = []
    corpus = workload.corpus(Data(), seed=0, shards=2)
    for step in steps:
        loss, _ = workload.loss(model, workload.batch(corpus, ShardId(0), step))
        for optimizer in inner:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in inner:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_inner_steps_are_those_of_a_plain_loop() -> None:
    island = make_island(inner=Sgd(lr=0.05))
    installed = snapshots(island)
    report, _ = island.run(task(island, steps=5, install=True), installed)
    model = Line().build_model(5)
    model.load_state_dict(values_of(installed) | {"last.weight": values_of(installed)["first.weight"]})
    losses = reference([torch.optim.SGD(model.parameters(), lr=0.05)], model, Line(), range(5))
    local = part(island.export(SourceId(0)), "local/")
    for name, value in model.named_parameters():
        torch.testing.assert_close(local[name], value.detach(), rtol=1e-6, atol=1e-6)
    assert report.metrics["inner/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.tokens == 5 * 8


def test_cutting_a_task_in_two_changes_no_bit() -> None:
    deltas = []
    for cuts in ([6], [2, 4], [1, 1, 1, 1, 1, 1]):
        island = make_island(Line(dropout=0.3))
        first = 0
        for index, steps in enumerate(cuts):
            begin, end = index == 0, index == len(cuts) - 1
            given = snapshots(island) if begin else []
            _, sent = island.run(task(island, steps=steps, first_step=first, install=begin, send=end), given)
            first += steps
        deltas.append(bits(delta_of(sent)))
    assert deltas[0] == deltas[1] == deltas[2]


def test_randomness_differs_between_steps_sources_and_seeds_of_a_run() -> None:
    class Coin(Line):
        """The loss is random and has a gradient."""

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            coin = torch.rand(())
            return sum(p.sum() for p in model.parameters()) * 0 + coin, {"coin": float(coin)}  # type: ignore[return-value]

    island = make_island(Coin())
    island.run(task(island, steps=0, install=True), snapshots(island))

    def coin(source: int, step: int) -> float:
        report, _ = island.run(task(island, steps=1, first_step=step, source=SourceId(source)), [])
        return report.metrics["inner/coin"]

    coins = {(source, step): coin(source, step) for source in (0, 1) for step in range(4)}
    assert len(set(coins.values())) == 8
    assert coin(0, 2) == coins[0, 2]  # and is a function of them alone


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_gives_what_one_batch_gives(accumulation: int) -> None:
    found = []
    for parts in (1, accumulation):
        island = make_island(inner=Sgd(lr=0.05), accumulation=parts)
        report, sent = island.run(task(island, steps=4, install=True, send=True), snapshots(island))
        found.append((delta_of(sent), report))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-5, atol=1e-6)
    assert found[1][1].metrics["inner/loss"] == pytest.approx(found[0][1].metrics["inner/loss"], rel=1e-5)
    assert found[0][1].tokens == found[1][1].tokens


@dataclass(kw_only=True)
class Uneven(Line):
    """The tokens of a batch are not spread evenly over its sequences; the loss is the mean a token."""

    def batch(self, corpus: object, shard: ShardId, step: int) -> Batch:
        batch = super().batch(corpus, shard, step)  # type: ignore[arg-type]
        return {**batch, "weight": torch.arange(8) // 2}  # 0 0 1 1 2 2 3 3

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        errors = (model(batch["x"]) - batch["y"]).square().mean(1)
        return (errors * batch["weight"]).sum() / batch["weight"].sum().clamp(min=1), {}

    def tokens(self, batch: Batch) -> int:
        return int(batch["weight"].sum())


def test_accumulation_weighs_its_parts_by_tokens() -> None:
    found = []
    for parts in (1, 4):
        island = make_island(Uneven(), Sgd(lr=0.05), accumulation=parts)
        report, sent = island.run(task(island, steps=3, install=True, send=True), snapshots(island))
        found.append((delta_of(sent), report.metrics["inner/loss"]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-5, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_clipping_is_of_the_global_norm() -> None:
    """Seven weights with a gradient of 3 have the norm 3 sqrt 7; clipped to .5, a step of rate 1 has the length .5."""
    lengths = {}
    for clip in (0.0, 0.5, 100.0):
        island = make_island(Constant(gradients=[3.0]), Sgd(lr=1.0, clip=clip))
        report, sent = island.run(task(island, steps=1, install=True, send=True), snapshots(island))
        delta = torch.cat([value.reshape(-1) for value in delta_of(sent).values()])
        lengths[clip] = float(delta.norm())
        assert report.metrics["inner/grad_norm"] == pytest.approx(3 * 7**0.5)  # before clipping
    assert lengths == pytest.approx({0.0: 3 * 7**0.5, 0.5: 0.5, 100.0: 3 * 7**0.5}, rel=1e-5)


def test_the_rate_follows_from_the_step_in_the_task() -> None:
    inner = Sgd(lr=0.5, rate=RateSchedule.cosine, warmup_steps=4, fresh_warmup_steps=0)
    island = make_island(inner=inner)
    island.run(task(island, steps=0, install=True), snapshots(island))
    rates = {}
    for step in (0, 3, 22, 39, 1):  # also backwards: nothing is kept
        report, _ = island.run(task(island, steps=1, first_step=step), [])
        rates[step] = report.metrics["inner/lr"]
    # the cosine is half way at step 4 + 36 / 2
    expected = {0: 0.125, 3: 0.5, 22: 0.25, 1: 0.25}
    assert {step: rates[step] for step in expected} == pytest.approx(expected)
    assert rates[39] < 0.005


def test_a_source_that_starts_afresh_in_mid_run_warms_up() -> None:
    inner = Sgd(lr=1.0, fresh_warmup_steps=4)
    rates = []
    island = make_island(inner=inner)
    island.run(task(island, steps=0, first_step=10, install=True), snapshots(island))
    for step in range(10, 16):
        report, _ = island.run(task(island, steps=1, first_step=step), [])
        rates.append(report.metrics["inner/lr"])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    from_the_start = make_island(inner=inner)
    report, _ = from_the_start.run(task(from_the_start, steps=1, install=True), snapshots(from_the_start))
    assert report.metrics["inner/lr"] == 1.0


def test_an_evaluation_is_of_what_was_installed_and_trains_nothing() -> None:
    island = make_island()
    installed = snapshots(island)
    report, sent = island.run(task(island, steps=0, install=True, evaluate="validation"), installed)
    model = Line().build_model(0)
    model.load_state_dict(values_of(installed) | {"last.weight": values_of(installed)["first.weight"]})
    corpus = Line().corpus(Data(), seed=0, shards=2)
    assert report.metrics == {"eval/loss": Line().evaluate(model, corpus, "validation")["loss"]}
    assert (report.tokens, report.seconds, sent) == (0, 0.0, [])


# --- what survives ---

KINDS: dict[str, tuple[Workload, Inner]] = {
    "adamw with dropout": (Line(dropout=0.3), AdamW(lr=0.01, warmup_steps=3)),
    "muon": (Line(), Muon(lr=0.01, adamw_lr=0.01)),
    "sgd with momentum": (Line(dropout=0.1), Sgd(lr=0.05, momentum=0.9)),
    "a workload with state": (Remembering(dropout=0.2), AdamW(lr=0.01)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("within", [True, False], ids=["within a round", "between rounds"])
def test_a_loaded_source_goes_on_bit_for_bit(kind: str, within: bool, tmp_path: Path) -> None:
    """By way of the file that a checkpoint keeps."""
    results = []
    for moved in (False, True):
        workload, inner = type(KINDS[kind][0])(**vars_of(KINDS[kind][0])), KINDS[kind][1]
        island = make_island(workload, inner)
        island.run(task(island, steps=3, install=True), snapshots(island))
        if moved:
            write_source(str(tmp_path), SourceId(0), island.export(SourceId(0)))
            state = read_source(str(tmp_path), SourceId(0))
            assert state is not None
            island = make_island(type(workload)(**vars_of(workload)), inner)
            island.load(SourceId(0), state)
        given = [] if within else snapshots(island, seed=1)
        report, sent = island.run(task(island, steps=3, first_step=3, install=not within, send=True), given)
        metrics = {name: value for name, value in report.metrics.items() if name != "inner/fresh_state"}
        results.append((bits(delta_of(sent)), bits(island.export(SourceId(0)).tensors), metrics))
        assert island.export(SourceId(0)).meta["fresh_since"] is None
    assert results[0] == results[1]


def vars_of(workload: Workload) -> dict[str, object]:
    return {name: value for name, value in vars(workload).items() if not name.startswith("_")}


def test_the_state_that_is_loaded_does_matter() -> None:
    """Without the moments the next steps are others: the test above would notice their loss."""
    deltas = []
    for drop in ((), ("inner/",), ("anchor/",)):
        island = make_island(inner=AdamW(lr=0.01))
        island.run(task(island, steps=3, install=True), snapshots(island))
        state = island.export(SourceId(0))
        other = make_island(inner=AdamW(lr=0.01))
        other.run(task(other, steps=0, install=True), snapshots(other, seed=4))
        kept = {n: t for n, t in state.tensors.items() if not n.startswith(drop or ("none/",))}
        if "anchor/" in drop:
            kept |= {n: t + 1 for n, t in state.tensors.items() if n.startswith("anchor/")}
        other.load(SourceId(0), State(tensors=kept, meta=state.meta))
        _, sent = other.run(task(other, steps=2, first_step=3, send=True), [])
        deltas.append(bits(delta_of(sent)))
    assert deltas[0] != deltas[1]
    assert deltas[0] != deltas[2]


def test_what_was_exported_does_not_change_with_the_island() -> None:
    """It is written while the island trains on."""
    island = make_island(Remembering())
    island.run(task(island, steps=3, install=True), snapshots(island))
    state = island.export(SourceId(0))
    kept = {name: value.clone() for name, value in state.tensors.items()}
    island.run(task(island, steps=3, first_step=3, install=True), snapshots(island, seed=1))
    for name, value in kept.items():
        assert torch.equal(state.tensors[name], value), name


def test_what_was_loaded_does_not_change_with_the_island() -> None:
    island = make_island()
    island.run(task(island, steps=3, install=True), snapshots(island))
    state = island.export(SourceId(0))
    kept = {name: value.clone() for name, value in state.tensors.items()}
    other = make_island()
    other.load(SourceId(0), state)
    other.run(task(other, steps=3, first_step=3, install=True), snapshots(other, seed=1))
    for name, value in kept.items():
        assert torch.equal(state.tensors[name], value), name


def test_another_source_does_not_inherit_the_inner_state() -> None:
    """An island lends its workers: moments belong to who trained them."""
    island, fresh = make_island(), make_island()
    island.run(task(island, steps=3, install=True), snapshots(island))
    deltas = []
    for each in (island, fresh):
        _, sent = each.run(task(each, steps=3, install=True, send=True, source=SourceId(1)), snapshots(each, seed=1))
        deltas.append(bits(delta_of(sent)))
    assert deltas[0] == deltas[1]


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_source_that_was_refused_starts_afresh(keep: float) -> None:
    """Moments that met a number that is not finite never recover; nor are such weights kept."""
    inner = AdamW(lr=0.01, fresh_warmup_steps=5)
    bad = make_island(Constant(gradients=[1.0], poisoned_shards=[0], poisoned_steps=[1]), inner)
    _, sent = bad.run(task(bad, steps=3, install=True, send=True), snapshots(bad))
    assert not all(bool(value.isfinite().all()) for value in delta_of(sent).values())
    asked = task(bad, steps=3, first_step=3, install=True, send=True, round=1, fresh=True, keep=keep)
    report, sent = bad.run(asked, snapshots(bad, seed=1))
    fresh = make_island(Constant(gradients=[1.0]), inner)
    expected, same = fresh.run(task(fresh, steps=3, first_step=3, install=True, send=True), snapshots(fresh, seed=1))
    assert bits(delta_of(sent)) == bits(delta_of(same))
    assert report.metrics["inner/fresh_state"] == 1.0
    assert report.metrics["inner/lr"] == expected.metrics["inner/lr"]


def test_a_source_that_was_accepted_keeps_its_state() -> None:
    found = []
    for settled in ((), (Settled(round=0, fragment=0, accepted=True),)):
        island = make_island(inner=AdamW(lr=0.01))
        island.run(task(island, steps=3, install=True), snapshots(island))
        asked = task(island, steps=3, first_step=3, install=True, send=True, settled=settled)
        found.append(bits(delta_of(island.run(asked, snapshots(island, seed=1))[1])))
    assert found[0] == found[1]


def test_inner_state_is_kept_over_rounds() -> None:
    """Installing new weights resets neither moments nor the count of steps."""
    island = make_island(inner=AdamW(lr=0.01))
    island.run(task(island, steps=3, install=True), snapshots(island))
    before = part(island.export(SourceId(0)), "inner/")
    island.install(snapshots(island, seed=1))
    assert bits(part(island.export(SourceId(0)), "inner/")) == bits(before)
    assert any(value.count_nonzero() for value in before.values())
