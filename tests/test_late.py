"""Streaming, late islands and lost ones, by events alone: the coordinator and a Barrier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from diloco.events import CommitAll, Interrupted, Push, Received, Run, Save, Tick
from diloco.messages import SourceId, Task
from diloco.schedule import Barrier
from tests.toy import FakeRuntime, make_view

SLOTS = ("first", "second", "third")
ALONE = tuple((slot,) for slot in SLOTS)


def begun(schedule: Barrier, *, seed: int = 0, fragments: Any = ALONE, **settings: Any) -> FakeRuntime:
    runtime = FakeRuntime(make_view(slots=SLOTS, fragments=fragments, **settings), schedule, seed=seed)
    runtime.start()
    return runtime


def commits_in_order(runtime: FakeRuntime) -> list[tuple[int, str]]:
    return [(commit.round, commit.module.partition("/")[0]) for commit in runtime.commits()]


# --- fragments ---


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 5])
def test_fragments_step_one_after_the_other_whatever_the_order_of_answers(lag: int, seed: int) -> None:
    runtime = begun(Barrier(lag=lag), islands=3, seed=seed)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    assert commits_in_order(runtime) == [(round_, slot) for round_ in range(3) for slot in SLOTS]
    assert all(commit.sources == (0, 1, 2) for commit in runtime.commits())
    counters = runtime.view.counters
    assert (counters.outer_steps, counters.accepted, counters.late) == (9, 27, 0)
    assert counters.tokens == 3 * 18 * 10  # each step counts once, though it is behind several contributions
    assert counters.inner_steps == 3 * 18


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_a_fragment_is_sent_in_its_turn_and_installed_after_the_lag(lag: int) -> None:
    runtime = begun(Barrier(lag=lag, keep=0.25), segment_steps=0)
    runtime.go()
    sent = [(task.first_step + task.steps, slot) for task in runtime.tasks(0) for slot in task.send]
    assert sent == [(2 * (i + 1), SLOTS[i % 3]) for i in range(9)]
    first, *later = [task for task in runtime.tasks(0) if task.install]
    assert (first.first_step, set(first.install), first.keep) == (0, set(SLOTS), 0.0)
    installed = [(task.first_step, dict(task.install), task.keep) for task in later]
    due = [(2 * (i + 1) + lag, {SLOTS[i % 3]: i // 3 + 1}, 0.25) for i in range(9)]
    assert installed == [entry for entry in due if entry[0] < 18]


def test_only_updates_are_asked_for_where_the_version_before_is_held() -> None:
    runtime = begun(Barrier(lag=1))
    runtime.go()
    for island in (0, 1):
        first, *later = [c for c in runtime.said if isinstance(c, Run) and c.task.island == island and c.task.install]
        assert set(first.wants.values()) == {None}
        for run in later:
            ((slot, version),) = run.task.install.items()
            assert run.wants == {f"{slot}/0": version - 1}


def test_what_is_pulled_for_a_busy_island_may_come_ahead() -> None:
    runtime = begun(Barrier(lag=2))
    runtime.go()
    runs = [c for c in runtime.said if isinstance(c, Run) and c.task.island == 0 and c.task.install]
    assert runs[0].ahead is False
    assert any(run.ahead for run in runs[1:])


@pytest.mark.parametrize("lag", [1, 3, 5])
def test_a_checkpoint_at_a_rounds_end_knows_nothing_of_the_next(lag: int) -> None:
    runtime = begun(Barrier(lag=lag), islands=2)
    runtime.go()
    saves = [c for c in runtime.said if isinstance(c, Save)]
    assert [save.name for save in saves] == ["round-000001", "round-000002", "round-000003"]
    ahead = 0
    for save in saves:
        view = save.view
        for source in view["sources"]:
            assert (source["round"], source["done"], source["segment"]) == (view["round"], 0, 0)
            assert source["position"] == 6 * view["round"]
        assert all(module["arrivals"] == [] for module in view["modules"].values())
        assert view["counters"]["inner_steps"] == 2 * 6 * view["round"]
        index = runtime.said.index(save)
        ahead += any(
            isinstance(c, Run) and c.task.round == view["round"] and c.task.steps for c in runtime.said[:index]
        )
    assert ahead > 0, "nothing was given out ahead: the test shows nothing"


def test_what_is_saved_while_another_checkpoint_is_written_waits_with_the_store() -> None:
    """No outer step of the next round comes before the store was frozen for the checkpoint of this one."""
    runtime = begun(Barrier(lag=5), islands=2, rounds=4)
    runtime.go(Save)  # the first is never done, the second is due
    assert runtime.view.round == 2
    held = [c for c in runtime.said if isinstance(c, Save)]
    assert [save.name for save in held] == ["round-000001"]
    before = len(runtime.commits())
    assert before == 6
    (save,) = [c for c in runtime.asked if isinstance(c, Save)]
    said = runtime.answer(save)
    kinds = [type(c) for c in said]
    assert kinds.index(Save) < (kinds.index(CommitAll) if CommitAll in kinds else len(kinds))
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lag", [0, 2, 5])
def test_a_lost_island_comes_back_and_nobody_waits_for_ever(lag: int, seed: int) -> None:
    runtime = begun(Barrier(lag=lag), islands=2, rounds=5, seed=seed)
    runtime.go(until=lambda: runtime.view.round == 1)
    runtime.lose(seed % 2)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    assert runtime.view.counters.islands_joined == 1
    back = [task for task in runtime.tasks(seed % 2) if task.attempt == 1]
    assert not back or set(back[0].install) == set(SLOTS)  # it takes all anew


@pytest.mark.parametrize("lag", [0, 2, 5])
def test_the_only_island_is_lost_within_a_round(lag: int) -> None:
    """Its fragments are in different rounds by then; the last of these is begun anew."""
    runtime = begun(Barrier(lag=lag), islands=1, rounds=4)
    runtime.go(until=lambda: runtime.view.modules["first/0"].round == 2)  # type: ignore[index]
    runtime.lose(0)
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "finished"
    assert [c for c in commits_in_order(runtime) if c[1] == "first"] == [(r, "first") for r in range(4)]


@pytest.mark.parametrize("lag", [0, 2])
def test_a_source_that_was_refused_takes_all_anew(lag: int) -> None:
    runtime = begun(Barrier(lag=lag, keep=0.5), islands=2, rounds=3)
    runtime.bad = {(1, 0)}
    runtime.go()
    fresh = [task for task in runtime.tasks(1) if task.fresh]
    assert [(task.first_step, task.keep) for task in fresh] == [(2 * (i + 1) + lag, 0.0) for i in range(3)]
    assert all(set(task.install) == set(SLOTS) for task in fresh)
    assert not any(task.fresh for task in runtime.tasks(0))
    assert runtime.view.counters.rejected == 3


def test_an_interruption_in_the_stream_saves_where_each_source_stands() -> None:
    runtime = begun(Barrier(lag=3), islands=2, rounds=4)
    runtime.go(until=lambda: len(runtime.commits()) == 4)
    runtime.tell(Interrupted(now_s=runtime.now_s()))
    runtime.go()
    assert runtime.stop is not None and runtime.stop.status == "interrupted"
    (*_, save) = [c for c in runtime.said if isinstance(c, Save)]
    assert "-steps-" in save.name
    trained = sum(task.steps for task in runtime.tasks(0))
    assert save.view["sources"][0]["position"] == trained


# --- the deadline ---


class Timed(FakeRuntime):
    """The clock stands still but where the test moves it."""

    def now_s(self) -> float:
        return self._now_s

    def at(self, now_s: float) -> Timed:
        self._now_s = now_s
        return self

    def round_of(self, seconds: dict[int, float], *, opened_s: float) -> None:
        """All islands train a round; each is heard so many seconds after its opening."""
        for island in sorted(seconds, key=seconds.__getitem__):
            self.at(opened_s + seconds[island])
            for _ in range(3):
                self.finish_one(island)
            self.go(Run)
        self.go(Run)

    def finish_one(self, island: int) -> Task:
        run = next(c for c in self.ready() if isinstance(c, Run) and c.task.island == island)
        self.answer(run)
        return run.task


def timed(schedule: Barrier, **settings: Any) -> Timed:
    given: dict[str, Any] = {"islands": 3, "rounds": 6, "eval_every": 0, "save_every": 0}
    runtime = Timed(make_view(**{**given, **settings}), schedule)
    runtime.start()
    runtime.go(Run)
    return runtime


def late_events(runtime: FakeRuntime) -> list[tuple[Any, Any]]:
    return [(record["source"], record["of_round"]) for record in runtime.logged("late")]


USUAL = {0: 10.0, 1: 11.0, 2: 12.0}


def three_rounds(seconds: Sequence[dict[int, float]] = (USUAL,) * 3, **settings: Any) -> Timed:
    """After which enough is known of each island. The fourth begins at the end of these."""
    runtime = timed(Barrier(), **settings)
    opened_s = 0.0
    for each in seconds:
        assert runtime.coordinator.wake_s() is None  # too little is known
        runtime.round_of(each, opened_s=opened_s)
        opened_s += max(each.values())
    assert runtime.view.round == 3
    return runtime


def test_a_round_waits_as_long_as_the_spread_of_arrivals_justifies() -> None:
    """Island 2 came after 12, 12 and 15 s: its median is 12; MAD 0, so that a hiccup of 6 s counts."""
    runtime = three_rounds((USUAL, USUAL, {**USUAL, 2: 15.0}), patience=4.0)
    assert runtime.coordinator.wake_s() is None  # nobody was heard yet
    runtime.round_of({0: 10.0, 1: 11.0}, opened_s=39.0)
    wake_s = 39.0 + 12.0 + 4 * 6.0
    assert runtime.coordinator.wake_s() == wake_s
    assert runtime.at(wake_s - 0.1).tell(Tick(now_s=wake_s - 0.1)) == []
    runtime.at(wake_s).tell(Tick(now_s=wake_s))
    assert runtime.view.round == 4
    assert late_events(runtime) == [(2, 3)]
    assert [c.sources for c in runtime.commits()[-2:]] == [(0, 1)] * 2
    # It arrives after all, is counted as late, and takes part in the round that is under way.
    runtime.go(Run)
    runtime.round_of({2: 40.0}, opened_s=39.0)
    assert (runtime.view.counters.late, runtime.view.round) == (1, 4)
    runtime.round_of(USUAL, opened_s=wake_s)
    assert [c.sources for c in runtime.commits()[-2:]] == [(0, 1, 2)] * 2
    assert runtime.view.counters.tokens == 60 * (3 * 3 + 2 + 3)  # what came too late does not count
    assert runtime.view.arrival_s[SourceId(2)][-2] == 40.0  # but how long it took is known


@pytest.mark.parametrize(
    ("times", "patience", "expected"),
    [
        ((10.0, 18.0, 40.0), 5.0, 18.0 + 5 * 8.0),  # deviations 8, 0, 22
        ((10.0, 12.0, 20.0), 5.0, 12.0 + 5 * 6.0),  # deviations 2, 0, 8: a hiccup is more
    ],
)
def test_median_and_spread(times: Sequence[float], patience: float, expected: float) -> None:
    runtime = three_rounds([{0: 1.0, 1: 2.0, 2: seconds} for seconds in times], patience=patience)
    runtime.round_of({0: 1.0, 1: 2.0}, opened_s=sum(times))
    assert runtime.coordinator.wake_s() == pytest.approx(sum(times) + expected)


def test_an_island_that_is_always_slow_is_not_late() -> None:
    runtime = three_rounds([{0: 10.0, 1: 10.5, 2: 50.0}] * 3, patience=1.0)
    runtime.round_of({0: 10.0, 1: 10.5}, opened_s=150.0)
    assert runtime.at(199.0).tell(Tick(now_s=199.0)) == []
    runtime.round_of({2: 50.0}, opened_s=150.0)
    assert runtime.commits()[-1].sources == (0, 1, 2)


def test_nobody_is_late_where_all_are() -> None:
    """A round of which nothing was heard goes on waiting."""
    runtime = three_rounds(patience=0.01)
    runtime.at(1e6).tell(Tick(now_s=1e6))
    assert runtime.view.round == 3


def test_to_wait_for_ever_can_be_chosen() -> None:
    runtime = three_rounds(patience=0.0)
    runtime.round_of({0: 10.0, 1: 11.0}, opened_s=36.0)
    assert runtime.coordinator.wake_s() is None
    runtime.at(1e6).tell(Tick(now_s=1e6))
    assert runtime.view.round == 3


def test_verdicts_of_a_late_source_are_heard_in_its_order() -> None:
    """The second fragment's shard answers before the first one's: nothing steps until both were heard."""
    runtime = begun(Barrier(lag=5), islands=1, rounds=2)
    runtime.go(Push, until=lambda: sum(isinstance(c, Push) for c in runtime.asked) == 2)
    first, second = (c for c in runtime.asked if isinstance(c, Push))
    assert (first.task.fragment, second.task.fragment) == (0, 1)
    assert not any(isinstance(c, CommitAll) for c in runtime.answer(second))
    steps = [c for c in runtime.answer(first) if isinstance(c, CommitAll)]
    assert [commit.module for step in steps for commit in step.commits] == ["first/0", "second/0"]


def test_an_answer_for_an_island_that_was_given_up_does_not_count() -> None:
    runtime = begun(Barrier(lag=2), islands=2)
    runtime.go(Push, until=lambda: any(isinstance(c, Push) and c.task.source == 0 for c in runtime.asked))
    push = next(c for c in runtime.asked if isinstance(c, Push) and c.task.source == 0)
    runtime.lose(0)
    verdicts = runtime.verdicts(push.task)
    runtime.asked.remove(push)
    runtime.tell(Received(now_s=runtime.now_s(), turn=push.task.turn, verdicts=verdicts))
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    assert runtime.view.sources[SourceId(0)].attempt == 1
