"""Where a run on Ray begins, or begins again: what it waits for, and what ends it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ray.exceptions import RayActorError

from diloco.config import RunConfig
from diloco.jobs import make_job
from diloco.runtime import ray_start
from diloco.runtime.base import Job, StoreLost
from diloco.runtime.ray_refs import starting
from diloco.runtime.ray_start import _Lack
from tests.toy import Line

PLACES = "islands=4 with 1 CPU a worker: the 1 node(s) of the cluster have places for 1; use fewer or start more nodes"


class Cluster:
    """One that has room for an island less than it is asked for, until it was asked often enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
        self.asked: list[int] = []
        self._times = times
        monkeypatch.setattr(ray_start, "_lack", self._lack)
        monkeypatch.setattr(ray_start, "SAY_EVERY_S", 0.0)
        monkeypatch.setattr(ray_start.time, "sleep", lambda seconds: None)

    def _lack(self, job: Job) -> _Lack | None:
        self.asked.append(job.islands)
        return _Lack(of_places=True, told=PLACES) if len(self.asked) <= self._times else None


def job(*, goes_on: bool, min_islands: int = 0) -> Job:
    made = make_job(RunConfig(workload=Line(), islands=4, min_islands=min_islands).resolved())
    return replace(made, goes_on=goes_on)


@pytest.mark.parametrize(("min_islands", "wanted"), [(0, 4), (2, 2)])
def test_a_run_that_begins_says_at_once_that_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, min_islands: int, wanted: int
) -> None:
    cluster = Cluster(monkeypatch, times=1)
    with pytest.raises(ValueError, match="have places for 1; use fewer or start more nodes"):
        ray_start._check_cluster(job(goes_on=False, min_islands=min_islands))
    assert cluster.asked == [wanted]


@pytest.mark.parametrize(("min_islands", "wanted"), [(0, 1), (2, 2)])
def test_a_run_that_goes_on_takes_what_is_left_and_waits_for_more_where_that_is_too_little(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], min_islands: int, wanted: int
) -> None:
    cluster = Cluster(monkeypatch, times=3)
    ray_start._check_cluster(job(goes_on=True, min_islands=min_islands))
    assert cluster.asked == [wanted] * 4
    assert f"waiting since 0 s: {PLACES}" in capsys.readouterr().err


def test_a_process_that_is_lost_while_a_run_starts_is_a_reason_to_begin_again() -> None:
    with pytest.raises(StoreLost, match="a process was lost while the run started: "), starting():
        raise RayActorError()
    with pytest.raises(ValueError, match="a mistake"), starting():
        raise ValueError("a mistake")
