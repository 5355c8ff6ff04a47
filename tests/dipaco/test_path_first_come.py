"""Asynchronous paths: every contribution is a step of its path's modules, and momentum is delayed for each of them."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco.async_.outer import DelayedNesterov
from diloco.async_.schedule import FirstCome
from diloco.checkpoint import Checkpoint
from diloco.config import register
from diloco.inner import AdamW, Sgd
from diloco.layout import Whole
from diloco.merge import Mean, MeanBy
from diloco.outer import Nesterov
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from dipaco.paths import Paths
from dipaco.schedule import PathFirstCome, PathRounds
from tests.conftest import BASE, Start
from tests.dipaco.test_path_rounds import GRID, Pull, values
from tests.toy import Line, Signalling, digests, launch, records, warned

ROUNDS = 4
DEEP: dict[str, Any] = {"workload": Line(blocks=4), "inner": AdamW(lr=0.01), "rounds": ROUNDS, "inner_steps": 6}
UNEQUAL = Local(seconds_per_step=[1.0, 1.1, 2.0, 5.0])
DELAYED = DelayedNesterov(lr=0.5, momentum=0.5)


@pytest.mark.parametrize("table", [[], [[0, 0], [0, 1], [0, 2], [1, 2]]], ids=["grid", "table"])
@pytest.mark.parametrize("islands", [1, 3])
def test_rounds_of_constant_contributions_come_to_the_steps_of_path_rounds(
    tmp_path: Path, islands: int, table: list[list[int]]
) -> None:
    """Whatever the number of paths through a module: 1 to 4 here, each with its own delay, shards and sqrt(P_le)."""
    layout = Paths(levels=[2, 3], table=table) if table else Paths(levels=[2, 2], private=["leave"])
    settings = {**DEEP, "workload": Pull(blocks=4), "inner": Sgd(lr=0.1), "layout": layout, "islands": islands}
    expected = launch(
        tmp_path / "expected",
        **settings,
        schedule=PathRounds(replicas=1),
        merge=Mean(by=MeanBy.examples),
        outer=Nesterov(lr=0.5, momentum=0.5),
    )
    found = launch(tmp_path / "found", **settings, schedule=PathFirstCome(replicas=1), outer=DELAYED)
    assert found.summary["contributions"]["accepted"] == 4 * ROUNDS
    theirs = values(expected.directory, ROUNDS)
    ours = values(found.directory, ROUNDS)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=2e-5, rtol=0)
    wrong = launch(tmp_path / "wrong", **settings, schedule=PathFirstCome(by_shard=False), outer=DELAYED)
    off = values(wrong.directory, ROUNDS)
    assert any(not torch.allclose(off[key], value, atol=1e-3) for key, value in theirs.items())


def test_one_path_is_asynchronous_diloco_to_the_bit(tmp_path: Path) -> None:
    """Four replicas of one path on unequal islands: a pool whose shards are not drawn is the same data."""
    settings = {**DEEP, "islands": 4, "store": Store(shards=1), "runtime": UNEQUAL, "outer": DELAYED}
    slots = Whole(patterns=["^layers", "^(?!layers)"])
    free = FirstCome(draw=False)
    expected = launch(tmp_path / "expected", **settings, layout=slots, schedule=free)
    found = launch(tmp_path / "found", **settings, layout=Paths(levels=[1]), schedule=PathFirstCome())
    # In FirstCome fast islands do the work of slow ones; until the first is through with its own, all is alike.
    until_s = 6 * ROUNDS
    alike = [
        [(r["clock_s"], r["outer/contributors"], r["outer/update_norm"]) for r in records(run.directory, "commit")]
        for run in (expected, found)
    ]
    ours, theirs = ([record for record in run if record[0] <= until_s] for run in alike)
    assert len(ours) == 4 + 3 + 2 and ours == theirs


def test_paths_that_share_nothing_are_synchronous_runs_of_their_own(tmp_path: Path) -> None:
    """A delay of one is Nesterov, and nobody waits for anybody."""
    flat = {**DEEP, "islands": 2, "layout": Paths(levels=[2], private=["."])}
    runtime = Local(seconds_per_step=[1.0, 3.0])
    outer = Nesterov(lr=0.5, momentum=0.5)
    expected = launch(tmp_path / "expected", **flat, schedule=PathRounds(), outer=outer)
    found = launch(tmp_path / "found", **flat, schedule=PathFirstCome(), outer=DELAYED, runtime=runtime)
    theirs = values(expected.directory, ROUNDS)
    for key, value in values(found.directory, ROUNDS).items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)
    ends_s = {r["island"]: r["clock_s"] for r in records(found.directory, "segment")}
    assert ends_s == {0: ROUNDS * 6, 1: ROUNDS * 18}


def test_nobody_waits_and_stale_contributions_count_less(tmp_path: Path) -> None:
    settings = {**DEEP, "islands": 4, "layout": GRID, "outer": DELAYED, "runtime": UNEQUAL}
    run = launch(tmp_path, **settings, schedule=PathFirstCome(damping=0.5, rescale=False))
    assert run.summary["contributions"] == {"accepted": 4 * ROUNDS, "rejected": 0, "late": 0, "stale": 0}
    assert {r["comm/seconds_waiting"] for r in records(run.directory, "segment")} == {0}
    commits = [r for r in records(run.directory, "commit") if len(r["outer/contributors"]) == 1]
    assert max(r["outer/staleness"] for r in commits) >= 2
    for record in commits:
        # Several modules have one record; they may differ in staleness, and the first's scale is told.
        assert record["outer/scale"] == pytest.approx((1 + record["outer/stalenesses"][0]) ** -0.5)


@pytest.mark.parametrize("islands", [2, 4, 5])
def test_every_path_trains_all_its_rounds_once_on_its_own_data(tmp_path: Path, islands: int) -> None:
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "islands": islands}
    run = launch(tmp_path, **settings, schedule=PathFirstCome(replicas=1), runtime=Local())
    trained = [(r["source"], r["step"] - r["steps"]) for r in records(run.directory, "segment")]
    assert sorted(trained) == [(path, step) for path in range(4) for step in range(0, 6 * ROUNDS, 2)]


@dataclass(kw_only=True)
class Poisoned(Line):
    """Not a number on one shard from one step on, for so many steps."""

    at_shard: int = 1
    at_step: int = 6
    steps: int = 1
    everywhere: bool = False

    def batch(self, corpus: Any, shard: Any, step: int) -> Any:
        batch = super().batch(corpus, shard, step)
        if (self.everywhere or shard == self.at_shard) and self.at_step <= step < self.at_step + self.steps:
            batch["x"] = batch["x"] * math.nan
        return batch


register(group="workload", name="poisoned", node=Poisoned)


@pytest.mark.parametrize("at_step", [6, 6 * (ROUNDS - 1)])
def test_a_refused_contribution_keeps_nobody(tmp_path: Path, at_step: int) -> None:
    """Also in the last round, where no step follows it."""
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "islands": 2, "workload": Poisoned(blocks=4, at_step=at_step)}
    run = launch(tmp_path, **settings, schedule=PathFirstCome(replicas=1))
    assert run.summary["status"] == "finished"
    assert run.summary["contributions"]["rejected"] == 1
    assert run.summary["contributions"]["accepted"] == 4 * ROUNDS - 1
    assert any("source 1 to round 1" in text or f"round {at_step // 6}" in text for text in warned(run.directory))


def test_a_run_of_which_all_is_refused_stops(tmp_path: Path) -> None:
    poison = Poisoned(blocks=4, at_step=6, steps=100, everywhere=True)
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "islands": 2, "workload": poison}
    run = launch(tmp_path, **settings, schedule=PathFirstCome(replicas=1))
    assert run.summary["status"] == "stopped" and "were rejected" in run.summary["reason"]


@pytest.mark.parametrize(
    ("islands", "runtime", "at_shard", "at_step"), [(4, UNEQUAL, 3, 9), (2, Local(seconds_per_step=[1.0, 2.5]), 1, 20)]
)
def test_a_run_resumed_from_a_rounds_checkpoint_is_the_run_that_was_never_stopped(
    tmp_path: Path, islands: int, runtime: Local, at_shard: int, at_step: int
) -> None:
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "islands": islands, "runtime": runtime}
    settings |= {"schedule": PathFirstCome(replicas=1), "checkpoint": Checkpoint(every=1)}
    settings["inner"] = AdamW(lr=0.01, warmup_steps=1)
    file = tmp_path / "signal"
    stopping = Signalling(blocks=4, file=str(file), at_shard=at_shard, at_step=at_step, number=15)
    expected = launch(tmp_path / "expected", **{**settings, "workload": stopping})
    file.write_text("")
    first = launch(tmp_path / "first", **{**settings, "workload": stopping})
    assert first.summary["status"] == "interrupted"
    for folder in (first.directory / "checkpoints").iterdir():
        if "steps" in folder.name:  # what was written at the stop is of no round's end
            shutil.rmtree(folder)
    found = launch(tmp_path / "again", **{**settings, "workload": stopping}, resume=str(first.directory))
    assert found.summary["status"] == "finished"
    assert digests(found) == digests(expected)


def test_a_stopped_run_trains_all_data_once(tmp_path: Path) -> None:
    """From where each path was at the stop."""
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "islands": 3, "schedule": PathFirstCome(replicas=1)}
    file = tmp_path / "signal"
    file.write_text("")
    stopping = Signalling(blocks=4, file=str(file), at_shard=1, at_step=9, number=15)
    first = launch(tmp_path / "first", **{**settings, "workload": stopping})
    assert first.summary["status"] == "interrupted"
    found = launch(tmp_path / "again", **{**settings, "workload": stopping}, resume=str(first.directory))
    assert found.summary["contributions"]["accepted"] == 4 * ROUNDS
    trained = [(r["source"], r["step"] - r["steps"]) for r in records(found.directory, "segment")]
    assert sorted(trained) == [(path, step) for path in range(4) for step in range(0, 6 * ROUNDS, 2)]


@pytest.mark.timeout(300)
def test_a_path_of_a_dead_island_contributes_once_a_round(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "signal"
    file.write_text("")
    settings = {**DEEP, "layout": GRID, "outer": DELAYED, "schedule": PathFirstCome(replicas=1), "segment_steps": 3}
    killed = {**settings, "workload": Signalling(blocks=4, file=str(file), at_shard=2, at_step=8)}
    found = start("killed", **killed, islands=2)
    assert found.summary["islands_lost"] == 1 and not file.exists()
    assert found.summary["contributions"] == {"accepted": 4 * ROUNDS, "rejected": 0, "late": 0, "stale": 0}


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout.fragments=1, or schedule=path_rounds"):
        fragments = Paths(levels=[2, 2], fragments=2)
        launch(tmp_path, **{**BASE, **DEEP}, layout=fragments, schedule=PathFirstCome(), islands=4)
    with pytest.raises(ValueError, match=r"damping=-1"):
        PathFirstCome(damping=-1)
    with pytest.raises(ValueError, match=r"replicas=-1"):
        PathFirstCome(replicas=-1)
    assert not isinstance(PathFirstCome(), Barrier)
