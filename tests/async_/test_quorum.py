"""Islands that never wait: a quorum of all of them is the synchronous method, and who stalls costs nobody anything."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diloco.async_.quorum import Quorum
from diloco.checkpoint import Checkpoint
from diloco.events import Finished, Joined, Push, Run
from diloco.inner import AdamW
from diloco.layout import Fragments, Outside, Whole
from diloco.merge import RDA
from diloco.messages import IslandId, SlotName, SourceId, Task
from diloco.outer import Nesterov
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from tests.resume.test_resume_local import Broken, at_event, die
from tests.toy import FakeRuntime, Line, digests, launch, make_view, records

BASE: dict[str, Any] = {
    "workload": Line(blocks=2),
    "inner": AdamW(lr=0.01),
    "islands": 3,
    "inner_steps": 6,
    "segment_steps": 4,
    "rounds": 3,
    "outer": Nesterov(lr=0.5, momentum=0.8),
}
LAYOUTS = {"whole": Whole(), "fragments": Fragments(layers_per_fragment=1, outside=Outside.balanced)}
UNEQUAL = Local(seconds_per_step=[1.0, 1.1, 2.5])


@pytest.mark.parametrize("by_speed", [False, True])
@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quorum_of_all_without_grace_is_the_synchronous_method(
    tmp_path: Path, layout: str, lag: int, by_speed: bool
) -> None:
    settings = {**BASE, "layout": LAYOUTS[layout]}
    expected = launch(tmp_path / "barrier", **settings, schedule=Barrier(lag=lag))
    schedule = Quorum(quorum=3, grace=0.0, lag=lag, by_speed=by_speed)
    found = launch(tmp_path / "quorum", **settings, schedule=schedule)
    assert digests(found) == digests(expected)
    same = ("tokens", "bytes_up", "bytes_down", "outer_steps", "contributions", "val_loss")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}


def test_islands_of_all_speeds_take_part_and_none_waits(tmp_path: Path) -> None:
    settings = {**BASE, "rounds": 10, "layout": LAYOUTS["fragments"], "runtime": UNEQUAL}
    found = launch(tmp_path / "run", **settings, schedule=Quorum(), merge=RDA())
    assert found.summary["status"] == "finished"
    commits = records(found.directory, "commit")
    shares = Counter(source for r in commits for source in r["outer/contributors"])
    assert min(shares.values()) > 0.3 * len(commits) and len(shares) == 3
    told = found.summary["contributions"]
    assert told["late"] == len([w for w in records(found.directory, "warning") if "too late" in w["message"]])
    assert sum(shares.values()) == told["accepted"]
    for island in range(3):  # never a gap between two tasks
        ends = [(r["clock_s"], r["step"]) for r in records(found.directory, "segment") if r["island"] == island]
        assert ends[-1][0] == pytest.approx(ends[-1][1] * [1.0, 1.1, 2.5][island], rel=1e-6)


def test_the_wait_for_others_ends_with_the_grace(tmp_path: Path) -> None:
    """Of two steps' lag, half may be waited: island 1 is a tenth of a step a step behind, island 2 much more."""
    settings = {**BASE, "layout": LAYOUTS["whole"], "runtime": Local(seconds_per_step=[1.0, 1.1, 2.0]), "rounds": 1}
    found = launch(tmp_path / "run", **settings, schedule=Quorum(grace=0.5, by_speed=False))
    first = records(found.directory, "commit")[0]
    assert (first["clock_s"], first["outer/contributors"]) == (pytest.approx(7.0), [0, 1])
    alone = launch(tmp_path / "alone", **settings, schedule=Quorum(grace=0.0, by_speed=False))
    first = records(alone.directory, "commit")[0]
    assert (first["clock_s"], first["outer/contributors"]) == (6.0, [0])


# --- stalls and losses ---


def begun(schedule: Quorum, *, seed: int = 0, **settings: Any) -> FakeRuntime:
    fragments = ((SlotName("whole.0"),), (SlotName("whole.1"),))
    view = make_view(islands=3, fragments=fragments, **settings)
    view.pool = view.new_pool(schedule.drawn)
    for module in view.modules.values():
        module.awaited.clear()
    runtime = FakeRuntime(view, schedule, seed=seed)
    runtime.start()
    return runtime


def test_a_stall_costs_the_others_nothing() -> None:
    """Island 2 does not answer for a long time: the others take all the steps but its own."""
    runtime = begun(Quorum(grace=0.0), rounds=6, save_every=0)
    while ready := [c for c in runtime.ready() if getattr(getattr(c, "task", None), "island", 0) != 2]:
        runtime.answer(ready[0])
    assert runtime.stop is None
    pool = runtime.view.pool
    assert pool is not None and pool.left == 0
    assert pool.done == 6 * 6 * 3 - pool.under_way and pool.under_way <= 6
    assert {source for commit in runtime.commits() for source in commit.sources} == {0, 1}
    runtime.go()  # it is there again: what it has is too late, and everything ends
    assert runtime.stop is not None and runtime.stop.status == "finished"
    assert runtime.view.counters.late > 0


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_done_once_whoever_is_lost(seed: int) -> None:
    runtime = begun(Quorum(quorum=1 + seed % 3, grace=0.0), seed=seed, rounds=4, save_every=seed % 2)
    for lost in range(4):
        runtime.go(until=lambda limit=11 * (lost + 1): len(runtime.said) > limit)  # type: ignore[misc]
        if runtime.stop is None and runtime.view.islands[IslandId(lost % 3)].alive:
            runtime.lose(lost % 3)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    pool = runtime.view.pool
    assert pool is not None and (pool.done, pool.under_way, pool.returned) == (4 * 6 * 3, 0, [])
    pushed = {(c.task.source, c.task.round, c.task.attempt) for c in runtime.said if isinstance(c, Push)}
    keys = [(commit.module, key) for commit in runtime.commits() for key in commit.keys]
    assert len(keys) == len(set(keys)), "a contribution counted twice"
    assert {(source, round_) for _, (round_, source) in keys} <= {(source, round_) for source, round_, _ in pushed}


def tasks_of(runtime: FakeRuntime, island: int, since: int = 0) -> list[Task]:
    return [c.task for c in runtime.said[since:] if isinstance(c, Run) and c.task.island == island]


def test_after_a_stall_an_island_is_not_expected_to_be_free_before_it_is() -> None:
    """A task ends 100 s late while another one is queued, and the next one comes behind that."""
    runtime = begun(Quorum(), save_every=0)
    source, first = runtime.view.sources[SourceId(0)], tasks_of(runtime, 0)[0]
    assert source.ahead == sum(task.steps for task in tasks_of(runtime, 0)) > first.steps
    report = replace(runtime.report(first), clock_s=float(first.steps))
    runtime.tell(Finished(now_s=100.0, report=report))
    assert source.ahead == sum(task.steps for task in tasks_of(runtime, 0)[1:])
    assert source.free_s == pytest.approx(100.0 + source.ahead)


def test_who_comes_back_begins_with_a_turn_that_it_can_train_in() -> None:
    """The turns under way are over at once for who begins them now; it has nothing yet that it could send."""
    runtime = begun(Quorum(grace=0.0), rounds=6, save_every=0)
    runtime.go(until=lambda: len(runtime.said) > 40)
    under_way = max(runtime.view.turn_ends_s)
    runtime.view.turn_ends_s = dict.fromkeys(range(under_way + 1), 0.0)
    runtime.lose(2)
    since = len(runtime.said)
    runtime.tell(Joined(now_s=runtime.now_s(), island=IslandId(2)))
    first = tasks_of(runtime, 2, since)[0]
    assert first.round == under_way + 1 and first.steps > 0 and len(first.install) == 2


# --- resumed ---


@pytest.mark.parametrize("kind", ["stopped", "killed"])
def test_resumed_in_the_middle_is_as_never_stopped(runs: Path, kind: str) -> None:
    settings = {
        **{**BASE, "rounds": 5, "layout": LAYOUTS["fragments"], "runtime": UNEQUAL, "merge": RDA()},
        "schedule": Quorum(),
        "checkpoint": Checkpoint(every=1, keep=9),
    }
    whole = launch(runs / "whole", **settings)
    if kind == "stopped":
        launch(runs / "run", **settings)
        for path in (runs / "run" / "checkpoints").iterdir():
            if path.name > "round-000002":
                shutil.rmtree(path)
    else:
        with at_event(95, die), pytest.raises(Broken):
            launch(runs / "run", **settings)
    again = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert digests(again) == digests(whole)
    same = ("tokens", "val_loss", "outer_steps", "contributions", "rounds")
    assert {key: again.summary[key] for key in same} == {key: whole.summary[key] for key in same}


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "told"), [({"quorum": 0}, "quorum=0"), ({"lag": 0}, "lag=0"), ({"grace": 1.0}, "grace=1.0")]
)
def test_settings_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Quorum(**settings)


def test_what_does_not_fit_the_run() -> None:
    with pytest.raises(ValueError, match=r"quorum=3 is more than islands=2"):
        Quorum(quorum=3).check(6, 2, 2)
    with pytest.raises(ValueError, match=r"lag=6 is not below inner_steps=6"):
        Quorum(lag=6).check(6, 2, 2)
    with pytest.raises(ValueError, match=r"not divisible"):
        Quorum().check(7, 2, 2)
