"""Sources that go from island to island, by events alone: islands fewer than paths, and islands that die."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from diloco import seats
from diloco.events import Joined, Push, Respawn, Run
from diloco.messages import EVALUATOR, IslandId, SourceId
from diloco.views import RunView
from dipaco.paths import Paths
from dipaco.schedule import PathFirstCome, PathRounds
from tests.toy import FakeRuntime

PARAMETERS = {f"layers.{i}.weight": (2, 2) for i in range(4)} | {"embed.weight": (3, 2)}
ROUNDS = 3


def begun(
    islands: int, schedule: PathRounds | PathFirstCome, layout: Paths, *, seed: int = 0, **settings: int
) -> FakeRuntime:
    modules = layout.build(PARAMETERS, 2)
    sources = schedule.num_sources(islands, layout.num_paths())
    given = {"seed": 0, "rounds": ROUNDS, "inner_steps": 6, "segment_steps": 2, "eval_every": 0, "save_every": 0}
    view = RunView(
        paths=modules.paths,
        fragments=modules.fragments,
        shard_examples=[10] * sources,
        moving=True,
        free=schedule.free,
        **{**given, **settings},
    )
    seats.begin(view, modules, islands)
    runtime = FakeRuntime(view, schedule, seed=seed)
    runtime.start()
    return runtime


def check_whole(runtime: FakeRuntime, fragments: int = 1) -> None:
    """Every source is in each outer step of its modules, once, and trained all its steps for it."""
    assert runtime.stop is not None and runtime.stop.status == "finished"
    run = runtime.view
    found = Counter((c.module, c.round, source) for c in runtime.commits() for source in c.sources)
    expected = {
        (key, round_, source.source)
        for source in run.sources.values()
        for key in run.path_of(source).values()
        for round_ in range(ROUNDS)
    }
    assert set(found) == expected and set(found.values()) == {1}
    assert run.counters.accepted == len(run.sources) * ROUNDS * fragments


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("islands", [1, 3, 4, 9])
@pytest.mark.parametrize(("lag", "fragments"), [(0, 1), (2, 1), (0, 2), (1, 2)])
def test_any_number_of_islands(islands: int, lag: int, fragments: int, seed: int) -> None:
    layout = Paths(levels=[2, 2], fragments=fragments)
    runtime = begun(islands, PathRounds(lag=lag, replicas=1), layout, seed=seed)
    runtime.go()
    check_whole(runtime, fragments)
    steps = Counter(
        (task.source, step) for task in runtime.tasks() for step in range(task.first_step, task.first_step + task.steps)
    )
    assert len(steps) == 4 * ROUNDS * 6 and set(steps.values()) == {1}
    if islands >= 4:
        assert not any(task.save for task in runtime.tasks())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("segment_steps", [0, 2])
@pytest.mark.parametrize(("lag", "fragments"), [(1, 1), (5, 1), (2, 2)])
def test_a_path_moves_only_once_all_that_was_given_of_it_is_done(
    lag: int, fragments: int, segment_steps: int, seed: int
) -> None:
    """Two tasks of a path that save it may be under way at once: what the first saved is not what is taken up."""
    layout = Paths(levels=[4], private=["."], fragments=fragments)
    runtime = begun(2, PathRounds(lag=lag, replicas=1), layout, seed=seed, segment_steps=segment_steps)
    chance = random.Random(seed)
    while runtime.stop is None:
        command = chance.choice(runtime.ready())
        others = [c for c in runtime.asked if isinstance(c, Run) and c is not command]
        under_way = {c.task.source for c in others if c.task.island != EVALUATOR}
        before = len(runtime.said)
        runtime.answer(command)
        taken = {c.task.source for c in runtime.said[before:] if isinstance(c, Run) and c.take_up}
        assert not taken & under_way
    check_whole(runtime, fragments)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("seed", range(25))
def test_islands_that_die(seed: int, lag: int) -> None:
    """At random moments, of few islands; they come back, each at its time. Every path contributes once a round."""
    chance = random.Random(seed)
    runtime = begun(chance.choice([1, 2, 3, 5]), PathRounds(lag=lag, replicas=1), Paths(levels=[2, 2]), seed=seed)
    lost = with_deaths(runtime, chance)
    check_whole(runtime)
    assert runtime.view.counters.islands_lost == lost


def with_deaths(runtime: FakeRuntime, chance: random.Random) -> int:
    """Answer at random to the run's end, while islands die at random; how many did."""
    lost = 0
    while runtime.stop is None:
        alive = [number for number, view in runtime.view.islands.items() if view.alive]
        if alive and lost < 8 and chance.random() < 0.08:
            runtime.lose(chance.choice(alive))
            lost += 1
            continue
        ready = runtime.ready()
        assert ready, "nothing is under way, and the run is not over"
        runtime.answer(chance.choice(ready))
    return lost


@pytest.mark.parametrize("seed", range(40))
def test_asynchronous_paths_on_islands_that_die(seed: int) -> None:
    """Each path is in one step of its modules for each of its rounds, but for what was refused; nobody hangs."""
    chance = random.Random(seed)
    schedule, save_every = PathFirstCome(replicas=1), chance.choice([0, 1])
    layout = Paths(levels=[2, 2])
    runtime = begun(chance.choice([1, 2, 3, 4, 6]), schedule, layout, seed=seed, save_every=save_every)
    refused = {(chance.randrange(4), chance.randrange(ROUNDS))} if chance.random() < 0.5 else set()
    runtime.bad = set(refused)
    with_deaths(runtime, chance)
    assert runtime.stop is not None and runtime.stop.status == "finished"
    run = runtime.view
    found = Counter((c.module, c.rounds[0], c.sources[0]) for c in runtime.commits())
    expected = {
        (key, round_, source.source)
        for source in run.sources.values()
        for key in run.path_of(source).values()
        for round_ in range(ROUNDS)
        if (source.source, round_) not in refused
    }
    assert set(found) == expected and set(found.values()) == {1}
    assert run.counters.accepted == 4 * ROUNDS - len(refused)
    assert run.counters.rejected_by_reason.get("not_finite", 0) == len(refused)  # others were of lost islands
    assert {module.round for module in run.modules.values()} == {ROUNDS}


def test_what_a_dead_island_was_to_save_is_done_again() -> None:
    """Its last task sent the contribution, and the island died with what belongs to the path."""
    runtime = begun(1, PathRounds(replicas=1), Paths(levels=[2], private=["."]))
    while [c.task.source for c in runtime.asked if isinstance(c, Run)] != [0, 1]:  # the next path is queued behind it
        runtime.answer(next(c for c in runtime.ready() if isinstance(c, Run) and c.task.source == 0))
    runtime.lose(0)
    runtime.answer(next(c for c in runtime.asked if isinstance(c, Respawn)))
    runtime.go()
    check_whole(runtime)


def test_what_is_kept_goes_along() -> None:
    runtime = begun(1, PathRounds(replicas=1), Paths(levels=[2], private=["."]))
    runtime.go()
    runs = [c for c in runtime.said if isinstance(c, Run) and c.task.steps]
    first = [c for c in runs if c.task.segment == 0]
    assert [c.task.source for c in first] == [0, 1] * ROUNDS
    assert [c.take_up for c in first] == [False, False] + [True] * (2 * ROUNDS - 2)
    assert not any(c.take_up for c in runs if c.task.segment)
    assert all(set(c.wants) == set(c.task.modules.values()) for c in first[2:])  # each has stepped since


@pytest.mark.parametrize(("lag", "fragments", "keep"), [(0, 1, 0.0), (2, 1, 0.0), (0, 2, 0.0), (0, 1, 0.5)])
def test_weights_are_left_behind_where_all_are_installed_anew(lag: int, fragments: int, keep: float) -> None:
    """At a round's end; the next task then installs every slot, and nothing of it is held."""
    layout = Paths(levels=[2], fragments=fragments)
    runtime = begun(1, PathRounds(lag=lag, keep=keep, replicas=1), layout)
    runtime.go()
    left = [task for task in runtime.tasks() if task.sheds]
    assert bool(left) == (lag == 0 and fragments == 1 and keep == 0)
    assert all(task.save and task.last for task in left)
    taken = {(c.task.source, c.task.round): c for c in runtime.said if isinstance(c, Run) and c.take_up}
    for task in left:
        following = taken.get((task.source, task.round + 1))  # the island may also go on with it, which lacks nothing
        assert following is None or following.wants == dict.fromkeys(task.modules.values())
    assert len(taken) >= 2


def test_spare_islands_take_over() -> None:
    runtime = begun(3, PathRounds(replicas=1), Paths(levels=[2], private=["."]))
    assert {task.island for task in runtime.tasks()} == {0, 1}
    runtime.lose(1)
    assert {task.source for task in runtime.tasks(2)} == {1}
    runtime.tell(Joined(now_s=runtime.now_s(), island=IslandId(1)))
    assert runtime.view.islands[IslandId(1)].queued == 0
    runtime.go(Respawn)
    check_whole(runtime)


def test_a_task_costs_the_same_however_many_paths_there_are() -> None:
    """How often the schedule is asked, for each task that it gives: 16 and 256 paths on 32 islands."""
    asked: dict[int, float] = {}
    for side in (4, 16):
        schedule = Counting(replicas=1)
        runtime = begun(32, schedule, Paths(levels=[side, side]), seed=1, segment_steps=0)
        runtime.go()
        check_whole(runtime)
        asked[side] = schedule.asked / len(runtime.tasks())
    assert asked[16] < 1.5 * asked[4]


class Counting(PathRounds):
    """How often it was asked for a task."""

    asked = 0

    def next_task(self, island, run, now_s):  # type: ignore[no-untyped-def]
        self.asked += 1
        return super().next_task(island, run, now_s)


def test_a_contribution_that_comes_too_late_is_not_heard() -> None:
    """The path was given to another island, whose later attempt counts."""
    runtime = begun(2, PathRounds(replicas=1), Paths(levels=[2], private=["."]))
    while not (pushed := [c for c in runtime.asked if isinstance(c, Push)]):
        runtime.answer(next(c for c in runtime.ready() if isinstance(c, Run) and c.task.island == 0))
    runtime.lose(0)
    assert runtime.view.sources[SourceId(0)].attempt == 1
    runtime.answer(pushed[0])
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    runtime.go()
    check_whole(runtime)
