"""What metrics.jsonl tells of who is alive, who takes part, and how much that weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diloco.async_.outer import DelayedNesterov
from diloco.async_.schedule import FirstCome
from diloco.counters import Counters
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from tests.toy import Constant, launch, records

BASE: dict[str, Any] = {
    "workload": Constant(gradients=[1.0, 2.0, 3.0]),  # shards of 10, 20 and 30 examples
    "islands": 3,
    "inner_steps": 4,
    "segment_steps": 2,
    "rounds": 6,
}


def test_living_is_not_taking_part(tmp_path: Path) -> None:
    found = launch(tmp_path, **BASE, schedule=Barrier(drop_probability=0.4), seed=11)
    told = [
        (r["outer/alive"], r["outer/participating"], r["outer/weight"], r["outer/contributors"])
        for r in records(found.directory, "commit")
    ]
    assert len({len(sources) for *_, sources in told}) > 1
    for alive, taking, weight, sources in told:
        assert (alive, taking) == (3, len(sources))
        assert weight == pytest.approx(sum(10 * (1 + source) for source in sources) / 60)


def test_who_contributes_twice_to_a_step_counts_once(tmp_path: Path) -> None:
    schedule, runtime = FirstCome(batch=4, draw=False), Local(seconds_per_step=[1.0, 1.0, 9.0], latency_s=0.1)
    found = launch(tmp_path, **BASE, schedule=schedule, runtime=runtime, outer=DelayedNesterov())
    first, *_ = records(found.directory, "commit")
    assert sorted(first["outer/contributors"]) == [0, 0, 1, 1]
    assert (first["outer/alive"], first["outer/participating"]) == (3, 2)
    assert first["outer/weight"] == pytest.approx(30 / 60)


def test_a_task_tells_its_steps_and_its_time_by_the_runtimes_clock(tmp_path: Path) -> None:
    seconds = [1.0, 2.0, 5.0]
    schedule = FirstCome(max_staleness=2, draw=False)
    found = launch(tmp_path, **BASE, schedule=schedule, runtime=Local(seconds_per_step=seconds, latency_s=0.5))
    until = dict.fromkeys(range(3), 0.0)
    for record in records(found.directory, "segment"):
        assert record["clock_seconds"] == pytest.approx(record["steps"] * seconds[record["island"]])
        assert record["clock_s"] - record["clock_seconds"] >= until[record["island"]]
        until[record["island"]] = record["clock_s"]
    stale = records(found.directory, "stale")
    assert stale and all(record["staleness"] > 2 and record["island"] == 2 for record in stale)
    over = [record["total/rounds"] for record in records(found.directory, "commit")]
    assert over == sorted(over) and over[-1] == 6
    assert all(r["total/rounds"] <= r["round"] for r in records(found.directory, "commit"))


def test_the_newest_evaluation_counts_in_whatever_order_they_are_told() -> None:
    counters = Counters()
    for round_, loss in ((0, 5.0), (2, 3.0), (1, 2.0)):
        counters.count_evaluation(round_, {"eval/loss": loss})
    assert (counters.initial_val_loss, counters.val_loss, counters.best_val_loss) == (5.0, 3.0, 2.0)
    assert counters.evaluated_round == 2
