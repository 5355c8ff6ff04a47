"""Faults of real processes on Ray: what stands still is replaced, and a lost store goes back to a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diloco import resume
from diloco.checkpoint import Checkpoint
from diloco.patience import LEAST_SEEN
from diloco.runtime.base import Store
from diloco.runtime.ray_cluster import RayCluster
from tests.conftest import BASE, Start
from tests.faults.acting import acting, committed, process, send, told
from tests.toy import digests, launch, records, warned

pytestmark = pytest.mark.timeout(500)  # seconds a test: several starts of many processes

PATIENCE = 1.0  # 6 s beyond the usual, a minute for what is not known yet
SLOW = RayCluster(tick_s=0.2, slowdown=[0.05, 0.05])
SETTINGS: dict[str, Any] = {"runtime": SLOW, "rounds": 12, "patience": PATIENCE, "eval_every": 4}


def gone(pid: int) -> bool:
    """Whether a process has ended, whoever is to ask for its status."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_an_island_that_stands_still_is_replaced(start: Start, runs: Path) -> None:
    """Alive, but without progress. The other one goes on meanwhile, and nothing that was committed is lost."""
    run, stopped = runs / "run", list[int]()

    def stop() -> None:
        stopped.append(process(run, "island", 1))
        os.kill(stopped[0], signal.SIGSTOP)

    with acting((committed(run, 5), stop)):  # enough was seen of it
        result = start("run", **{**SETTINGS, "rounds": 60})
    assert result.summary["status"] == "finished"
    assert (result.summary["islands_lost"], result.summary["islands_joined"]) == (1, 1)
    (lost,) = records(run, "lost")
    assert lost["island"] == 1
    assert "no progress for" in lost["message"]
    assert "which usually takes" in lost["message"]
    assert process(run, "island", 1) != stopped[0]
    deadline_s = time.monotonic() + 20
    while not gone(stopped[0]) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert gone(stopped[0])  # stopped or not, it was ended
    contributors = [record["outer/contributors"] for record in records(run, "commit")]
    assert contributors[:5] == [[0, 1]] * 5
    assert [0] in contributors
    assert contributors[-1] == [0, 1]
    assert result.summary["tokens"] == sum(map(len, contributors)) * 6 * 8


def test_an_evaluator_that_stands_still_is_replaced(start: Start, runs: Path) -> None:
    """Once it is known how long an evaluation takes."""
    run = runs / "run"

    def evaluated() -> bool:
        return sum(record["event"] == "evaluation" for record in told(run)) >= LEAST_SEEN

    with acting((evaluated, send(signal.SIGSTOP, run, "evaluator"))):
        result = start("run", **{**SETTINGS, "eval_every": 1})
    assert result.summary["status"] == "finished"
    assert result.summary["islands_lost"] == 0
    assert sorted(r["round"] for r in records(run, "evaluation")) == list(range(13))
    assert [message for message in warned(run) if message.startswith("the evaluator: no progress for")]
    expected = launch(runs / "local", **{**BASE, "rounds": 12})
    assert digests(result) == digests(expected)


def test_a_lost_shard_returns_the_whole_store_to_its_checkpoint(start: Start, runs: Path) -> None:
    """Killed after round 5, stopped after 9, with checkpoints of 4 and 8: trained again, to the same bits."""
    run = runs / "run"
    settings = {"checkpoint": Checkpoint(every=4, keep=9), "store": Store(shards=2), "eval_every": 2, "rounds": 16}
    ways = {signal.SIGKILL: "is gone", signal.SIGSTOP: "has not answered"}
    with acting(*[(committed(run, 5 + 4 * i), send(number, run, "shard", 1)) for i, number in enumerate(ways)]):
        result = start("run", **{**SETTINGS, **settings})
    assert result.summary["status"] == "finished"
    assert result.summary["recoveries"] == 2
    assert 0 <= result.summary["rounds_again"] <= 4 * 2
    assert result.summary["islands_lost"] == 0
    expected = launch(runs / "local", **{**BASE, **settings})
    assert digests(result) == digests(expected)
    same = ("tokens", "outer_steps", "contributions", "val_loss", "bytes_up")
    assert {key: result.summary[key] for key in same} == {key: expected.summary[key] for key in same}
    rounds = [record["round"] for record in records(run, "commit")]
    assert rounds == list(range(1, 17))  # none counts twice
    notes = [message for message in warned(run) if "the run goes on from round" in message]
    assert len(notes) == 2  # each is told once
    for note, said in zip(notes, ways.values(), strict=True):
        assert said in note


def test_a_store_that_is_lost_before_its_first_checkpoint_begins_anew(start: Start, runs: Path) -> None:
    run = runs / "run"
    settings = {"checkpoint": Checkpoint(every=0), "rounds": 6}
    with acting((committed(run, 2), send(signal.SIGKILL, run, "shard", 0))):
        result = start("run", **{**SETTINGS, **settings})
    assert result.summary["recoveries"] == 1
    assert result.summary["rounds_again"] >= 2
    expected = launch(runs / "local", **{**BASE, **settings, "eval_every": 4})
    assert digests(result) == digests(expected)
    assert [record["round"] for record in records(run, "commit")] == list(range(1, 7))


def test_a_store_that_is_lost_again_and_again_ends_the_run(
    start: Start, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "MAX_TRIES", 1)  # of three, for time
    run = runs / "run"

    def begun(times: int) -> Any:
        return lambda: sum(record["event"] == "start" for record in told(run)) == 1 and seen(times)

    count = [0]
    shards = set[int]()

    def seen(times: int) -> bool:
        pids = [record["pid"] for record in told(run) if record["event"] == "process" and record["kind"] == "shard"]
        return bool(pids) and pids[-1] not in shards and count[0] == times

    def kill() -> None:
        shards.add(process(run, "shard", 0))
        count[0] += 1
        send(signal.SIGKILL, run, "shard", 0)()

    settings = {**SETTINGS, "checkpoint": Checkpoint(every=0), "rounds": 200}
    with (
        acting(*[(begun(times), kill) for times in range(2)]),
        pytest.raises(RuntimeError, match="gave up after 1 attempts without a new checkpoint"),
    ):
        start("run", **settings)
