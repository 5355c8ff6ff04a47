"""The coordinator by events alone: no tensors, no processes, no clock."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from diloco import coordinator as module
from diloco import saved_view, seats
from diloco.events import (
    CommitAll,
    Finished,
    Interrupted,
    Joined,
    Lost,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Save,
    Saved,
    Tick,
)
from diloco.messages import EVALUATOR, IslandId, SourceId, Task, Turn
from diloco.schedule import Barrier
from tests.toy import FakeRuntime, make_view


def begun(**settings: Any) -> FakeRuntime:
    runtime = FakeRuntime(make_view(**settings))
    runtime.start()
    return runtime


def answer_until(runtime: FakeRuntime, kind: type, **which: int) -> Any:
    """Answer in the order of asking until a command of this kind is to be answered; returns it."""
    while True:
        for command in runtime.ready():
            task = command.task if isinstance(command, Run | Push) else None
            if isinstance(command, kind) and all(getattr(task, name) == value for name, value in which.items()):
                return command
        runtime.answer(runtime.ready()[0])


def finish_island(runtime: FakeRuntime, island: int, *, tasks: int) -> None:
    """An island does the next so many of its tasks; nobody else does anything."""
    for _ in range(tasks):
        mine = (c for c in runtime.ready() if isinstance(c, Run) and c.task.island == island)
        runtime.answer(next(mine))


def committed_steps(runtime: FakeRuntime, source: int) -> list[int]:
    """The steps of a source's data that are behind what was committed, in order of the rounds."""
    rounds = {commit.round for commit in runtime.commits() if source in commit.sources}
    tasks: dict[int, dict[int, Task]] = {}  # round -> segment -> the task given out last
    for task in runtime.tasks():
        if task.source == source and task.round in rounds:
            if task.segment == 0:
                tasks[task.round] = {}
            tasks[task.round][task.segment] = task
    return [
        step
        for round_ in sorted(tasks)
        for task in tasks[round_].values()
        for step in range(task.first_step, task.first_step + task.steps)
    ]


# --- a run without incidents ---


@pytest.mark.parametrize("seed", range(5))
def test_a_whole_run(seed: int) -> None:
    runtime = FakeRuntime(make_view(islands=3), seed=seed)
    runtime.start()
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert runtime.asked == []  # nothing is under way when it stops
    expected = [(round_, module, (0, 1, 2)) for round_ in range(3) for module in ("whole.0/0", "whole.1/0")]
    assert [(c.round, c.module, c.sources) for c in runtime.commits()] == expected
    for source in range(3):
        assert committed_steps(runtime, source) == list(range(18))
    counters = runtime.view.counters
    assert (counters.accepted, counters.rejected, counters.late) == (9, 0, 0)
    assert (counters.outer_steps, counters.inner_steps, counters.tokens) == (3, 54, 540)
    assert (counters.bytes_up, counters.bytes_down) == (9 * 200, 9 * 200)
    assert (counters.inner_s, counters.waiting_s) == (27.0, 13.5)


def test_two_commits_of_a_round_are_one_command() -> None:
    runtime = begun()
    runtime.go()
    steps = [c for c in runtime.said if isinstance(c, CommitAll)]
    assert [len(c.commits) for c in steps] == [2, 2, 2]


def test_a_round_is_committed_before_anything_of_the_next_is_given_out() -> None:
    runtime = FakeRuntime(make_view(islands=3), seed=4)
    runtime.start()
    runtime.go()
    done = 0
    for command in runtime.said:
        if isinstance(command, CommitAll):
            done += 1
        if isinstance(command, Run):
            assert command.task.round <= done
            if command.task.install:
                assert set(command.task.install.values()) == {done}
                assert set(command.wants) == set(command.task.modules.values())


def test_two_tasks_are_queued_so_that_no_island_waits_for_the_driver() -> None:
    runtime = begun(inner_steps=10)
    assert [(t.island, t.segment) for t in runtime.tasks()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    finish_island(runtime, 0, tasks=1)
    assert [(t.island, t.segment) for t in runtime.tasks()][4:] == [(0, 2)]
    finish_island(runtime, 0, tasks=3)
    assert [t.segment for t in runtime.tasks(0)] == [0, 1, 2, 3, 4]
    assert [t.segment for t in runtime.tasks(1)] == [0, 1]
    assert runtime.view.islands[IslandId(0)].queued == 1


@pytest.mark.parametrize(
    ("eval_every", "rounds", "expected"),
    [(1, 3, [0, 1, 2, 3]), (2, 5, [0, 2, 4, 5]), (0, 4, [0, 4]), (7, 3, [0, 3])],
)
def test_the_global_weights_are_evaluated_when_due(eval_every: int, rounds: int, expected: list[int]) -> None:
    runtime = begun(eval_every=eval_every, rounds=rounds)
    runtime.go()
    tasks = [c.task for c in runtime.said if isinstance(c, Run) and c.task.island == EVALUATOR]
    assert [task.round for task in tasks] == expected
    for task in tasks:
        assert (task.evaluate, task.steps, task.send, task.save) == ("validation", 0, (), False)
        assert task.install == {slot: task.round for slot in task.modules}  # that round's weights, whole
    assert sorted(record["round"] for record in runtime.logged("evaluation")) == expected
    counters = runtime.view.counters
    assert (counters.initial_val_loss, counters.val_loss) == (0.0, float(rounds))


def test_evaluation_holds_nobody() -> None:
    """All rounds are trained while the evaluator has not answered once; only the end waits for it."""
    runtime = begun()
    while ready := [c for c in runtime.ready() if not (isinstance(c, Run) and c.task.island == EVALUATOR)]:
        runtime.answer(ready[0])
    assert runtime.view.round == 3
    assert runtime.stop is None
    runtime.go()
    assert runtime.stop is not None


def test_the_statistics_of_every_step_are_asked_for_and_awaited() -> None:
    runtime = begun()
    runtime.go(Measure)
    assert runtime.stop is None
    assert len([c for c in runtime.asked if isinstance(c, Measure)]) == 3
    runtime.go()
    assert runtime.stop is not None


# --- checkpoints ---


@pytest.mark.parametrize(("save_every", "rounds", "expected"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (0, 3, [3])])
def test_checkpoints_are_due_every_so_many_rounds_and_at_the_end(
    save_every: int, rounds: int, expected: list[int]
) -> None:
    runtime = begun(save_every=save_every, rounds=rounds)
    runtime.go()
    saves = [c for c in runtime.said if isinstance(c, Save)]
    assert [c.name for c in saves] == [f"round-{r:06d}" for r in expected]
    assert [c.view["round"] for c in saves] == expected
    exported = {(task.island, task.round) for task in runtime.tasks() if task.save}
    assert exported == {(island, r - 1) for island in range(2) for r in expected}
    assert all(task.last for task in runtime.tasks() if task.save)  # at the step where the round ends
    assert [record["path"] for record in runtime.logged("checkpoint")] == [c.name for c in saves]


def test_a_checkpoint_is_asked_for_after_the_step_and_before_the_next_round() -> None:
    """The store is copied as it is after the commits; what the view says is of the same moment."""
    runtime = begun()
    runtime.go()
    kinds = [type(c).__name__ for c in runtime.said if isinstance(c, CommitAll | Save)]
    assert kinds == ["CommitAll", "Save"] * 3
    for save in [c for c in runtime.said if isinstance(c, Save)]:
        for source in save.view["sources"]:
            assert (source["round"], source["segment"]) == (save.view["round"], 0)
            assert source["position"] == 6 * save.view["round"]


def test_islands_train_on_while_a_checkpoint_is_written() -> None:
    runtime = begun(save_every=2)
    runtime.go(Save)
    assert runtime.view.round == 3
    assert [c.name for c in runtime.said if isinstance(c, Save)] == ["round-000002"]


def test_a_second_checkpoint_due_while_one_is_written_holds_the_islands() -> None:
    runtime = begun(save_every=1)
    runtime.go(Save)
    assert runtime.view.round == 2  # one ahead of what is being written, so that memory stays bounded
    assert [c.name for c in runtime.said if isinstance(c, Save)] == ["round-000001"]
    assert max(task.round for task in runtime.tasks()) == 1
    (save,) = runtime.asked
    commands = runtime.answer(save)
    assert [c.name for c in commands if isinstance(c, Save)] == ["round-000002"]
    assert {(c.task.island, c.task.round) for c in commands if isinstance(c, Run)} == {(0, 2), (1, 2)}
    second = next(c for c in commands if isinstance(c, Save))
    assert [source["position"] for source in second.view["sources"]] == [12, 12]  # not of what was just given out
    runtime.go()
    assert [c.name for c in runtime.said if isinstance(c, Save)][1:] == ["round-000002", "round-000003"]
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"


def test_a_checkpoint_that_fails_is_a_warning_and_the_run_goes_on() -> None:
    runtime = begun()
    save = answer_until(runtime, Save)
    runtime.asked.remove(save)
    runtime.tell(Saved(now_s=9.0, path="there/round-000001", seconds=1.0, error="no space left"))
    (warning,) = runtime.logged("warning")
    assert "there/round-000001" in warning["message"]
    assert "no space left" in warning["message"]
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [c.name for c in runtime.said if isinstance(c, Save)] == [f"round-{r:06d}" for r in (1, 2, 3)]


def test_the_record_of_a_checkpoint_has_the_round_that_it_holds() -> None:
    runtime = begun(save_every=2, rounds=3)
    runtime.go(Save)  # round 3 is through before the checkpoint of round 2 is written
    runtime.go()
    records = [(record["path"], record["round"]) for record in runtime.logged("checkpoint")]
    assert records == [("round-000002", 2), ("round-000003", 3)]


# --- interruption ---


@pytest.mark.parametrize("answered", range(0, 40, 3))
def test_an_interrupted_run_drains_exports_saves_and_stops(answered: int) -> None:
    runtime = begun(save_every=2, rounds=20)
    count = 0

    def enough() -> bool:
        nonlocal count
        count += 1
        return count > answered

    runtime.go(until=enough)
    given = len(runtime.tasks())
    runtime.tell(Interrupted(now_s=50.0))
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "interrupted"
    assert len(runtime.tasks()) == given  # nothing new was begun
    exports = [c for c in runtime.said if isinstance(c, Run) and c.task.save and c.task.steps == 0]
    assert [(c.task.island, c.task.send, c.wants) for c in exports] == [(0, (), {}), (1, (), {})]
    last_exported = max(i for i, c in enumerate(runtime.said) if c is exports[-1])
    assert [type(c) for c in runtime.said[last_exported:] if isinstance(c, Save)] == [Save]
    assert runtime.asked == []


@pytest.mark.parametrize("answered", range(0, 40, 3))
def test_what_was_interrupted_goes_on_as_if_it_never_was(answered: int) -> None:
    runtime = begun(islands=3, rounds=4)
    count = 0

    def enough() -> bool:
        nonlocal count
        count += 1
        return count > answered

    runtime.go(until=enough)
    runtime.tell(Interrupted(now_s=50.0))
    runtime.go()
    save = [c for c in runtime.said if isinstance(c, Save)][-1]

    resumed = FakeRuntime(taken_up(save.view, islands=3, rounds=4), seed=3)
    resumed.start()
    resumed.go()
    assert resumed.stop is not None
    assert resumed.stop.status == "finished"
    assert [c for c in runtime.commits() + resumed.commits()] == whole(islands=3, rounds=4).commits()
    for island in range(3):
        tasks = [(t.round, t.segment, t.first_step, t.steps) for t in runtime.tasks(island) + resumed.tasks(island)]
        assert tasks == [(r, s, 6 * r + 2 * s, 2) for r in range(4) for s in range(3)]
    assert resumed.view.counters == whole(islands=3, rounds=4).view.counters


def whole(**settings: Any) -> FakeRuntime:
    runtime = begun(**settings)
    runtime.go()
    return runtime


def taken_up(saved: Any, **settings: Any) -> Any:
    """A view that goes on from a checkpoint, which is JSON."""
    view = make_view(**settings)
    saved_view.load(view, json.loads(json.dumps(saved)))
    seats.place(view, len(view.islands))
    return view


def test_interrupted_while_a_checkpoint_holds_the_islands() -> None:
    runtime = begun()
    runtime.go(Save)
    runtime.tell(Interrupted(now_s=50.0))
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "interrupted"
    saves = [c for c in runtime.said if isinstance(c, Save)]
    assert saves[-1].view["round"] == 2


def test_interrupted_when_all_is_done_finishes() -> None:
    runtime = begun()
    runtime.go(Save)
    runtime.answer(runtime.asked[0])
    runtime.go(Save)
    runtime.tell(Interrupted(now_s=50.0))
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == ("finished" if runtime.view.round == 3 else "interrupted")


def test_an_interruption_that_cannot_save_says_so() -> None:
    runtime = begun(save_every=0)
    runtime.tell(Interrupted(now_s=50.0))
    runtime.go(Save)
    runtime.tell(Saved(now_s=9.0, path="there", seconds=1.0, error="no space left"))
    assert runtime.stop is not None
    assert runtime.stop.status == "interrupted"
    assert "no space left" in runtime.stop.reason


def test_interrupted_while_no_island_lives() -> None:
    runtime = begun()
    runtime.lose(0)
    runtime.lose(1)
    runtime.tell(Interrupted(now_s=50.0))
    for _ in range(5):
        runtime.go(Respawn)
        runtime.tell(Tick(now_s=51.0))
    assert runtime.stop is not None
    assert runtime.stop.status == "interrupted"


# --- islands that are lost and that join ---


def test_the_barrier_shrinks_to_the_rest() -> None:
    runtime = begun(islands=3)
    finish_island(runtime, 1, tasks=1)
    commands = runtime.lose(1)
    assert [c.island for c in commands if isinstance(c, Respawn)] == [1]
    runtime.go(Respawn)
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert {commit.sources for commit in runtime.commits()} == {(0, 2)}
    assert runtime.view.counters.islands_lost == 1
    (record,) = runtime.logged("lost")
    assert (record["island"], record["message"]) == (1, "gone")
    assert runtime.view.counters.tokens == 2 * 3 * 60


def test_the_round_ends_at_once_where_only_the_lost_one_was_awaited() -> None:
    runtime = begun()
    finish_island(runtime, 0, tasks=3)
    runtime.answer(answer_until(runtime, Push, island=0))
    assert runtime.commits() == []
    commands = runtime.lose(1)
    assert [commit.sources for c in commands if isinstance(c, CommitAll) for commit in c.commits] == [(0,), (0,)]


def test_what_was_lost_is_given_out_again_once() -> None:
    runtime = begun(islands=2, rounds=4)
    runtime.go(until=lambda: runtime.view.round == 1)
    finish_island(runtime, 1, tasks=2)  # four of the six steps of round 1
    runtime.lose(1)
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [commit.sources for commit in runtime.commits()[::2]] == [(0, 1), (0,), (0, 1), (0, 1)]
    assert committed_steps(runtime, 0) == list(range(24))
    assert committed_steps(runtime, 1) == list(range(18))  # no step of its data was left out or counted twice
    assert runtime.view.counters.tokens == 10 * (24 + 18)


def test_a_dropped_round_is_lost_with_the_island_whose_weights_hold_it() -> None:
    """It was never sent, so its data is given out again too; and its tokens count with what is sent in the end."""
    schedule = Barrier(drop_probability=0.5)

    def begun_with(seed: int) -> FakeRuntime:
        runtime = FakeRuntime(make_view(seed=seed, rounds=4), schedule)
        runtime.start()
        runtime.go(until=lambda: runtime.view.round == 2)
        return runtime

    def sends(runtime: FakeRuntime, island: int) -> list[bool]:
        return [bool(task.send) for task in runtime.tasks(island) if task.last]

    seed = next(s for s in range(1000) if sends(begun_with(s), 1) == [True, False] and sends(begun_with(s), 0)[1])
    runtime = begun_with(seed)
    assert runtime.view.counters.tokens == 180
    finish_island(runtime, 1, tasks=1)
    runtime.lose(1)
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.go(until=lambda: any(task.round == 3 for task in runtime.tasks(1)))
    first = next(task for task in runtime.tasks(1) if task.round == 3)
    assert (first.first_step, first.keep) == (6, 0.0)


def test_a_lost_island_is_fenced() -> None:
    """What it still sends is not counted, and its report gives nobody a task."""
    runtime = begun()
    first = next(c for c in runtime.asked if isinstance(c, Run) and c.task.island == 1)
    runtime.lose(1)
    commands = runtime.tell(Finished(now_s=5.0, report=runtime.report(first.task)))
    assert commands == []
    assert runtime.view.counters.inner_steps == 0


def test_an_island_is_lost_once() -> None:
    runtime = begun()
    runtime.lose(1)
    assert runtime.tell(Lost(now_s=5.0, island=IslandId(1), reason="again")) == []
    assert runtime.view.counters.islands_lost == 1


def test_an_island_that_comes_back_takes_part_from_the_next_round() -> None:
    runtime = begun(rounds=4)
    finish_island(runtime, 1, tasks=1)
    runtime.lose(1)
    commands = runtime.answer(answer_until(runtime, Respawn))
    assert [c for c in commands if isinstance(c, Run)] == []  # the round goes on without it
    runtime.go()
    assert [commit.sources for commit in runtime.commits()[::2]] == [(0,), (0, 1), (0, 1), (0, 1)]
    assert runtime.view.counters.islands_joined == 1
    assert runtime.view.counters.late == 0


@pytest.mark.parametrize("away", [1, 2, 3])
def test_an_island_that_was_away_for_rounds_takes_part_from_the_next_one(away: int) -> None:
    """It does not train the rounds that are over, whose contributions would come too late."""
    runtime = begun(rounds=6)
    finish_island(runtime, 1, tasks=1)
    runtime.lose(1)
    runtime.go(Respawn, until=lambda: runtime.view.round == away)
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    expected = [(0,)] * (away + 1) + [(0, 1)] * (5 - away)
    assert [commit.sources for commit in runtime.commits()[::2]] == expected
    assert runtime.view.counters.late == 0
    later = [task for task in runtime.tasks(1) if task.round > 0]
    assert [task.round for task in later] == [r for r in range(away + 1, 6) for _ in range(3)]
    assert [task.first_step for task in later] == list(range(0, 6 * (5 - away), 2))  # its data from the start
    assert runtime.view.counters.tokens == 60 * (6 + 5 - away)


def test_all_are_lost_and_one_comes_back() -> None:
    runtime = begun(islands=2, rounds=2)
    finish_island(runtime, 0, tasks=1)
    runtime.lose(0)
    runtime.lose(1)
    assert runtime.commits() == []  # a round that nobody took part in does not end
    assert runtime.view.round == 0
    joined = next(c for c in runtime.asked if isinstance(c, Respawn) and c.island == 1)
    commands = runtime.answer(joined)
    tasks = [c.task for c in commands if isinstance(c, Run)]
    assert [(t.island, t.round, t.first_step) for t in tasks] == [(1, 0, 0), (1, 0, 2)]
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [commit.sources for commit in runtime.commits()[::2]] == [(1,), (0, 1)]


def test_a_round_does_not_end_because_somebody_came_back_for_the_next() -> None:
    """One is lost and comes back, to take part from round 1 on; then the other one is lost: round 0 has nobody yet."""
    runtime = begun(rounds=2)
    runtime.lose(0)
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.lose(1)
    assert runtime.view.round == 0
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [commit.round for commit in runtime.commits()[::2]] == [0, 1]


def test_all_are_lost_after_one_was_heard() -> None:
    """What was heard counts, and the next round waits for whoever comes back."""
    runtime = begun(rounds=2)
    finish_island(runtime, 0, tasks=3)
    runtime.answer(answer_until(runtime, Push, island=0))
    runtime.lose(0)
    runtime.lose(1)
    assert [commit.sources for commit in runtime.commits()] == [(0,), (0,)]
    assert runtime.view.round == 1
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [commit.round for commit in runtime.commits()[::2]] == [0, 1]


def test_the_tokens_of_an_island_that_dies_after_it_was_heard_count() -> None:
    runtime = begun(rounds=1)
    finish_island(runtime, 0, tasks=3)
    runtime.answer(answer_until(runtime, Push, island=0))
    runtime.lose(0)
    runtime.go(Respawn)
    assert [commit.sources for commit in runtime.commits()] == [(0, 1), (0, 1)]
    assert runtime.view.counters.tokens == 120


def test_a_contribution_of_an_island_that_died_before_it_was_judged_does_not_count() -> None:
    runtime = begun(rounds=2)
    finish_island(runtime, 0, tasks=3)
    push = next(c for c in runtime.asked if isinstance(c, Push))
    runtime.lose(0)
    runtime.answer(push)
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    assert any("source 0" in record["message"] for record in runtime.logged("warning"))
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.go()
    assert [commit.sources for commit in runtime.commits()[::2]] == [(1,), (0, 1)]
    assert committed_steps(runtime, 0) == list(range(6))


def test_a_checkpoint_while_an_island_is_away_lets_it_take_part_after_a_resume() -> None:
    runtime = begun(rounds=5)
    finish_island(runtime, 1, tasks=1)
    runtime.lose(1)
    runtime.go(Respawn, until=lambda: runtime.view.round == 3)
    save = [c for c in runtime.said if isinstance(c, Save)][-1]
    resumed = FakeRuntime(taken_up(save.view, rounds=5))
    resumed.start()
    resumed.go()
    assert resumed.stop is not None
    assert resumed.stop.status == "finished"
    assert resumed.view.counters.late == 0
    assert resumed.commits()[-1].sources == (0, 1)
    assert resumed.tasks(1)[0].first_step == 0


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_and_when_every_step_counts_at_most_once_and_in_order(seed: int) -> None:
    """Islands are lost and come back at random; what was committed of a source's data is an unbroken beginning."""
    import random

    chance = random.Random(seed)
    runtime = FakeRuntime(make_view(islands=3, rounds=6), seed=seed)
    runtime.start()
    for _ in range(2000):
        if runtime.stop is not None:
            break
        alive = [i for i, island in runtime.view.islands.items() if island.alive]
        if alive and chance.random() < 0.04:
            runtime.lose(chance.choice(alive))
        elif ready := runtime.ready():
            runtime.answer(chance.choice(ready))
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    assert [commit.round for commit in runtime.commits()[::2]] == list(range(6))
    steps = [committed_steps(runtime, source) for source in range(3)]
    for source in range(3):
        assert steps[source] == list(range(len(steps[source])))
    assert runtime.view.counters.tokens == 10 * sum(map(len, steps))


def test_what_an_island_sent_before_it_died_is_not_taken_for_what_it_sends_after() -> None:
    """The lone island dies between sending and judgement, comes back, and trains the round again."""
    runtime = begun(islands=1, rounds=2)
    finish_island(runtime, 0, tasks=3)
    (old,) = [c for c in runtime.asked if isinstance(c, Push)]
    runtime.lose(0)
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    again = [task for task in runtime.tasks(0) if task.round == 0][3:]
    assert [task.first_step for task in again] == [0, 2]
    runtime.answer(old)
    assert runtime.commits() == []
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    runtime.go()
    assert [commit.sources for commit in runtime.commits()[::2]] == [(0,), (0,)]
    assert committed_steps(runtime, 0) == list(range(12))
    assert runtime.view.counters.tokens == 120


def test_a_barrier_that_stalls_says_who_has_not_arrived() -> None:
    runtime = begun(islands=3)
    for island in (0, 2):
        finish_island(runtime, island, tasks=3)
        runtime.answer(answer_until(runtime, Push, island=island))
    last_s = runtime.now_s()
    quiet = [runtime.tell(Tick(now_s=last_s + s)) for s in range(0, 60, 5)]
    assert not any(quiet)  # it is not said at once
    for s in range(60, 2000, 5):
        runtime.tell(Tick(now_s=last_s + s))
    messages = [record["message"] for record in runtime.logged("warning")]
    assert messages
    assert all("sources [1]" in message for message in messages)
    assert len(messages) < 10  # nor again and again
    waited = [int(re.search(r"(\d+) s", message)[1]) for message in messages]  # type: ignore[index]
    assert waited == sorted(waited)
    assert 60 <= waited[0] <= 300


# --- rejection ---


def test_a_rejected_contribution_counts_on_no_module() -> None:
    runtime = FakeRuntime(make_view(islands=3))
    runtime.bad = {(1, 1)}
    runtime.start()
    runtime.go()
    assert [commit.sources for commit in runtime.commits()] == [(0, 1, 2)] * 2 + [(0, 2)] * 2 + [(0, 1, 2)] * 2
    counters = runtime.view.counters
    assert (counters.accepted, counters.rejected, counters.late) == (8, 1, 0)
    assert counters.tokens == 10 * (54 - 6)
    (warning,) = runtime.logged("warning")
    assert all(part in warning["message"] for part in ("source 1", "round 1", "whole.1/0", "not finite"))


def test_the_sender_is_told_what_became_of_its_contribution() -> None:
    runtime = FakeRuntime(make_view())
    runtime.bad = {(1, 0)}
    runtime.start()
    runtime.go()
    for island, expected in ((0, [True, True]), (1, [False, True])):
        for task in runtime.tasks(island):
            told = [(s.round, s.fragment, s.accepted) for s in task.settled]  # again and again
            assert told == [(round_, 0, expected[round_]) for round_ in range(task.round)][-2:]
            assert task.fresh == (island == 1 and task.round == 1 and task.segment == 0)


def test_a_run_of_which_all_is_rejected_stops_with_the_reason() -> None:
    runtime = FakeRuntime(make_view())
    runtime.bad = {(0, 1), (1, 1)}
    runtime.start()
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "stopped"
    assert "all 2 contributions to round 1" in runtime.stop.reason
    assert [commit.round for commit in runtime.commits()] == [0, 0]
    assert runtime.tell(Tick(now_s=99.0)) == []  # it is over


def test_a_second_answer_of_the_store_does_not_count() -> None:
    runtime = begun(islands=3)
    finish_island(runtime, 0, tasks=3)
    push = answer_until(runtime, Push, island=0)
    runtime.answer(push)
    verdicts = runtime.verdicts(push.task)
    runtime.tell(Received(now_s=5.0, turn=Turn(source=SourceId(0), round=0, fragment=0), verdicts=verdicts))
    assert runtime.view.counters.rejected_by_reason == {"duplicate": 1}
    runtime.go()
    assert [commit.sources for commit in runtime.commits()[:2]] == [(0, 1, 2)] * 2
    assert runtime.view.counters.accepted == 9


# --- what a checkpoint keeps ---


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("answered", [0, 5, 11, 23, 31])
def test_a_view_survives_json(answered: int, drop: float) -> None:
    schedule = Barrier(drop_probability=drop)
    runtime = FakeRuntime(make_view(islands=3, rounds=4), schedule, seed=answered)
    runtime.start()
    count = 0

    def enough() -> bool:
        nonlocal count
        count += 1
        return count > answered

    runtime.go(until=enough)
    saved = saved_view.to_json(runtime.view)
    text = json.dumps(saved)
    view = make_view(islands=3, rounds=4)
    saved_view.load(view, json.loads(text))
    assert json.dumps(saved_view.to_json(view)) == text
    assert view.modules == runtime.view.modules
    assert view.sources == runtime.view.sources
    assert view.counters == runtime.view.counters


def test_a_saved_view_does_not_change_with_the_run() -> None:
    """It is written while the islands train on."""
    runtime = begun()
    save = answer_until(runtime, Save)
    text = json.dumps(save.view)
    runtime.go()
    assert json.dumps(save.view) == text


def test_rounds_begun_are_trained_again_from_their_start() -> None:
    runtime = begun(islands=2, rounds=3)
    runtime.go(until=lambda: runtime.view.round == 1)
    finish_island(runtime, 0, tasks=3)
    runtime.answer(answer_until(runtime, Push, island=0, round=1))
    view = taken_up(saved_view.to_json(runtime.view), islands=2, rounds=3)
    view.restart_rounds()
    resumed = FakeRuntime(view)
    resumed.start()
    resumed.go()
    assert [(c.round, c.sources) for c in resumed.commits()[::2]] == [(1, (0, 1)), (2, (0, 1))]
    for island in range(2):
        assert [t.first_step for t in resumed.tasks(island)] == [6, 8, 10, 12, 14, 16]
    assert resumed.view.counters.tokens == 3 * 2 * 60


@pytest.mark.parametrize("islands", [1, 3, 5])
def test_another_number_of_islands_takes_up_where_the_rounds_ended(islands: int) -> None:
    runtime = begun(islands=2, rounds=4)
    runtime.go(until=lambda: runtime.view.round == 2)
    save = [c for c in runtime.said if isinstance(c, Save)][-1]
    view = taken_up(save.view, islands=islands, rounds=4)
    view.restart_rounds()
    resumed = FakeRuntime(view)
    resumed.start()
    resumed.go()
    assert resumed.stop is not None
    assert resumed.stop.status == "finished"
    everyone = tuple(range(islands))
    assert [(c.round, c.sources) for c in resumed.commits()[::2]] == [(2, everyone), (3, everyone)]
    assert resumed.view.counters.late == 0
    for island in range(islands):
        assert [t.first_step for t in resumed.tasks(island)] == [12, 14, 16, 18, 20, 22]


# --- cost ---


def operations(runtime: FakeRuntime, command: Run) -> int:
    """How many bytecodes of the package one event takes."""
    package, count = str(Path(module.__file__).parent), 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        runtime.answer(command)
    finally:
        sys.settrace(before)
    return count


def test_the_cost_of_a_report_does_not_grow_with_the_islands() -> None:
    costs = []
    for islands in (4, 64):
        runtime = begun(islands=islands, inner_steps=20)
        runtime.answer(runtime.ready()[0])  # the evaluation
        commands = [c for c in runtime.ready() if isinstance(c, Run) and c.task.island == 0]
        costs.append(operations(runtime, commands[0]))
    assert costs[0] > 50  # it was measured
    assert costs[1] <= 1.2 * costs[0], costs


def test_the_time_of_events_is_passed_on_as_it_is() -> None:
    """There is no clock of its own: equal events give equal commands whatever the hour."""

    def commands(shift: float) -> Sequence[object]:
        runtime = FakeRuntime(make_view())
        runtime._now_s = shift
        runtime.start()
        runtime.go()
        return runtime.said

    early, late = commands(0.0), commands(1e6)
    assert [c for c in early if not isinstance(c, Joined)] == [c for c in late if not isinstance(c, Joined)]


def test_rounds_of_tasks_never_go_back() -> None:
    runtime = FakeRuntime(make_view(islands=3), seed=9)
    runtime.start()
    runtime.go()
    for island in range(3):
        assert all(a.round <= b.round for a, b in pairwise(runtime.tasks(island)))
