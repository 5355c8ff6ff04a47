"""The virtual clock's links: how long rounds take, against a sum by hand; what is learned does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diloco.layout import Fragments, Outside
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from tests.toy import Line, digests, launch, records

ROUNDS, STEPS = 3, 4
BASE: dict[str, Any] = {
    "workload": Line(blocks=4),
    "islands": 2,
    "inner_steps": STEPS,
    "rounds": ROUNDS,
}


def ends_s(found: Any) -> list[float]:
    """The virtual time of each outer step."""
    return [record["clock_s"] for record in records(found.directory, "commit")]


def test_a_barrier_waits_for_the_slowest_link(tmp_path: Path) -> None:
    near = launch(tmp_path / "near", **BASE)
    pushed = max(record["comm/bytes_up"] for record in records(near.directory, "segment"))
    rates = [pushed * 8 / 1e6, pushed * 8 / 1e6 / 2]  # one second, and two, each way
    far = launch(tmp_path / "far", **BASE, runtime=Local(mbits_per_s=rates, latency_s=0.1))
    assert digests(far) == digests(near)
    told = [r for r in records(far.directory, "segment") if r["island"] == 1]
    down = [sum(r["comm/bytes_down"] for r in told if r["round"] == round_) for round_ in range(ROUNDS)]
    assert sum(r["comm/bytes_up"] for r in told) == ROUNDS * pushed
    assert down[0] == 0 and all(down[1:])  # all start with the first weights
    at_s, expected = 0.0, []
    for round_ in range(ROUNDS):
        at_s += down[round_] / pushed * 2 + STEPS + 2 + 4 * 0.1  # task, report, contribution, verdicts
        expected.append(at_s)
    # The commit's own line is written when its shard's answer is there, 0.2 s later.
    assert ends_s(far) == pytest.approx([end_s + 0.2 for end_s in expected])
    assert far.summary["compute_utilization"] == pytest.approx(ROUNDS * STEPS / (expected[-1] + 0.4), abs=0.01)


def test_a_lag_hides_the_link(tmp_path: Path) -> None:
    layout = Fragments(layers_per_fragment=2, outside=Outside.balanced)
    settings = {**BASE, "layout": layout, "schedule": Barrier(lag=1)}
    near = launch(tmp_path / "near", **settings)
    pushed = max(record["comm/bytes_up"] for record in records(near.directory, "segment"))
    fast = [pushed * 8 / 1e6 / 0.4] * 2  # four tenths of a second each way, under a step of one
    far = launch(tmp_path / "far", **settings, runtime=Local(mbits_per_s=fast))
    assert (far.summary["waiting_s"], digests(far)) == (0, digests(near))
    slow = [pushed * 8 / 1e6 / 0.7] * 2
    late = launch(tmp_path / "late", **settings, runtime=Local(mbits_per_s=slow))
    assert late.summary["waiting_s"] > 1 and digests(late) == digests(near)


def test_messages_follow_each_other(tmp_path: Path) -> None:
    """A link whose messages take longer than what lies between them is always busy."""
    layout = Fragments(layers_per_fragment=1, outside=Outside.balanced)
    settings = {**BASE, "islands": 1, "layout": layout}
    near = launch(tmp_path / "near", **settings, schedule=Barrier(lag=3))
    pushed = [r["comm/bytes_up"] for r in records(near.directory, "segment") if r["comm/bytes_up"]]
    runtime = Local(mbits_per_s=[max(pushed) * 8 / 1e6 / 3])  # three seconds; one is sent each second
    far = launch(tmp_path / "far", **settings, schedule=Barrier(lag=3), runtime=runtime)
    first_s = ends_s(far)[0]
    assert ends_s(far)[-1] >= first_s + sum(pushed[1:]) / max(pushed) * 3 - 1e-6
    assert digests(far) == digests(near)


@pytest.mark.parametrize(
    ("rates", "message"),
    [([1.0, 0.0], r"mbits_per_s=\[1.0, 0.0\] must hold positive"), ([1.0], r"mbits_per_s has 1 numbers for 2 islands")],
)
def test_links_that_cannot_be(tmp_path: Path, rates: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(tmp_path, **BASE, runtime=Local(mbits_per_s=rates))
