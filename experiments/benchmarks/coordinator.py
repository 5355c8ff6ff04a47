"""Events a second that the coordinator handles, and what a task costs it with few and with many islands.

The benchmark plays the runtime: it answers each `Run` with `Finished`, each `Push` with `Received` (a verdict for
each module that the task sent), each `Measure` with `Committed`. Only `Coordinator.handle` is timed, in seconds of
this process's CPU, which is all it uses. A task here is a whole round of one island, the dearest kind: two events,
a push of all its modules, and its share of the round's commit.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diloco import seats
from diloco.coordinator import Coordinator
from diloco.events import Committed, Event, Finished, Measure, Push, Received, Run, Started
from diloco.messages import EVALUATOR, ModuleKey, Modules, Report, SlotName, Task, Verdict
from diloco.schedule import Barrier, Schedule
from diloco.views import RunView
from experiments.benchmarks import common

LONG_ISLANDS = 4  # and modules, of a run of very many rounds


@dataclass(frozen=True, kw_only=True)
class Block:
    """What some whole rounds cost."""

    events: int
    tasks: int
    seconds: float
    slowest_s: float  # the dearest event: the one that ends a round


class Game:
    """A coordinator and its made-up runtime; what it is asked for is answered in a random order."""

    def __init__(self, view: RunView, schedule: Schedule) -> None:
        """`view`: of a run that begins."""
        self._view = view
        self._coordinator = Coordinator(schedule=schedule, run=self._view)
        self._asked: list[Run | Push | Measure] = []
        self._random = random.Random(0)
        self._now_s = 0.0
        self._handle(Started(now_s=0.0))

    def play(self, rounds: int) -> Block:
        """Answer in any order until so many rounds more are committed."""
        events = tasks = 0
        seconds = slowest_s = 0.0
        until = self._view.round + rounds
        while self._view.round < until:
            index = self._random.randrange(len(self._asked))
            self._asked[index], self._asked[-1] = self._asked[-1], self._asked[index]
            command = self._asked.pop()
            spent_s = self._handle(self._answer(command))
            events, seconds, slowest_s = events + 1, seconds + spent_s, max(slowest_s, spent_s)
            tasks += isinstance(command, Push)
        return Block(events=events, tasks=tasks, seconds=seconds, slowest_s=slowest_s)

    def _handle(self, event: Event) -> float:
        start_s = time.process_time()
        commands = self._coordinator.handle(event)
        spent_s = time.process_time() - start_s
        self._asked.extend(command for command in commands if isinstance(command, Run | Push | Measure))
        return spent_s

    def _answer(self, command: Run | Push | Measure) -> Event:
        self._now_s += 0.001
        match command:
            case Run(task=task):
                return Finished(now_s=self._now_s, report=report_of(task))
            case Push(task=task):
                return Received(now_s=self._now_s, turn=task.turn, verdicts=verdicts_of(task), attempt=0)
            case Measure():
                return Committed(now_s=self._now_s, stats=())


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("coordinator", __doc__.partition("\n")[0])
    options.add_argument("--islands", type=common.several, default=[10, 100, 1000, 10_000], help="10,100,1000,10000")
    options.add_argument("--modules", type=common.positive, default=100, help="modules of the store (100)")
    options.add_argument(
        "--modules-per-path", type=common.several, default=[100, 10], help="modules that a task sends (100,10)"
    )
    options.add_argument("--tasks", type=common.positive, default=4000, help="at least so many tasks a block (4000)")
    options.add_argument("--rounds", type=common.several, default=[2000, 12_000], help="of a long run (2000,12000)")
    options.add_argument("--blocks", type=common.positive, default=5, help="blocks of each size, in turn (5)")
    given = options.parse_args(argv)
    if given.quick:
        given.islands, given.modules, given.modules_per_path = [10, 30], 4, [4, 2]
        given.tasks, given.blocks, given.rounds = 30, 1, [10, 30]
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    for width in given.modules_per_path:
        if given.modules % width:
            raise ValueError(f"--modules-per-path {width} does not divide --modules {given.modules}")
        if min(given.islands) * width < given.modules:
            raise ValueError(f"{min(given.islands)} islands leave modules untrained: --modules-per-path {width} is few")
    found = {str(width): _of_width(given, width) for width in given.modules_per_path}
    widest = found[str(max(given.modules_per_path))]
    long = _of_rounds(given.rounds)
    return {"benchmark": "coordinator", "modules": given.modules, **widest, "by_modules_per_path": found, "long": long}


def _of_rounds(rounds: Sequence[int]) -> dict[str, Any]:
    """Whether a long run costs more the longer it has gone on: memory, and time of a tenth as many rounds."""
    first, last = rounds
    schedule = Barrier()
    view = view_of(schedule, islands=LONG_ISLANDS, modules=LONG_ISLANDS, modules_per_path=LONG_ISLANDS, steps=1)
    game = Game(view, schedule)
    tracemalloc.start()
    game.play(first)
    before = (tracemalloc.get_traced_memory()[0], game.play(first // 10).seconds)
    game.play(last - first - first // 10)
    after = (tracemalloc.get_traced_memory()[0], game.play(first // 10).seconds)
    tracemalloc.stop()
    common.show(f"after {first} and {last} rounds: {before[0]:,} and {after[0]:,} bytes")
    return {
        "bytes": {str(first): before[0], str(last): after[0]},
        "bytes_grown": after[0] - before[0],
        "time_ratio": common.rounded(after[1] / before[1], digits=3),
    }


def _of_width(given: Any, width: int) -> dict[str, Any]:
    blocks: dict[int, list[Block]] = {n: [] for n in given.islands}
    for _ in range(given.blocks):
        for n, found in blocks.items():
            # Made anew each time, or the garbage collector would look through all the others with it.
            schedule = Barrier()
            view = view_of(schedule, islands=n, modules=given.modules, modules_per_path=width, steps=1)
            game = Game(view, schedule)
            game.play(1)
            found.append(game.play(-(-given.tasks // n)))
    costs = {n: common.median([b.seconds / b.tasks for b in found]) for n, found in blocks.items()}
    rates = {n: common.median([b.events / b.seconds for b in found]) for n, found in blocks.items()}
    for n in blocks:
        common.show(f"{width} modules a task, {n} islands: {rates[n]:,.0f} events/s, {costs[n] * 1e6:.0f} us a task")
    return {
        "modules_per_path": width,
        "events_per_s": {str(n): rate for n, rate in rates.items()},
        "lowest_events_per_s": min(rates.values()),
        "seconds_per_task": {str(n): cost for n, cost in costs.items()},
        "slowest_event_s": {str(n): common.median([b.slowest_s for b in found]) for n, found in blocks.items()},
        "cost_ratio": common.rounded(costs[max(costs)] / costs[min(costs)]),
        "cost_spread": common.rounded(max(costs.values()) / min(costs.values())),
    }


def view_of(schedule: Schedule, *, islands: int, modules: int, modules_per_path: int, steps: int) -> RunView:
    """The start of a run that has no end, in rounds of so many steps."""
    layout = _modules(modules, modules_per_path)
    view = RunView(
        seed=0,
        rounds=10**9,
        inner_steps=steps,
        segment_steps=0,
        eval_every=0,
        save_every=0,
        paths=layout.paths,
        shard_examples=[1] * islands,
    )
    if schedule.free:
        view = replace(view, fragments=tuple((slot,) for slot in layout.slots) if schedule.by_fragment else ())
        view.pool = view.new_pool(schedule.drawn)
    seats.begin(view, layout, islands)
    return view


def _modules(modules: int, per_path: int) -> Modules:
    """`per_path` slots, and as many disjoint paths as make `modules` modules."""
    slots = [SlotName(f"slot{i}") for i in range(per_path)]
    paths = tuple({slot: ModuleKey(f"{slot}/{p}") for slot in slots} for p in range(modules // per_path))
    shards = {key: 0 for path in paths for key in path.values()}
    return Modules(slots={slot: (f"{slot}.weight",) for slot in slots}, paths=paths, shards=shards)


def report_of(task: Task) -> Report:
    """It was done."""
    metrics = {"eval/loss": 1.0} if task.island == EVALUATOR else {"inner/loss": 1.0, "inner/lr": 1e-3}
    return Report(
        task=task, tokens=1, seconds=1.0, clock_s=1.0, waiting_s=0.0, bytes_up=1, bytes_down=1, metrics=metrics
    )


def verdicts_of(task: Task) -> tuple[Verdict, ...]:
    """All that it sent is sound."""
    keys = [task.modules[slot] for slot in task.send]
    return tuple(
        Verdict(module=key, source=task.source, round=task.round, finite=True, shape_ok=True, norm=1.0) for key in keys
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
