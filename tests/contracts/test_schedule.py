"""What every Schedule keeps: one row of ROWS for each; and what a Barrier does."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.events import Finished, Run
from diloco.messages import IslandId, ModuleKey, SourceId, Task
from diloco.schedule import Barrier, NoMore, Schedule, Wait
from tests.toy import FakeRuntime, make_view


@dataclass(frozen=True)
class Row:
    schedule: Schedule
    every_island_sends: bool  # in every round


ROWS = {"barrier": Row(Barrier(), True), "barrier_dropping": Row(Barrier(drop_probability=0.3), False)}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def finished(schedule: Schedule, *, seed: int = 0, **settings: object) -> FakeRuntime:
    runtime = FakeRuntime(make_view(**settings), schedule, seed=seed)
    runtime.start()
    runtime.go()
    assert runtime.stop is not None
    assert runtime.stop.status == "finished"
    return runtime


def by_round(runtime: FakeRuntime, island: int) -> list[list[Task]]:
    rounds: dict[int, list[Task]] = {}
    for task in runtime.tasks(island):
        rounds.setdefault(task.round, []).append(task)
    assert list(rounds) == sorted(rounds)
    return list(rounds.values())


class Checked(Schedule):
    """Asks another schedule twice, and looks whether that wrote anything."""

    def __init__(self, inner: Schedule) -> None:
        self.inner = inner

    def next_task(self, island, run, now_s):  # type: ignore[no-untyped-def]
        before = copy.deepcopy((island, run))
        answers = [self.inner.next_task(island, run, now_s) for _ in range(2)]
        assert (island, run) == before
        assert answers[0] == answers[1]
        return answers[0]

    def commits(self, run, touched, now_s):  # type: ignore[no-untyped-def]
        before = copy.deepcopy((run, list(touched)))
        answers = [self.inner.commits(run, touched, now_s) for _ in range(2)]
        assert (run, list(touched)) == before
        assert answers[0] == answers[1]
        return answers[0]


@pytest.mark.parametrize("seed", range(3))
def test_it_writes_nothing_and_answers_the_same(row: Row, seed: int) -> None:
    runtime = finished(Checked(row.schedule), seed=seed, islands=3, rounds=4)
    assert runtime.view.round == 4


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@given(inner_steps=st.integers(1, 12), segment_steps=st.integers(0, 14), islands=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_segments_cover_each_round_exactly(row: Row, inner_steps: int, segment_steps: int, islands: int) -> None:
    runtime = finished(row.schedule, islands=islands, rounds=3, inner_steps=inner_steps, segment_steps=segment_steps)
    for island in range(islands):
        rounds = by_round(runtime, island)
        assert len(rounds) == 3
        position = 0
        for number, tasks in enumerate(rounds):
            assert [task.segment for task in tasks] == list(range(len(tasks)))
            for task in tasks:
                assert (task.round, task.first_step) == (number, position)  # no step is left out or taken twice
                assert 1 <= task.steps <= (segment_steps or inner_steps)
                position += task.steps
            assert position == (number + 1) * inner_steps
            assert [bool(task.install) for task in tasks] == [True] + [False] * (len(tasks) - 1)
            assert [task.last for task in tasks] == [False] * (len(tasks) - 1) + [True]
            assert not any(task.send for task in tasks[:-1])
            if row.every_island_sends:
                assert set(tasks[-1].send) == set(tasks[-1].modules)


def test_each_round_installs_what_the_last_one_gave(row: Row) -> None:
    runtime = finished(row.schedule, islands=3, rounds=5)
    steps_before = [len({c.round for c in runtime.commits() if c.round < number}) for number in range(5)]
    for island in range(3):
        for number, tasks in enumerate(by_round(runtime, island)):
            assert tasks[0].install == {slot: steps_before[number] for slot in tasks[0].modules}


def test_cutting_changes_nothing_but_the_number_of_tasks(row: Row) -> None:
    whole, cut = (finished(row.schedule, islands=3, rounds=6, segment_steps=s) for s in (0, 1))
    assert whole.commits() == cut.commits()
    assert len(cut.tasks()) == 6 * len(whole.tasks())


def test_commits_are_in_order_of_source_with_the_examples_behind_each(row: Row) -> None:
    runtime = finished(row.schedule, islands=4, rounds=6, seed=5)
    assert runtime.commits()
    for commit in runtime.commits():
        assert list(commit.sources) == sorted(commit.sources)
        assert commit.weights == tuple(10.0 * (source + 1) for source in commit.sources)
        assert commit.scale == 1.0
    if row.every_island_sends:
        assert all(commit.sources == (0, 1, 2, 3) for commit in runtime.commits())


def test_both_modules_hear_of_the_same_sources(row: Row) -> None:
    runtime = finished(row.schedule, islands=4, rounds=6)
    sources: dict[ModuleKey, list[tuple[int, tuple[SourceId, ...]]]] = {}
    for commit in runtime.commits():
        sources.setdefault(commit.module, []).append((commit.round, commit.sources))
    first, second = sources.values()
    assert first == second


def test_nobody_goes_ahead_of_the_round(row: Row) -> None:
    """An island that is through waits until all are, and after the last round there is no more."""
    runtime = FakeRuntime(make_view(segment_steps=0), row.schedule)
    runtime.start()
    slow = [c for c in runtime.asked if isinstance(c, Run) and c.task.island == 1]
    while fast := [c for c in runtime.ready() if c not in slow]:
        runtime.answer(fast[0])
    assert [task.round for task in runtime.tasks(0)] == [0]
    assert runtime.commits() == []
    island = runtime.view.islands[IslandId(0)]
    assert isinstance(row.schedule.next_task(island, runtime.view, 0.0), Wait)
    runtime.go()
    assert row.schedule.next_task(island, runtime.view, 0.0) == NoMore()


# --- Barrier ---


def dropped(probability: float, *, seed: int = 0, rounds: int = 40) -> list[tuple[int, int]]:
    """(round, source) of what was not sent, over ten islands."""
    schedule = Barrier(drop_probability=probability)
    runtime = finished(schedule, islands=10, rounds=rounds, seed=seed, eval_every=0, save_every=0, segment_steps=0)
    return sorted((task.round, task.source) for task in runtime.tasks() if not task.send)


@pytest.mark.parametrize(
    ("probability", "least", "most"), [(0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130), (0.5, 165, 235)]
)
def test_drops_are_about_as_frequent_as_asked(probability: float, least: int, most: int) -> None:
    # 400 tries: at 0.25 three standard deviations are 26, at 0.5 they are 30
    assert least <= len(dropped(probability)) <= most


def test_drops_are_the_same_in_every_run_whatever_the_order() -> None:
    assert dropped(0.3, seed=1) == dropped(0.3, seed=2)


def test_drops_differ_between_seeds_of_the_run_sources_and_rounds() -> None:
    first = dropped(0.5)
    assert len({source for _, source in first}) == 10
    assert len({round_ for round_, _ in first}) > 30
    view = make_view(islands=10, rounds=40, seed=1, eval_every=0, save_every=0, segment_steps=0)
    other = FakeRuntime(view, Barrier(drop_probability=0.5))
    other.start()
    other.go()
    assert first != sorted((task.round, task.source) for task in other.tasks() if not task.send)


def test_a_dropped_island_keeps_its_weights_and_takes_the_new_anchor() -> None:
    runtime = finished(Barrier(drop_probability=0.5), islands=4, rounds=12)
    seen = set()
    for island in range(4):
        rounds = by_round(runtime, island)
        for before, after in zip(rounds, rounds[1:], strict=False):
            was_dropped = not before[-1].send
            assert after[0].keep == (1.0 if was_dropped else 0.0)
            assert set(after[0].install) == set(after[0].modules)
            seen.add(was_dropped)
        assert rounds[0][0].keep == 0.0
    assert seen == {True, False}


def test_a_round_of_which_all_were_dropped_takes_no_step() -> None:
    runtime = finished(Barrier(drop_probability=1.0), islands=2, rounds=3)
    assert runtime.commits() == []
    assert runtime.view.round == 3
    assert {module.version for module in runtime.view.modules.values()} == {0}
    assert runtime.view.counters.tokens == 0  # only what was committed counts


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"schedule\.drop_probability"):
        Barrier(drop_probability=probability)


def test_a_report_of_an_island_says_which_task_it_is_of() -> None:
    """What the coordinator is told suffices: no answer depends on anything else."""
    runtime = FakeRuntime(make_view())
    first = next(c for c in runtime.start() if isinstance(c, Run) and c.task.steps)
    report = runtime.report(first.task)
    assert Finished(now_s=1.0, report=report).report.task is first.task
