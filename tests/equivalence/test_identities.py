"""Identities of the papers, against plain loops of torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diloco import Result
from diloco.checkpoint import Checkpoint
from diloco.data import Data
from diloco.inner import AdamW, Inner, Muon, RateSchedule, Sgd
from diloco.merge import Mean, MeanBy
from diloco.messages import ShardId, Tensors
from diloco.outer import Nesterov
from diloco.outer import Sgd as OuterSgd
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.starting import read_values
from tests.toy import Line, digests, launch

ROUNDS, STEPS = 5, 7


def weights(result: Result) -> Tensors:
    """Those of the newest checkpoint, checked against the summary's digest."""
    values = read_values(result.summary["checkpoint"])
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(values[name].numpy().tobytes())
    assert digest.hexdigest() == result.summary["weights_sha256"]
    return values


def named(model: nn.Module) -> Tensors:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As `inner=adamw` makes it: decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / (ROUNDS * STEPS)))


def train_plainly(
    model: nn.Module,
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    *,
    lr: float,
    share: Callable[[int], float],
    after_round: Callable[[nn.Module, Tensors], None] = lambda model, anchor: None,
) -> Tensors:
    """All steps on shard 0, gradients clipped to 1; `share` of the rate by step; `after_round` gets the old weights."""
    workload = Line()
    corpus = workload.corpus(Data(), seed=0, shards=1)
    optimizer = make(model, lr)
    for round_ in range(ROUNDS):
        anchor = {name: p.clone() for name, p in named(model).items()}
        for step in range(round_ * STEPS, (round_ + 1) * STEPS):
            loss, _ = workload.loss(model, workload.batch(corpus, ShardId(0), step))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = lr * share(step)
            optimizer.step()
        after_round(model, anchor)
    return named(model)


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("by", list(MeanBy))
def test_one_sgd_step_a_round_is_sgd_on_the_joint_batch(runs: Path, sources: int, by: MeanBy) -> None:
    """H = 1, inner SGD, outer SGD with rate 1 (arXiv:2311.08105, section 3): large-batch data parallel."""
    result = launch(
        runs / "run",
        islands=sources,
        rounds=20,
        inner_steps=1,
        inner=Sgd(lr=0.2),
        outer=OuterSgd(lr=1.0),
        merge=Mean(by=by),  # the shards are equally large
        eval_every=0,
    )
    workload = Line()
    corpus = workload.corpus(Data(), seed=0, shards=sources)
    model = workload.build_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(20):
        batches = [workload.batch(corpus, ShardId(shard), step) for shard in range(sources)]
        joint = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        optimizer.zero_grad()
        workload.loss(model, joint)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_close(weights(result), named(model))
    start = named(workload.build_model(0))
    assert all(not torch.allclose(start[name], value, atol=1e-3) for name, value in named(model).items())


def one_source(runs: Path, rate: RateSchedule) -> Tensors:
    result = launch(
        runs / "run",
        islands=1,
        rounds=ROUNDS,
        inner_steps=STEPS,
        segment_steps=3,
        inner=AdamW(lr=0.02, weight_decay=0.1, clip=1.0, rate=rate),
        outer=OuterSgd(lr=1.0),
        eval_every=0,
    )
    return weights(result)


def test_one_source_that_is_averaged_alone_trains_as_if_alone(runs: Path) -> None:
    """k = 1, outer SGD with rate 1: plain AdamW, its moments kept over rounds."""
    expected = train_plainly(Line().build_model(0), adamw, lr=0.02, share=cosine)
    assert_close(one_source(runs, RateSchedule.cosine), expected)


def test_one_source_equals_the_subtraction_in_float32_bit_for_bit(runs: Path) -> None:
    """What the store does to the weights after each round, and nothing else: p -= anchor - p_local."""

    @torch.no_grad()
    def settle(model: nn.Module, anchor: Tensors) -> None:
        for name, p in model.named_parameters():
            p.copy_(anchor[name] - (anchor[name] - p))

    expected = train_plainly(Line().build_model(0), adamw, lr=0.02, share=lambda step: 1.0, after_round=settle)
    found = one_source(runs, RateSchedule.constant)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_subtraction_does_show_in_the_bits() -> None:
    """Else the test above would be that of plain training."""
    generator = torch.Generator().manual_seed(0)
    anchor, local = (torch.randn(1000, generator=generator) for _ in range(2))
    assert not torch.equal(anchor - (anchor - local), local)


def test_rounds_of_diloco_are_those_of_algorithm_1(runs: Path) -> None:
    """Two sources, AdamW inside and Nesterov outside, against the algorithm written out with torch's optimizers."""
    result = launch(
        runs / "run",
        islands=2,
        rounds=3,
        inner_steps=4,
        inner=AdamW(lr=0.02, rate=RateSchedule.constant, clip=0.0),
        outer=Nesterov(lr=0.7, momentum=0.9),
    )
    workload = Line()
    corpus = workload.corpus(Data(), seed=0, shards=2)
    replicas = [workload.build_model(0) for _ in range(2)]
    inner = [adamw(model, 0.02) for model in replicas]
    theta = [p.detach().clone().requires_grad_() for p in workload.build_model(0).parameters()]
    outer = torch.optim.SGD(theta, lr=0.7, momentum=0.9, nesterov=True)
    for round_ in range(3):
        for shard, (model, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            with torch.no_grad():
                for p, value in zip(model.parameters(), theta, strict=True):
                    p.copy_(value)
            for step in range(4 * round_, 4 * round_ + 4):
                optimizer.zero_grad()
                workload.loss(model, workload.batch(corpus, ShardId(shard), step))[0].backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        local: list[tuple[Tensor, ...]] = list(zip(*(m.parameters() for m in replicas), strict=True))
        for value, both in zip(theta, local, strict=True):
            value.grad = torch.stack([value.detach() - p.detach() for p in both]).mean(0)
        outer.step()
    names = list(named(replicas[0]))
    assert_close(weights(result), {name: value.detach() for name, value in zip(names, theta, strict=True)}, 2e-6)


# --- what may not change a bit ---

INNERS: dict[str, Inner] = {"adamw": AdamW(lr=0.01), "muon": Muon(lr=0.01, adamw_lr=0.01), "sgd": Sgd(momentum=0.9)}


@pytest.mark.parametrize("inner", INNERS)
def test_cutting_rounds_changes_no_bit(runs: Path, inner: str) -> None:
    found = {
        digests(
            launch(
                runs / f"cut-{cut}", workload=Line(dropout=0.2), inner=INNERS[inner], inner_steps=7, segment_steps=cut
            )
        )
        for cut in (0, 1, 5, 7)
    }
    assert len(found) == 1


def test_shards_of_the_store_change_no_bit(runs: Path) -> None:
    found = {digests(launch(runs / f"{n}", store=Store(shards=n))) for n in (1, 2, 3)}
    assert len(found) == 1


def test_the_order_in_which_islands_finish_changes_no_bit(runs: Path) -> None:
    speeds = ([], [1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [0.1, 7.0, 0.3])
    found = {
        digests(launch(runs / f"{i}", islands=3, runtime=Local(seconds_per_step=list(s)))) for i, s in enumerate(speeds)
    }
    assert len(found) == 1


def test_checkpoints_and_evaluations_change_no_bit(runs: Path) -> None:
    settings = [
        {"checkpoint": Checkpoint(every=1), "eval_every": 1},
        {"checkpoint": Checkpoint(every=0), "eval_every": 0},
        {"checkpoint": Checkpoint(every=2, keep=1), "eval_every": 2},
    ]
    found = {digests(launch(runs / f"{i}", workload=Line(dropout=0.2), **s)) for i, s in enumerate(settings)}
    assert len(found) == 1


def test_the_digests_do_tell_runs_apart(runs: Path) -> None:
    different = [
        launch(runs / "a"),
        launch(runs / "b", seed=1),
        launch(runs / "c", outer=Nesterov(lr=0.6)),
        launch(runs / "d", islands=3),
        launch(runs / "e", inner_steps=5),
    ]
    assert len({digests(result)[0] for result in different}) == 5
    assert len({digests(result)[1] for result in different}) == 5
