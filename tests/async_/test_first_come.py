"""Contributions as they come: a barrier where all wait, exact by the virtual clock, every step of data once."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diloco import Result
from diloco.async_.outer import DelayedNesterov
from diloco.async_.schedule import FirstCome
from diloco.async_.speed import steps_by_speed
from diloco.checkpoint import Checkpoint, CheckpointFolder
from diloco.codec import Int4
from diloco.events import Push, Run
from diloco.inner import AdamW
from diloco.messages import IslandId, Task
from diloco.outer import Nesterov
from diloco.pool import Pool, Stretch
from diloco.runtime.local import Local, LocalBackend
from diloco.schedule import Barrier
from tests.resume.test_resume_local import Broken, at_event, die
from tests.toy import Constant, FakeRuntime, Line, digests, launch, make_view, records

ALL = math.inf  # grace: until everybody is there
BASE: dict[str, Any] = {
    "workload": Line(blocks=1),
    "inner": AdamW(lr=0.01),
    "islands": 4,
    "inner_steps": 6,
    "segment_steps": 4,
    "rounds": 3,
}
SPEEDS = [1.0, 2.0, 3.0, 6.0]  # seconds a step


def commits(directory: Path) -> list[tuple[float, int, int, int]]:
    """(time, island, version, staleness) of each outer step."""
    return [
        (r["clock_s"], r["outer/contributors"][0], int(r["outer/version"]), r["outer/stalenesses"][0])
        for r in records(directory, "commit")
    ]


# --- where all wait for each other it is the synchronous method ---


def test_a_batch_of_all_islands_is_a_barrier_bit_for_bit(tmp_path: Path) -> None:
    expected = launch(tmp_path / "barrier", **BASE)
    schedule = FirstCome(batch=4, grace_s=ALL, draw=False)
    found = launch(tmp_path / "found", **BASE, schedule=schedule, runtime=Local(seconds_per_step=SPEEDS))
    assert digests(found) == digests(expected)
    same = ("tokens", "bytes_up", "bytes_down", "outer_steps", "contributions", "val_loss", "best_val_loss")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}


def test_delayed_nesterov_with_all_from_the_same_weights_is_synchronous(tmp_path: Path) -> None:
    expected = launch(tmp_path / "barrier", **BASE, outer=Nesterov(lr=0.5, momentum=0.8))
    schedule = FirstCome(grace_s=ALL, draw=False)
    found = launch(tmp_path / "found", **BASE, outer=DelayedNesterov(lr=0.5, momentum=0.8), schedule=schedule)
    assert found.summary["outer_steps"] == 12
    for name in ("val_loss", "best_val_loss"):
        assert found.summary[name] == pytest.approx(expected.summary[name], abs=1e-6)


# --- the virtual clock ---


def test_the_timeline_of_four_speeds(tmp_path: Path) -> None:
    """Rounds of six steps, without grace; islands that end together are heard in the order in which they began."""
    schedule = FirstCome(draw=False)
    found = launch(tmp_path / "run", **BASE, schedule=schedule, runtime=Local(seconds_per_step=SPEEDS))
    assert commits(found.directory) == [
        (6.0, 0, 1, 0),
        (12.0, 1, 2, 1),
        (12.0, 0, 3, 1),
        (18.0, 2, 4, 3),
        (18.0, 0, 5, 1),
        (24.0, 1, 6, 3),
        (24.0, 0, 7, 1),
        (30.0, 0, 8, 0),
        (36.0, 3, 9, 8),
        (36.0, 2, 10, 5),
        (36.0, 1, 11, 4),
        (36.0, 0, 12, 3),
    ]


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = [launch(tmp_path / name, **BASE, **unequal()) for name in "ab"]
    assert digests(runs[0]) == digests(runs[1])
    assert commits(runs[0].directory) == commits(runs[1].directory)


def unequal(**settings: Any) -> dict[str, Any]:
    """Delayed Nesterov, fewer steps on slow islands, grace, a drawn shard: all at once."""
    schedule = FirstCome(**{"by_speed": True, "grace_s": 1.0, **settings})
    return {"schedule": schedule, "outer": DelayedNesterov(), "runtime": Local(seconds_per_step=[1.0, 1.2, 2.5, 6.5])}


# --- grace ---


def test_who_arrives_within_the_grace_goes_on_from_the_same_weights(tmp_path: Path) -> None:
    settings = {**BASE, "islands": 3, "rounds": 2, "runtime": Local(seconds_per_step=[1.0, 1.1, 1.5])}
    found = launch(tmp_path / "run", **settings, schedule=FirstCome(grace_s=1.0, draw=False))
    # 0 and 1 end at 6 and 6.6 and begin again at 7 from version 2; 2 ends at 9, in no one's company, and begins at 10.
    assert [(round(t, 6), *rest) for t, *rest in commits(found.directory)] == [
        (6.0, 0, 1, 0),
        (6.6, 1, 2, 1),
        (9.0, 2, 3, 2),
        (13.0, 0, 4, 1),
        (13.6, 1, 5, 2),
        (19.0, 2, 6, 2),
    ]


def test_the_outer_step_waits_for_nobody(tmp_path: Path) -> None:
    found = launch(tmp_path / "run", **BASE, schedule=FirstCome(grace_s=3.0), runtime=Local(seconds_per_step=SPEEDS))
    assert commits(found.directory)[0][:3] == (6.0, 0, 1)


# --- dynamic steps ---


@pytest.mark.parametrize(("speed", "steps"), [(1.0, 20), (0.9, 18), (0.5, 10), (0.2, 4), (0.01, 1), (0.24, 4)])
def test_steps_are_in_proportion_to_speed_and_never_none(speed: float, steps: int) -> None:
    assert steps_by_speed(speed, 1.0, 20) == steps


def test_equal_speeds_take_the_same_steps(tmp_path: Path) -> None:
    found = launch(tmp_path / "run", **BASE, schedule=FirstCome(by_speed=True))
    ends = Counter(r["outer/contributors"][0] for r in records(found.directory, "commit"))
    assert ends == {0: 3, 1: 3, 2: 3, 3: 3}


def test_given_speeds_count_from_the_first_round_and_measured_ones_from_the_second(tmp_path: Path) -> None:
    for name, speeds, first in (("given", [6.0, 3.0, 2.0, 1.0], 1), ("measured", [], 6)):
        schedule = FirstCome(by_speed=True, speeds=speeds, draw=False)
        found = launch(tmp_path / name, **BASE, schedule=schedule, runtime=Local(seconds_per_step=SPEEDS))
        steps = [r["step"] for r in records(found.directory, "segment") if r["island"] == 3 and r["round"] == 0]
        assert steps[-1] == first


def test_one_slow_round_changes_nothing(tmp_path: Path) -> None:
    runtime = begun(FirstCome(by_speed=True, draw=False), islands=2, rounds=8)
    paces = iter([1.0] * 5 + [50.0] + [1.0] * 40)
    original = runtime.report

    def report(task: Task) -> Any:
        from dataclasses import replace

        return replace(original(task), clock_s=task.steps * (next(paces) if task.island == 1 else 1.0))

    runtime.report = report  # type: ignore[method-assign]
    runtime.go()
    assert {task.round_steps for task in runtime.tasks()} == {6}


def test_who_falls_out_of_the_grace_comes_back_to_the_others(tmp_path: Path) -> None:
    """Told to be as fast as the others, but a tenth slower: 0.6 s late in the first round, with 0.2 s of grace.

    The others begin again at 6.2 and end at 12.2; it begins at 6.8 and takes 5 steps, up to 12.3, when all go on.
    """
    settings = {**BASE, "islands": 3, "rounds": 4, "runtime": Local(seconds_per_step=[1.0, 1.0, 1.1])}
    schedule = FirstCome(by_speed=True, speeds=[1.0, 1.0, 1.0], grace_s=0.2, draw=False)
    found = launch(tmp_path / "run", **settings, schedule=schedule)
    arrivals = [(round(at_s, 6), source) for at_s, source, *_ in commits(found.directory)]
    assert arrivals[:6] == [(6.0, 0), (6.0, 1), (6.6, 2), (12.2, 0), (12.2, 1), (12.3, 2)]
    assert arrivals[6:9] == [(17.8, 2), (18.3, 0), (18.3, 1)]  # 0.5 s early now: 5 steps are 5.5 s


# --- staleness ---


def test_damping_follows_staleness(tmp_path: Path) -> None:
    settings = {**BASE, "runtime": Local(seconds_per_step=SPEEDS), "schedule": FirstCome(damping=0.5)}
    found = records(launch(tmp_path / "run", **settings).directory, "commit")
    assert len({r["outer/stalenesses"][0] for r in found}) > 3
    for r in found:
        assert r["outer/scale"] == pytest.approx((1 + r["outer/stalenesses"][0]) ** -0.5)


def test_what_is_too_old_is_refused_and_its_data_trained_on_again(tmp_path: Path) -> None:
    schedule = FirstCome(max_staleness=4, draw=False)
    settings = {**BASE, "rounds": 4, "runtime": Local(seconds_per_step=[1.0, 1.0, 1.0, 5.0])}
    found = launch(tmp_path / "run", **settings, schedule=schedule)
    assert found.summary["contributions"]["stale"] == len(records(found.directory, "stale")) > 0
    assert max(r["outer/stalenesses"][0] for r in records(found.directory, "commit")) <= 4
    assert found.summary["tokens"] == launch(tmp_path / "all", **{**settings, "rounds": 4}).summary["tokens"]


# --- data ---


def begun(schedule: FirstCome, *, islands: int = 3, seed: int = 0, **settings: Any) -> FakeRuntime:
    view = make_view(islands=islands, **settings)
    view.pool = view.new_pool(schedule.drawn)
    for module in view.modules.values():
        module.awaited.clear()
    runtime = FakeRuntime(view, schedule, seed=seed)
    runtime.start()
    return runtime


def committed(runtime: FakeRuntime) -> Counter[tuple[int, int]]:
    """(shard, step) of all that was trained on for contributions that count."""
    trained: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for task in runtime.tasks():
        steps = [(int(task.shard), task.first_step + step) for step in range(task.steps)]
        trained.setdefault((task.source, task.round, task.attempt), []).extend(steps)
    pushed = {(c.task.source, c.task.round): c.task.attempt for c in runtime.said if isinstance(c, Push)}
    found: Counter[tuple[int, int]] = Counter()
    for keys in {commit.keys for commit in runtime.commits()}:
        for round_, source in keys:
            found.update(trained[source, round_, pushed[source, round_]])
    return found


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("draw", [False, True])
def test_every_step_counts_once_whoever_is_lost(seed: int, draw: bool) -> None:
    runtime = begun(FirstCome(draw=draw, batch=1 + seed % 3), seed=seed, rounds=4, save_every=seed % 2)
    for lost in range(4):
        runtime.go(until=lambda limit=9 * (lost + 1): len(runtime.said) > limit)  # type: ignore[misc]
        if runtime.stop is None and runtime.view.islands[IslandId(lost % 3)].alive:
            runtime.lose(lost % 3)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    found = committed(runtime)
    assert set(found.values()) == {1}
    assert len(found) == 4 * 6 * 3 == runtime.view.pool.done  # type: ignore[union-attr]
    for shard in range(3):  # without holes
        steps = sorted(step for of, step in found if of == shard)
        assert steps == list(range(len(steps)))


def test_shards_are_drawn_by_their_sizes() -> None:
    examples = [100, 200, 700]
    pool = Pool.starting(True, shards=3, steps=2000, done=0)
    for _ in range(400):
        stretch = pool.next(own=0, steps=10, examples=examples, seed=1)  # type: ignore[arg-type]
        assert stretch is not None
        pool.give(stretch)
    shares = [position / 4000 for position in pool.positions]
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.005)


def test_what_comes_back_is_given_out_first_also_in_parts() -> None:
    pool = Pool.starting(False, shards=2, steps=20, done=0)
    first = pool.next(own=1, steps=8, examples=[1, 1], seed=0)  # type: ignore[arg-type]
    assert first == Stretch(shard=1, first_step=0, steps=8)  # type: ignore[arg-type]
    pool.give(first)
    pool.give_back(first)
    for expected in ((0, 3), (3, 3), (6, 2)):
        part = pool.next(own=0, steps=3, examples=[1, 1], seed=0)  # type: ignore[arg-type]
        assert part is not None and (part.shard, part.first_step, part.steps) == (1, *expected)
        pool.give(part)
    assert (pool.left, pool.under_way, pool.returned) == (32, 8, [])


def test_no_island_ever_waits_for_a_task_when_there_is_work() -> None:
    runtime = begun(FirstCome(), islands=3, rounds=3)
    asked = [c.task.island for c in runtime.said if isinstance(c, Run)]
    assert {0, 1, 2} <= set(asked)


# --- resumed ---


RESUMED: dict[str, dict[str, Any]] = {
    "all at once": unequal(),
    "buffered": unequal(batch=3, by_speed=False, grace_s=0.0),
    "coded": {**unequal(), "codec": Int4(block=8, error_feedback=True), "codec_down": Int4(block=8)},
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("round_", [1, 2])
def test_resumed_in_the_middle_is_as_never_stopped(runs: Path, kind: str, round_: int) -> None:
    settings = {**BASE, "rounds": 4, **RESUMED[kind], "checkpoint": Checkpoint(every=1, keep=9)}
    whole = launch(runs / "run", **settings)
    folder = runs / "run" / "checkpoints"
    assert CheckpointFolder(str(folder)).names() == [f"round-{r:06d}" for r in range(1, 5)]
    for path in folder.iterdir():
        if path.name > f"round-{round_:06d}":
            shutil.rmtree(path)
    before = commits(runs / "run")
    again = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert_alike(again, whole)
    assert commits(runs / "run") == before


@pytest.mark.parametrize("event", [45, 60, 75, 90])
def test_killed_at_any_moment_is_as_never_stopped(runs: Path, event: int) -> None:
    settings = {**BASE, "rounds": 4, **unequal(), "checkpoint": Checkpoint(every=1, keep=9)}
    whole = launch(runs / "whole", **settings)
    with at_event(event, die), pytest.raises(Broken):
        launch(runs / "run", **settings)
    again = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert_alike(again, whole)


@pytest.mark.parametrize("event", [2, 9, 23, 40])
def test_interrupted_anywhere_loses_nothing(runs: Path, event: int) -> None:
    """Where the islands stop is where they go on, so it is not the run that was never stopped; but all data counts."""
    settings = {**BASE, "rounds": 4, **unequal()}
    whole = launch(runs / "whole", **settings)
    with at_event(event, LocalBackend.interrupt):
        first = launch(runs / "run", **settings)
    assert first.summary["status"] == "interrupted"
    again = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert again.summary["status"] == "finished"
    assert again.summary["tokens"] == whole.summary["tokens"]


def test_what_was_told_before_an_interruption_stays(runs: Path) -> None:
    unlike = Constant(gradients=[1.0, 2.0, 3.0, 4.0])  # shards of unlike sizes: who draws a small one is back
    settings = {**BASE, "workload": unlike, "rounds": 4, "seed": 2, **unequal()}
    with at_event(66, LocalBackend.interrupt):
        launch(runs / "run", **settings)
    before = [record["steps"] for record in records(runs / "run", "segment")]
    launch(runs / "run", **settings, resume=str(runs / "run"))
    after = [record["steps"] for record in records(runs / "run", "segment")]
    assert after[: len(before)] == before and sum(after) == 4 * 6 * 4  # each once


def test_with_another_number_of_islands_the_rest_is_shared_out_anew(runs: Path) -> None:
    settings = {**BASE, "rounds": 4, **unequal(), "checkpoint": Checkpoint(every=1, keep=9)}
    launch(runs / "run", **settings)
    for path in (runs / "run" / "checkpoints").iterdir():
        if path.name > "round-000002":
            shutil.rmtree(path)
    more = {"islands": 5, "runtime": Local(seconds_per_step=[1.0, 1.2, 2.5, 6.5, 1.0])}
    again = launch(runs / "run", **{**settings, **more}, resume=str(runs / "run"))
    assert again.summary["status"] == "finished"
    assert records(runs / "run", "commit")[-1]["round"] == 4


def assert_alike(found: Result, expected: Result) -> None:
    assert digests(found) == digests(expected)
    same = ("tokens", "val_loss", "best_val_loss", "outer_steps", "contributions", "bytes_up", "rounds")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"grace_s": -1.0}, "grace_s=-1.0"),
        ({"batch": 0}, "batch=0"),
        ({"damping": -0.5}, "damping=-0.5"),
        ({"max_staleness": -2}, "max_staleness=-2"),
        ({"by_speed": True, "speeds": [1.0, 0.0]}, r"speeds=\[1.0, 0.0\]"),
        ({"speeds": [1.0, 2.0]}, "by_speed=true"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FirstCome(**settings)


def test_a_speed_for_each_island() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 islands"):
        FirstCome(by_speed=True, speeds=[1.0, 2.0]).check(10, 1, 3)
    Barrier().check(10, 1, 3)
