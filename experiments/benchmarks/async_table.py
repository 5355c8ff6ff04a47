"""What does it cost not to wait? Asynchronous schedules against synchronous DiLoCo on equal tokens, by unequal speeds.

    python -m experiments.benchmarks.async_table [--seeds 0,1,2] [--levels equal,...] [--schedules DN,...]
        [--tune] [--quick] [--to DIR]

Four islands, H=20, in one process with a virtual clock; the rows of arXiv:2401.09135's tables at four levels of
heterogeneity. Losses are compared with synchronous DiLoCo's of the same seed. What that learns does not depend on
speeds, so that it is trained once, and takes at each level as many seconds as the slowest island. Dynamic steps (DyLU)
are told the speeds, but for one row, where islands find them out: first rounds have H steps each, and the second ones
begin together.

`--tune` searches `GRID` on a seed that no result is of, which is where `RATES` come from. Last line: a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from diloco.async_.schedule import FirstCome
from experiments.benchmarks.lab import FULL, QUICK, Lab, Method, Order, conclude, opened, options

ISLANDS = 4
INNER_STEPS = 20
GRACE_S = 2.0  # a tenth of a round of the fastest island, which does a step a second
SEARCH_SEED = 9
SCALE = replace(FULL, batch=4, sequence_length=64, eval_sequences=512)  # a quarter of the tokens: many runs
QUICK_ROUNDS = replace(QUICK, steps=8)  # four rounds of two steps

EQUAL, SLIGHT, MODERATE, EXTREME = "equal", "slight", "moderate", "very strong"
SPEEDS = {
    EQUAL: (1.0, 1.0, 1.0, 1.0),
    SLIGHT: (1.0, 0.95, 0.9, 0.8),
    MODERATE: (1.0, 0.9, 0.75, 0.5),
    EXTREME: (1.0, 0.9, 0.5, 0.2),
}
SYNC, NAIVE, POLY, BUFFER, DN, DYLU, GRACE, MEASURED = (
    "sync",
    "naive async",
    "polynomial damping",
    "buffer of 4",
    "DN",
    "DN + DyLU",
    "DN + DyLU + grace",
    "DN + DyLU + grace (measured)",
)
FREE = {
    NAIVE: FirstCome(),
    POLY: FirstCome(damping=0.5),
    BUFFER: FirstCome(batch=4),
    DN: FirstCome(),
    DYLU: FirstCome(by_speed=True),
    **dict.fromkeys((GRACE, MEASURED), FirstCome(by_speed=True, grace_s=GRACE_S)),
}
DELAYED = (DN, DYLU, GRACE, MEASURED)
TOLD = (DYLU, GRACE)
BOTH_ENDS = (EXTREME, EQUAL)
LEVELS = {
    GRACE: (EXTREME, EQUAL, MODERATE, SLIGHT),
    MEASURED: (EXTREME, MODERATE, EQUAL),
    **dict.fromkeys((NAIVE, DN, DYLU, POLY, BUFFER), BOTH_ENDS),
}

# Outer rate and momentum: the best of GRID, by `--tune` of 2026-11-21 (experiments/records/2026-11-21_async_table);
# DN + DyLU, which was not searched, has those of the same with grace.
RATES = {
    SYNC: (0.7, 0.8),
    NAIVE: (0.09, 0.8),
    POLY: (0.18, 0.8),
    BUFFER: (0.35, 0.8),
    DN: (0.35, 0.8),
    DYLU: (0.7, 0.8),
    GRACE: (0.7, 0.8),
    MEASURED: (0.7, 0.8),
}
GRID = {
    SYNC: ((0.7, 0.8), (1.0, 0.5)),
    GRACE: ((0.7, 0.8), (1.0, 0.5)),
    NAIVE: ((0.045, 0.8), (0.09, 0.8), (0.18, 0.8), (0.35, 0.8)),
    DN: ((0.35, 0.8), (0.7, 0.8)),
    POLY: ((0.09, 0.8), (0.18, 0.8), (0.35, 0.8)),
    BUFFER: ((0.18, 0.8), (0.35, 0.8), (0.7, 0.8)),
}
ORDERS = {
    **{
        f"{name}, {level}: at most .005 above sync": Order(better=f"{name}, {level}", worse=SYNC, threshold=-0.005)
        for name in (GRACE, MEASURED)
        for level in LEVELS[name]
    },
    **{
        f"{NAIVE}, {level}: at least .04 above sync": Order(better=SYNC, worse=f"{NAIVE}, {level}", threshold=0.04)
        for level in BOTH_ENDS
    },
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table."""

    schedule: str
    level: str
    losses: list[float]  # by seed
    differences: list[float]  # from sync, by seed
    clock_s: list[float]  # virtual, when the last outer step was, by seed

    def figures(self) -> dict[str, object]:
        """For the last line."""
        return {
            "outer": RATES[self.schedule],
            "loss": [round(loss, 5) for loss in self.losses],
            "mean": round(fmean(self.losses), 5),
            "difference": [round(difference, 5) for difference in self.differences],
            "mean_difference": round(fmean(self.differences), 5),
            "sd_difference": round(stdev(self.differences), 5) if len(self.differences) > 1 else 0.0,
            "clock_s": [round(clock_s, 3) for clock_s in self.clock_s],
        }


def method(schedule: str, level: str, outer: tuple[float, float]) -> Method:
    """One cell's; `outer` is rate and momentum."""
    common = Method(islands=ISLANDS, inner_steps=INNER_STEPS, outer_lr=outer[0], momentum=outer[1])
    if schedule == SYNC:
        return common
    free = replace(FREE[schedule], speeds=list(SPEEDS[level]) if schedule in TOLD else [])
    return replace(common, free=free, delayed=schedule in DELAYED, speeds=SPEEDS[level])


def cells(schedules: Collection[str], levels: Collection[str]) -> dict[str, tuple[str, str]]:
    """Name -> schedule and level, in the order of training; synchronous DiLoCo is always there and has no level."""
    free = [(schedule, level) for schedule in LEVELS if schedule in schedules for level in LEVELS[schedule]]
    free = [(schedule, level) for schedule, level in free if level in levels]
    return {SYNC: (SYNC, EQUAL), **{f"{schedule}, {level}": (schedule, level) for schedule, level in free}}


def chosen(schedule: str, level: str) -> Method:
    """With the rates that the search found. Of islands that are equally fast DyLU asks the same steps: DN's run."""
    known = DN if (schedule, level) == (DYLU, EQUAL) and RATES[DYLU] == RATES[DN] else schedule
    return method(known, level, RATES[schedule])


def finish_s(lab: Lab, one: Method, seed: int) -> float:
    """The virtual time of the last outer step."""
    return max(float(r["clock_s"]) for r in lab.records(lab.begun(one, seed)) if r["event"] == "commit")


def trained(lab: Lab, seeds: Sequence[int], wanted: Mapping[str, tuple[str, str]]) -> dict[str, Cell]:
    """All cells, seed by seed, so that what breaks off has whole seeds."""
    losses: dict[str, list[float]] = {name: [] for name in wanted}
    clock_s: dict[str, list[float]] = {name: [] for name in wanted}
    for seed in seeds:
        for name, (schedule, level) in wanted.items():
            one = chosen(schedule, level)
            losses[name].append(lab.loss(name, one, seed))
            clock_s[name].append(finish_s(lab, one, seed))
    return {
        name: Cell(
            schedule=schedule,
            level=level,
            losses=losses[name],
            differences=[loss - base for loss, base in zip(losses[name], losses[SYNC], strict=True)],
            clock_s=clock_s[name],
        )
        for name, (schedule, level) in wanted.items()
    }


def sync_clock_s(found: Mapping[str, Cell]) -> dict[str, float]:
    """By level: a barrier waits for the slowest island in every round."""
    return {level: found[SYNC].clock_s[0] / min(speeds) for level, speeds in SPEEDS.items()}


def table(found: Mapping[str, Cell]) -> str:
    """Markdown: loss, difference from sync by seed, and the virtual time against sync's at the same speeds."""
    head = "| schedule | speeds | rate/momentum | loss, mean | against sync, mean | ... by seed | virtual s | sync's |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    times = sync_clock_s(found)
    for name, cell in sorted(found.items(), key=lambda item: list(SPEEDS).index(item[1].level)):
        outer = "{:g}/{:g}".format(*RATES[cell.schedule])
        by_seed = " ".join(f"{difference:+.4f}" for difference in cell.differences)
        if name == SYNC:
            lines.append(f"| {SYNC} | any | {outer} | {fmean(cell.losses):.4f} | | | | |")
            continue
        loss = f"{fmean(cell.losses):.4f} | {fmean(cell.differences):+.4f} | {by_seed}"
        clocks = f"{fmean(cell.clock_s):.0f} | {times[cell.level]:.0f}"
        lines.append(f"| {cell.schedule} | {cell.level} | {outer} | {loss} | {clocks} |")
    return "\n".join(lines)


def tune(lab: Lab) -> None:
    """Search the grid at the strongest heterogeneity, and print its table; the last line is a JSON object."""
    tried: dict[str, dict[str, float]] = {}
    for schedule, grid in GRID.items():
        ways = {f"{lr:g}/{momentum:g}": method(schedule, EXTREME, (lr, momentum)) for lr, momentum in grid}
        tried[schedule] = {text: lab.loss(f"{schedule} {text}", one, SEARCH_SEED) for text, one in ways.items()}
    print("\n| schedule | loss by rate/momentum |\n|---|---|")
    for schedule, losses in tried.items():
        best = min(losses, key=losses.__getitem__)
        shown = ", ".join(
            f"{'**' * (text == best)}{text} {loss:.4f}{'**' * (text == best)}" for text, loss in losses.items()
        )
        print(f"| {schedule} | {shown} |")
    print(json.dumps({"benchmark": "async_table", "seed": SEARCH_SEED, "speeds": EXTREME, "search": tried}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("Asynchronous schedules against synchronous DiLoCo.")
    parser.add_argument("--tune", action="store_true", help=f"search the outer rates, on seed {SEARCH_SEED}")
    parser.add_argument("--levels", default=",".join(SPEEDS), help="of heterogeneity; default all")
    parser.add_argument("--schedules", default=",".join(FREE), help="that are compared with sync; default all")
    given = parser.parse_args(argv)
    _, seeds = opened(given)
    lab = Lab(given.to, QUICK_ROUNDS if given.quick else SCALE)
    if given.tune:
        tune(lab)
        return 0
    found = trained(lab, seeds, cells(given.schedules.split(","), given.levels.split(",")))
    conclude(
        lab,
        benchmark="async_table",
        seeds=seeds,
        losses={name: cell.losses for name, cell in found.items()},
        text=table(found),
        orders={name: order for name, order in ORDERS.items() if {order.better, order.worse} <= found.keys()},
        more={
            "cells": {name: cell.figures() for name, cell in found.items()},
            "sync_clock_s": sync_clock_s(found),
            "speeds": SPEEDS,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
