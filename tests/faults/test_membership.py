"""Islands that come and go, by events alone, and the deadlines that follow from measured times."""

from __future__ import annotations

import pytest

from diloco.events import Committed, Joined, Leaving, Log, Lost, Respawn, Run, Started
from diloco.messages import CommitStats, IslandId, ModuleKey, SourceId
from diloco.patience import HICCUP_S, Pulse, most_s
from diloco.schedule import Barrier
from tests.toy import FakeRuntime, make_view

ZERO, ONE, TWO = map(IslandId, range(3))


def begun(absent: frozenset[IslandId] = frozenset(), **settings: object) -> FakeRuntime:
    given = {"islands": 3, "rounds": 5, "eval_every": 0, "save_every": 0}
    runtime = FakeRuntime(make_view(**{**given, **settings}), Barrier())  # type: ignore[arg-type]
    runtime.tell(Started(now_s=0.0, absent=absent))
    return runtime


def contributors(runtime: FakeRuntime) -> list[tuple[int, ...]]:
    return [commit.sources for commit in runtime.commits() if commit.module == "whole.0/0"]


# --- islands ---


def test_a_run_begins_with_those_that_are_there_and_takes_in_a_late_one_from_the_next_round() -> None:
    """The joiner counts nothing until its first contribution; it pulls all of the weights."""
    runtime = begun(absent=frozenset({TWO}))
    runtime.go(until=lambda: runtime.view.round == 2)
    assert contributors(runtime) == [(0, 1)] * 2
    assert not runtime.tasks(2)
    assert runtime.view.counters.islands_lost == 0  # it was never there
    assert not [c for c in runtime.said if isinstance(c, Respawn)]  # the runtime is waiting for it anyway
    runtime.tell(Joined(now_s=runtime.now_s(), island=TWO))
    runtime.go()
    assert contributors(runtime)[2:] == [(0, 1), (0, 1, 2), (0, 1, 2)]
    first = next(c for c in runtime.said if isinstance(c, Run) and c.task.island == TWO)
    assert (first.task.round, set(first.wants.values())) == (3, {None})
    assert runtime.view.counters.tokens == 10 * 6 * (2 * 3 + 3 * 2)


def test_with_too_few_islands_no_outer_step_is_taken() -> None:
    runtime = begun(min_islands=2, islands=2, rounds=4)
    runtime.go(until=lambda: runtime.view.round == 1)
    runtime.lose(1)
    runtime.go(Respawn)
    assert runtime.view.round == 1
    assert len(contributors(runtime)) == 1
    assert runtime.coordinator.wake_s() is None  # nothing is late
    (respawn,) = [c for c in runtime.asked if isinstance(c, Respawn)]
    runtime.answer(respawn)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    assert contributors(runtime) == [(0, 1), (0,), (0, 1), (0, 1)]  # what was finished meanwhile counted


def test_an_island_whose_node_leaves_ends_its_round_and_begins_no_other() -> None:
    runtime = begun(rounds=3)
    runtime.go(until=lambda: len(runtime.tasks(2)) == 2)
    assert runtime.tell(Leaving(now_s=runtime.now_s(), island=TWO))
    assert runtime.tell(Leaving(now_s=runtime.now_s(), island=TWO)) == []  # said once
    runtime.go(Respawn, until=lambda: any(isinstance(c, Respawn) for c in runtime.said))
    assert [task.round for task in runtime.tasks(2)] == [0, 0, 0]  # all of its round
    runtime.go(Respawn)
    assert contributors(runtime)[0] == (0, 1, 2)  # nothing of it was lost
    assert contributors(runtime)[1:] == [(0, 1)] * 2
    assert (runtime.view.counters.islands_lost, runtime.view.counters.late) == (1, 0)


def test_an_island_that_dies_before_its_node_has_left_is_lost_once() -> None:
    runtime = begun(rounds=3)
    runtime.go(until=lambda: len(runtime.tasks(2)) == 2)
    runtime.tell(Leaving(now_s=runtime.now_s(), island=TWO))
    runtime.lose(2)
    assert runtime.tell(Lost(now_s=runtime.now_s(), island=TWO, reason="again")) == []
    runtime.go()
    assert runtime.view.counters.islands_lost == 1
    assert runtime.stop is not None and runtime.stop.status == "finished"


def test_an_island_that_lives_without_contributing_is_told_of() -> None:
    """Alive and contributing are not the same: once, after three outer steps without it."""
    runtime = begun(rounds=9)

    def step(round_: int, *sources: int) -> list[str]:
        stats = CommitStats(
            module=ModuleKey("whole.0/0"),
            round=round_,
            version=round_ + 1,
            update_square=1.0,
            sources=tuple(map(SourceId, sources)),
            weights=(1.0,) * len(sources),
            gram=((1.0,),),
            rounds=(round_,) * len(sources),
            staleness=(0,) * len(sources),
            scale=1.0,
        )
        said = runtime.tell(Committed(now_s=runtime.now_s(), stats=(stats,)))
        return [str(c.record["message"]) for c in said if isinstance(c, Log) and c.record["event"] == "warning"]

    assert step(0, 0, 1, 2) == step(1, 0, 1) == step(2, 0, 1, 2) == step(3, 0, 1) == step(4, 0, 1) == []
    assert step(5, 0, 1) == ["of 3 islands alive, source 2 has had no part in the last 3 outer steps"]
    assert step(6, 0, 1) == []
    runtime.lose(2)
    assert step(7, 0, 1) == []


# --- deadlines ---


@pytest.mark.parametrize(
    ("seen", "patience", "limit_s"),
    [
        ([], 10.0, None),
        ([5.0, 5.0], 10.0, None),  # too little
        ([5.0, 5.0, 5.0], 10.0, 5.0 + 10 * HICCUP_S),
        ([10.0, 20.0, 50.0, 20.0, 40.0], 1.0, 20.0 + 10.0),  # deviations 10 0 30 0 20, in the median 10
        ([5.0, 5.0, 5.0], 0.0, None),  # for ever
    ],
)
def test_how_long_is_waited(seen: list[float], patience: float, limit_s: float | None) -> None:
    assert most_s(seen, patience) == limit_s


def test_who_is_late_with_the_first_of_what_was_given() -> None:
    pulse = Pulse(patience=1.0)
    for _ in range(4):  # 2 s a step, one after the other though given at once
        pulse.begin(ZERO, "task", 0.0, size=5.0)
        pulse.begin(ONE, "task", 0.0, size=5.0)
    for end_s in (10.0, 20.0, 30.0):
        pulse.end(ZERO, end_s)
    assert not pulse.overdue(30.0 + 10.0 + 6.0)
    late = pulse.overdue(30.0 + 10.0 + 6.1)
    assert [(each.who, each.usual_s, round(each.spent_s, 1)) for each in late] == [(ZERO, 10.0, 16.1)]
    late = pulse.overdue(61.0)  # of the other nothing was seen: a minute
    assert [(each.who, each.usual_s) for each in late] == [(ZERO, 10.0), (ONE, None)]
    pulse.drop(ZERO)
    pulse.drop(ONE)
    assert not pulse.overdue(1e6)


def test_kinds_and_lanes_are_timed_apart() -> None:
    """A download on a slow link is no reason to wait as long for every task; nor is a long upload."""
    pulse = Pulse(patience=1.0)
    now_s = 0.0
    for _ in range(3):
        for kind, seconds in (("task with weights to fetch", 100.0), ("task", 2.0)):
            pulse.begin(ZERO, kind, now_s)
            pulse.begin(ZERO, "contribution", now_s, lane="sending")
            now_s += seconds
            pulse.end(ZERO, now_s)
            pulse.end(ZERO, now_s, lane="sending")
    pulse.begin(ZERO, "task with weights to fetch", now_s)
    assert not pulse.overdue(now_s + 105.0)
    assert pulse.overdue(now_s + 107.0)
    pulse.end(ZERO, now_s + 1.0)
    pulse.begin(ZERO, "task", now_s + 1.0)
    assert pulse.overdue(now_s + 1.0 + 9.0)
