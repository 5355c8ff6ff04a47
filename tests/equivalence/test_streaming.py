"""Streaming DiLoCo (arXiv:2501.18512, Alg. 2) against its listing written out in plain floats, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import Result, RunConfig
from diloco.checkpoint import Checkpoint, read_source
from diloco.inner import AdamW, RateSchedule, Sgd
from diloco.layout import Cut, Fragments, Outside, Whole
from diloco.messages import SourceId
from diloco.outer import Nesterov
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from diloco.starting import read_values
from tests.toy import Constant, Line, digests, launch

ROUNDS, STEPS = 4, 4
GRADIENTS = (1.0, 3.0)
INNER_LR, OUTER_LR, MOMENTUM = 0.1, 0.4, 0.9


def listing(*, fragments: int, lag: int, keep: float) -> list[list[float]]:
    """The global value of each fragment after each of its outer steps, as the paper's listing gives it.

    All parameters of a fragment are alike under constant gradients, so that one number stands for them.
    """
    anchor, momentum = [1.0] * fragments, [0.0] * fragments
    local = [[1.0] * fragments for _ in GRADIENTS]
    sent: list[list[float]] = [[] for _ in range(fragments)]
    history: list[list[float]] = [[] for _ in range(fragments)]

    def outer_step(p: int) -> None:
        delta = sum(sent[p]) / len(sent[p])
        momentum[p] = MOMENTUM * momentum[p] + delta
        anchor[p] -= OUTER_LR * (delta + MOMENTUM * momentum[p])
        history[p].append(anchor[p])
        sent[p] = []

    for t in range(1, ROUNDS * STEPS + 1):
        for weights, gradient in zip(local, GRADIENTS, strict=True):
            for p in range(fragments):
                weights[p] -= INNER_LR * gradient
        for p in range(fragments):
            offset = (p + 1) * STEPS // fragments
            if (t - offset) % STEPS == 0:
                sent[p] = [anchor[p] - weights[p] for weights in local]
            if t > lag and (t - offset - lag) % STEPS == 0 and sent[p]:
                outer_step(p)
                for weights in local:
                    weights[p] = keep * weights[p] + (1 - keep) * anchor[p]
    for p in range(fragments):  # what was still under way at the end
        if sent[p]:
            outer_step(p)
    return history


def streamed(directory: Path, *, fragments: int, lag: int, keep: float, segment_steps: int = 2) -> Result:
    return launch(
        directory,
        workload=Constant(gradients=list(GRADIENTS), start=1.0),
        rounds=ROUNDS,
        inner_steps=STEPS,
        segment_steps=segment_steps,
        inner=Sgd(lr=INNER_LR, rate=RateSchedule.constant),
        outer=Nesterov(lr=OUTER_LR, momentum=MOMENTUM),
        layout=Fragments(cut=Cut.balanced, count=fragments),
        schedule=Barrier(lag=lag, keep=keep),
        store=Store(shards=1),
        checkpoint=Checkpoint(every=1, keep=100),
    )


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lag", [0, 1, 2, 3])
@pytest.mark.parametrize("fragments", [1, 2])
def test_the_history_is_that_of_the_listing(runs: Path, fragments: int, lag: int, keep: float) -> None:
    streamed(runs / "run", fragments=fragments, lag=lag, keep=keep)
    expected = listing(fragments=fragments, lag=lag, keep=keep)
    assert [len(values) for values in expected] == [ROUNDS] * fragments
    for round_ in range(ROUNDS):
        found = read_values(str(runs / "run" / "checkpoints" / f"round-{round_ + 1:06d}"))
        # The larger of the two parameters, `b`, is in the first fragment.
        for name, p in (("b", 0), ("a", fragments - 1)):
            torch.testing.assert_close(found[name], torch.full_like(found[name], expected[p][round_]))


def test_the_listing_tells_its_settings_apart() -> None:
    """So that the comparison above can fail."""
    settings = [(p, lag, keep) for p in (1, 2) for lag in (0, 1) for keep in (0.0, 0.5)]
    last = {s: listing(fragments=s[0], lag=s[1], keep=s[2])[0][-1] for s in settings}
    assert len({round(value, 6) for value in last.values()}) >= 6


@pytest.mark.parametrize("segment_steps", [0, 1, 3])
def test_segments_change_nothing(runs: Path, segment_steps: int) -> None:
    cut = streamed(runs / "cut", fragments=2, lag=3, keep=0.5, segment_steps=segment_steps)
    assert digests(cut) == digests(streamed(runs / "run", fragments=2, lag=3, keep=0.5))


DEEP: dict[str, Any] = {"workload": Line(blocks=4), "inner": AdamW(lr=0.01), "rounds": 4, "inner_steps": 6}
CONSTANT_RATE = AdamW(lr=0.01, rate=RateSchedule.constant)


def test_one_fragment_without_lag_is_diloco_to_the_bit(runs: Path) -> None:
    settings = {**DEEP, "workload": Line(dropout=0.3)}
    whole = launch(runs / "whole", **settings, layout=Whole(), store=Store(shards=1))
    one = Fragments(cut=Cut.balanced, count=1)
    found = launch(runs / "one", **settings, layout=one, schedule=Barrier(lag=0, keep=0.0), store=Store(shards=1))
    assert found.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert found.summary["tokens"] == whole.summary["tokens"]
    assert found.summary["bytes_up"] == whole.summary["bytes_up"]


@pytest.mark.parametrize("lag", [0, 2])
def test_to_keep_all_is_never_to_communicate(runs: Path, lag: int) -> None:
    """With keep=1 each source's own weights are those that it has when it trains alone."""
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    settings = {**DEEP, "inner": CONSTANT_RATE, "layout": layout}
    both = launch(runs / "both", **settings, islands=2, schedule=Barrier(lag=lag, keep=1.0))
    alone = launch(runs / "alone", **settings, islands=1, schedule=Barrier(lag=lag, keep=1.0))
    states = [read_source(result.summary["checkpoint"], SourceId(0)) for result in (both, alone)]
    assert states[0] is not None and states[1] is not None
    names = [name for name in states[0].tensors if name.startswith(("local/", "inner/"))]
    assert any(name.startswith("inner/") for name in names)
    for name in names:
        assert torch.equal(states[0].tensors[name], states[1].tensors[name]), name
    assert both.summary["weights_sha256"] != alone.summary["weights_sha256"]  # the global ones are shared still


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_change_nothing(runs: Path, shards: int) -> None:
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    settings = {**DEEP, "layout": layout, "schedule": Barrier(lag=2, keep=0.25)}
    found = launch(runs / "found", **settings, store=Store(shards=shards))
    expected = launch(runs / "expected", **settings, store=Store(shards=1))
    assert found.summary["weights_sha256"] == expected.summary["weights_sha256"]


@pytest.mark.parametrize(("lag", "exposed"), [(0, True), (1, False), (2, False), (5, False)])
def test_a_driver_far_away_adds_nothing_where_there_is_a_lag(runs: Path, lag: int, exposed: bool) -> None:
    """200 ms one way to the driver and steps of a second: what waits is waited for under training."""
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    settings = {**DEEP, "layout": layout, "schedule": Barrier(lag=lag), "segment_steps": 2}
    near = launch(runs / "near", **settings)
    far = launch(runs / "far", **settings, runtime=Local(latency_s=0.2))
    assert digests(near) == digests(far)
    assert near.summary["waiting_s"] == 0
    turns = 2 * DEEP["rounds"] - 1  # the last is waited for by nobody
    expected = 2 * turns * 4 * 0.2 if exposed else 0.0  # two islands; report, push, verdict, task
    assert far.summary["waiting_s"] == pytest.approx(expected)


def test_a_lag_that_is_too_short_for_the_driver_is_seen(runs: Path) -> None:
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    settings = {**DEEP, "layout": layout, "schedule": Barrier(lag=1), "segment_steps": 2}
    far = launch(runs / "far", **settings, runtime=Local(latency_s=0.4))  # 1.6 s under a step of 1 s
    assert far.summary["waiting_s"] == pytest.approx(2 * (2 * DEEP["rounds"] - 1) * 0.6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": Barrier(lag=6)}, r"schedule.lag=6 is not below inner_steps=6.*use at most 5"),
        ({"inner_steps": 7, "schedule": Barrier(lag=1)}, r"inner_steps=7 is not divisible by the 2 frag.*use 6 or 8"),
        ({"layout": Fragments(count=5)}, r"layout.count=5 fragments are more than the model's 4 blocks; use fewer"),
        ({"layout": Fragments(), "workload": Line()}, r"no numbered blocks.*use layout=whole"),
        ({"layout": Fragments(cut=Cut.balanced, count=99)}, r"layout.count=99 is more than the model's \d+ parameters"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    runs: Path, settings: dict[str, Any], message: str
) -> None:
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    with pytest.raises(ValueError, match=message):
        launch(runs / "run", **{**DEEP, "layout": layout, **settings})
    assert not (runs / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Barrier(keep=1.5), r"schedule.keep=1.5 is outside \[0, 1\]"),
        (lambda: Barrier(keep=-0.1), r"schedule.keep=-0.1 is outside"),
        (lambda: Barrier(lag=-1), r"schedule.lag=-1 must not be negative"),
        (lambda: RunConfig(patience=-1.0), r"patience=-1.0 is too small"),
        (lambda: Fragments(layers_per_fragment=0), r"layers_per_fragment=0 must be at least 1"),
        (lambda: Fragments(count=-1), r"layout.count=-1 must not be negative"),
        (lambda: Fragments(cut=Cut.balanced), r"layout.cut=balanced .* give layout.count"),
        (lambda: Local(latency_s=-1.0), r"runtime.latency_s=-1.0 must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
