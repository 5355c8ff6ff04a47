"""Goodput while chips fail and stall: islands under `schedule=quorum` against data parallel on the same failures.

    python -m experiments.benchmarks.quorum_goodput [--islands 1,2,4,8,16] [--seeds 3] [--hours 2] [--quick]

A simulation on a virtual clock. The coordinator and its schedule are the real ones: they are told of finished tasks,
contributions, losses and returns at the moments of the clock, and what they ask for is played. What is made up:
- 1.2 million chips, each with a failure a year in the mean (Poisson, from a seed), as in Decoupled DiLoCo
  (arXiv:2604.21428).
- A failure takes a slice of 250 chips away for 600 s. Who trained in step with it stands still for 18 s, 5 s of which
  until it is seen, and goes on without the slice. What else fails meanwhile makes that no longer. The slice comes back
  at no cost.
- Those 18 s are the one constant that was fitted: elastic data parallel has the paper's 58 % with them.
- Data parallel: all chips are in step. It loses the step in which the failure happens and nothing else. Where it is not
  elastic it stands still until the slice is there again.
- Islands: chips / M each, in step among themselves only. A failure takes the island from the coordinator, which has it
  started anew and gives its work to others; it then takes all weights from the store. In the scene `kept` it is elastic
  inside: it stands still as long and has its state, and the coordinator is told nothing.
- Steps of 1 s, also with a slice fewer; 24 fragments, one sent after each step, .2 s to the store; K = 1, lag 2 steps,
  grace .8, by speed. Outer steps, installs and the driver's messages take no time.
- Stalls, where there are any: one a minute over all chips, of 20 s, of all that is in step with the chip.

`goodput`: chip-seconds of steps whose contribution was counted / all chip-seconds; of data parallel, of finished steps.
`merged`: steps behind the fragments of all outer steps, as the merge weighs them / those of an undisturbed run. It is
less, since what an island trained on a fragment since it last sent it is lost, or overwritten by what others did.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from diloco.async_.quorum import Quorum
from diloco.coordinator import Coordinator
from diloco.events import (
    Command,
    CommitAll,
    Committed,
    Event,
    Finished,
    Joined,
    Lost,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Started,
    Tick,
)
from diloco.messages import EVALUATOR, IslandId, Task
from experiments.benchmarks import common
from experiments.benchmarks.coordinator import report_of, verdicts_of, view_of
from experiments.benchmarks.outages import Span, Tape, Trouble, Unit, World, by_hand, data_parallel, record

FRAGMENTS = 24  # and as many steps a round: one is sent after each
ELASTIC, FIXED = "elastic data parallel", "data parallel"
QUIET = Tape(failures=(), stalls=())


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the methods are compared in."""

    world: World
    kept: bool = False
    paper: dict[str, float]


SCENES = {
    "1.2 million chips": Scene(world=World(), paper={ELASTIC: 0.58, "2": 0.70, "8": 0.88, "16": 0.93}),
    "1.2 million chips, kept": Scene(world=World(), kept=True, paper={}),
    "1.2 million chips, stalls": Scene(world=World(stalls_per_h=60), paper={}),
    "2.4 million chips": Scene(world=World(chips=2_400_000), paper={FIXED: 0.18, ELASTIC: 0.40, "8": 0.80, "16": 0.86}),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of some islands."""

    goodput: float
    merged: float  # steps behind fragments, as the merge weighs them / all steps there was time for
    late: int  # contributions
    accepted: int
    outer_steps: int
    steps: tuple[int, ...]  # finished, by island


class Islands:
    """A coordinator and what it commands, on a virtual clock; all that will ever happen to an island is known."""

    def __init__(self, world: World, units: Sequence[Unit], *, kept: bool) -> None:
        self._world, self._units, self._kept = world, units, kept
        schedule = Quorum()
        self._view = view_of(
            schedule, islands=len(units), modules=FRAGMENTS, modules_per_path=FRAGMENTS, steps=FRAGMENTS
        )
        self._coordinator = Coordinator(schedule=schedule, run=self._view)
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0
        self._now_s = 0.0
        self._free_s = [0.0] * len(units)  # when an island is through with what it was given; inf = it never will be
        self._steps: Counter[int] = Counter()
        self._weights = 0.0
        self._later(Started(now_s=0.0))
        for number, unit in enumerate(units):
            for halt in [] if kept else unit.halts:
                seen_s = max(halt.from_s + world.detect_s, 0.0)
                if halt.to_s > seen_s:
                    self._later(Lost(now_s=seen_s, island=IslandId(number), reason="simulated"))

    def play(self) -> Outcome:
        """Until the end of the world."""
        while (event := self._next()).now_s < self._world.end_s:
            self._now_s = event.now_s
            if isinstance(event, Finished):
                self._steps[event.report.task.island] += event.report.task.steps
            for command in self._coordinator.handle(event):
                self._carry_out(command)
        world, counters = self._world, self._view.counters
        possible = len(self._units) * world.end_s / world.step_s
        return Outcome(
            goodput=counters.tokens * world.step_s / (world.chips * world.end_s),
            merged=self._weights / FRAGMENTS / possible,
            late=counters.late,
            accepted=counters.accepted,
            outer_steps=counters.outer_steps,
            steps=tuple(self._steps[number] for number in range(len(self._units))),
        )

    def _next(self) -> Event:
        wake_s = self._coordinator.wake_s()
        if wake_s is not None and (not self._events or wake_s < self._events[0][0]):
            return Tick(now_s=max(wake_s, self._now_s))
        return heapq.heappop(self._events)[2]

    def _later(self, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._events, (event.now_s, self._count, event))

    def _carry_out(self, command: Command) -> None:
        match command:
            case Run(task=task) if task.island == EVALUATOR:
                self._later(Finished(now_s=self._now_s, report=report_of(task)))
            case Run(task=task):
                self._train(task)
            case Push(task=task):
                heard_s, verdicts = self._now_s + self._world.push_s, verdicts_of(task)
                self._later(Received(now_s=heard_s, turn=task.turn, verdicts=verdicts, attempt=task.attempt))
            case CommitAll(commits=commits):
                self._weights += sum(sum(commit.weights) for commit in commits)
            case Measure():
                self._later(Committed(now_s=self._now_s, stats=()))
            case Respawn(island=island):
                halt = self._units[island].halt(self._now_s)
                back_s = halt.to_s if halt else self._now_s
                self._free_s[island] = back_s
                if back_s < math.inf:
                    self._later(Joined(now_s=back_s, island=island))

    def _train(self, task: Task) -> None:
        """Where the island is lost before the end, nothing is heard of the task, nor of those behind it."""
        unit = self._units[task.island]
        start_s = now_s = max(self._now_s, self._free_s[task.island])
        chip_steps, left = 0, task.steps
        while left and now_s < math.inf:
            end = unit.step(now_s)
            if isinstance(end, Span):
                now_s = end.to_s if self._kept else math.inf
                continue
            chip_steps += unit.there(now_s)
            now_s, left = end, left - 1
        self._free_s[task.island] = now_s
        if now_s < math.inf:
            report = replace(report_of(task), tokens=chip_steps, clock_s=now_s - start_s)
            self._later(Finished(now_s=now_s, report=report))


def islands(world: World, tape: Tape, many: int, *, kept: bool = False, pause_s: float | None = None) -> Outcome:
    """So many islands live through a tape; a failure halts one for `pause_s`, by default the world's."""
    pause_s = world.pause_s if pause_s is None else pause_s
    units = [Unit(world, tape, units=many, index=index, pause_s=pause_s) for index in range(many)]
    return Islands(world, units, kept=kept).play()


def others(world: World, many: int) -> dict[str, float]:
    """Steps a second of all islands but the first: undisturbed; the first is lost for good; it stalls for long."""
    trouble = (Trouble(at_s=world.end_s / 6, chip=0),)
    lasting = replace(world, stall_s=world.end_s / 2)
    found = {
        "undisturbed": islands(world, QUIET, many),
        "first lost for good": islands(world, Tape(failures=trouble, stalls=()), many, pause_s=math.inf),
        "first stalls": islands(lasting, Tape(failures=(), stalls=trouble), many),
    }
    return {name: sum(outcome.steps[1:]) / (many - 1) / world.end_s for name, outcome in found.items()}


def compare(scene: Scene, many: Sequence[int], seeds: int, quiet: dict[int, Outcome]) -> dict[str, Any]:
    """All methods on the tapes of all seeds. `quiet`: islands that nothing befalls."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        tape = record(scene.world, seed)
        for name, elastic in ((FIXED, False), (ELASTIC, True)):
            found.setdefault(name, []).append({"goodput": data_parallel(scene.world, tape, elastic=elastic)})
        for m in many:
            outcome = islands(scene.world, tape, m, kept=scene.kept)
            told = {
                "goodput": outcome.goodput,
                "of_undisturbed": outcome.goodput / quiet[m].goodput,
                "merged": outcome.merged / quiet[m].merged,
                "late": outcome.late / (outcome.late + outcome.accepted),
                "outer_steps_per_s": outcome.outer_steps / scene.world.end_s,
            }
            found.setdefault(str(m), []).append(told)
    methods = {name: _summed_up(told) for name, told in found.items()}
    hand = {str(m): by_hand(scene.world, m) for m in many} | {ELASTIC: by_hand(scene.world, 1)}
    for name, by_formula in hand.items() if not scene.world.stalls_per_h else ():
        methods[name]["by_hand"] = round(by_formula, 4)
    for name in scene.paper.keys() & methods.keys():
        methods[name]["paper"] = scene.paper[name]
    order = [FIXED, ELASTIC, *(str(m) for m in sorted(many) if m > 1)]
    rising = [[found[name][seed]["goodput"] for name in order] for seed in range(seeds)]
    return {"methods": methods, "order_in_seeds": sum(row == sorted(row) for row in rising)}


def _summed_up(told: Sequence[dict[str, float]]) -> dict[str, Any]:
    seeds = {key: [round(one[key], 4) for one in told] for key in told[0]}
    spread = {"sd": round(stdev(seeds["goodput"]), 4)} if len(told) > 1 else {}
    return {**{key: round(fmean(values), 4) for key, values in seeds.items()}, **spread, "seeds": seeds["goodput"]}


def table(scenes: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each method of each scene."""
    lines = ["| | | goodput | sd | by hand | paper | merged | late |", "|---|---|---|---|---|---|---|---|"]
    for name, scene in scenes.items():
        for method, told in scene["methods"].items():
            title = f"M = {method}" if method.isdigit() else method
            shown = [told.get(key) for key in ("goodput", "sd", "by_hand", "paper", "merged", "late")]
            cells = ["" if value is None else f"{100 * value:.1f} %" for value in shown]
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("quorum_goodput", __doc__.partition("\n")[0])
    options.add_argument("--islands", type=common.several, default=[1, 2, 4, 8, 16], help="1,2,4,8,16")
    options.add_argument("--seeds", type=common.positive, default=3, help="how many tapes of failures (3)")
    options.add_argument("--hours", type=float, default=2.0, help="of virtual time (2)")
    given = options.parse_args(argv)
    if given.quick:
        given.islands, given.seeds, given.hours = [2, 8], 2, 0.05
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if not 0 < given.hours < math.inf:
        raise ValueError(f"--hours {given.hours} must be above 0")
    for m in given.islands:
        if World().chips % (m * World().slice_chips):
            raise ValueError(
                f"--islands {m}: {World().chips} chips in slices of {World().slice_chips} do not divide so"
            )
    world = replace(World(), hours=given.hours)
    quiet = {m: islands(world, QUIET, m) for m in given.islands}
    scenes = {}
    for name, scene in SCENES.items():
        common.show(f"{name} ...")
        scene = replace(scene, world=replace(scene.world, hours=given.hours))
        scenes[name] = compare(scene, given.islands, given.seeds, quiet)
    apart = others(world, max(max(given.islands), 2))
    common.show(table(scenes))
    common.show("steps a second of each other island: " + ", ".join(f"{k} {v:.4f}" for k, v in apart.items()))
    return {
        "benchmark": "quorum_goodput",
        "seeds": given.seeds,
        "hours": given.hours,
        "undisturbed": {str(m): round(outcome.goodput, 4) for m, outcome in quiet.items()},
        "scenes": scenes,
        "others_steps_per_s": apart,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
