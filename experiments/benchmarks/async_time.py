"""How long until synchronous DiLoCo's final loss? Without a barrier, against with one, on islands 1 : .9 : .5 : .2.

    python -m experiments.benchmarks.async_time [--seeds 0,1,2] [--ray] [--quick] [--to DIR]

The two methods and the setting are those of `async_table`, with an evaluation of the global weights after each round's
worth of data. The time is virtual: a step of the fastest island is a second, and nothing else takes any. With `--ray`
it is that of the clock, on Ray on this machine, where each island sleeps after each step (`runtime.slowdown`), on fewer
steps; a run's time is from the evaluation of the start.

`ratio` is synchronous time / asynchronous time until the former's last loss was first reached. `bound`: so much work,
shared by all speeds together, against rounds in which all wait for the slowest. It is no limit for `ratio`, since what
learns better reaches a loss with less work. The last line is a JSON object.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from diloco import RunConfig
from diloco.runtime.ray_cluster import RayCluster
from experiments.benchmarks.async_table import EQUAL, EXTREME, GRACE, QUICK_ROUNDS, RATES, SCALE, SPEEDS, SYNC, method
from experiments.benchmarks.lab import Lab, Method, conclude, opened, options

STEP_S = 0.2  # on Ray: the sleep after a step of the fastest island
RAY = replace(SCALE, steps=160, eval_sequences=128)
METHODS = {
    SYNC: replace(method(SYNC, EQUAL, RATES[SYNC]), speeds=SPEEDS[EXTREME], eval_every=1),
    GRACE: replace(method(GRACE, EXTREME, RATES[GRACE]), eval_every=1),
}


@dataclass(frozen=True, kw_only=True)
class Race:
    """Both methods of one seed."""

    sync_s: float  # until its last loss, or a lower one, was first measured
    async_s: float  # until this loss, or a lower one, was; infinite where it never was
    target: float  # that loss
    final: float  # what the asynchronous run ended with
    bound: float

    @property
    def ratio(self) -> float:
        """How many times faster without a barrier; 0 where the loss was never reached."""
        return self.sync_s / self.async_s

    def figures(self) -> dict[str, float | None]:
        """For the last line."""
        told = {**vars(self), "ratio": self.ratio}
        return {name: None if math.isinf(value) else round(value, 4) for name, value in told.items()}


def bound(seconds_per_step: Sequence[float]) -> float:
    """All speeds together / as many times the slowest one."""
    return sum(1 / seconds for seconds in seconds_per_step) * max(seconds_per_step) / len(seconds_per_step)


def curve(records: Sequence[dict[str, Any]], clock: str) -> list[tuple[float, float]]:
    """(seconds since the first evaluation, loss) of each evaluation, by that clock."""
    found = [(float(r[clock]), float(r["eval/loss"])) for r in records if r["event"] == "evaluation"]
    return [(time_s - found[0][0], loss) for time_s, loss in found]


def until(curve: Sequence[tuple[float, float]], target: float) -> float:
    """When a loss of at most `target` was first measured; infinite where it never was."""
    return min((time_s for time_s, loss in curve if loss <= target), default=float("inf"))


def paces(records: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds a step of each island, sleep included, over a whole run."""
    segments = [record for record in records if record["event"] == "segment"]
    found = []
    for island in sorted({record["island"] for record in segments}):
        own = [record for record in segments if record["island"] == island]
        steps = sum(record["tokens"] for record in own)  # in proportion to them, which is all that is needed
        found.append(sum(record["seconds"] for record in own) / steps)
    return found


def race(lab: Lab, seed: int, *, on_ray: bool) -> Race:
    """Train both, and compare by their clock."""
    told = {}
    for name, one in METHODS.items():
        chosen = _config(lab, one, seed, on_ray=on_ray)
        lab.loss(name, one, seed, chosen)
        told[name] = lab.records(chosen)
    curves = {name: curve(records, "time_s" if on_ray else "clock_s") for name, records in told.items()}
    seconds_per_step = paces(told[SYNC]) if on_ray else [1 / speed for speed in SPEEDS[EXTREME]]
    return compared(curves[SYNC], curves[GRACE], seconds_per_step)


def compared(
    sync: Sequence[tuple[float, float]], free: Sequence[tuple[float, float]], paces_s: Sequence[float]
) -> Race:
    """Both by the first evaluation that was as low as the last one of `sync`, which need not be its lowest."""
    target, final = sync[-1][1], free[-1][1]
    return Race(
        sync_s=until(sync, target), async_s=until(free, target), target=target, final=final, bound=bound(paces_s)
    )


def _config(lab: Lab, one: Method, seed: int, *, on_ray: bool) -> RunConfig:
    chosen = lab.begun(one, seed)
    if not on_ray:
        return chosen
    runtime = RayCluster(slowdown=[STEP_S / speed for speed in SPEEDS[EXTREME]])
    grace_s = {} if one.free is None else {"grace_s": one.free.grace_s * STEP_S}
    return replace(chosen, runtime=runtime, schedule=replace(chosen.schedule, **grace_s))


def table(races: Sequence[Race], seeds: Sequence[int]) -> str:
    """Markdown, a row a seed."""
    lines = [f"| seed | loss of {SYNC} | s | loss of {GRACE} | s until {SYNC}'s | ratio | bound |"]
    lines.append("|---|---|---|---|---|---|---|")
    for seed, found in zip(seeds, races, strict=True):
        times = f"{found.target:.4f} | {found.sync_s:.0f} | {found.final:.4f} | {found.async_s:.0f}"
        lines.append(f"| {seed} | {times} | {found.ratio:.2f} | {found.bound:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("The time until synchronous DiLoCo's loss, with a barrier and without.")
    parser.add_argument("--ray", action="store_true", help="real time, on Ray on this machine, with fewer steps")
    given = parser.parse_args(argv)
    _, seeds = opened(given)
    scale = RAY if given.ray else SCALE
    lab = Lab(given.to, QUICK_ROUNDS if given.quick else scale)
    races = [race(lab, seed, on_ray=given.ray) for seed in seeds]
    conclude(
        lab,
        benchmark="async_time_ray" if given.ray else "async_time",
        seeds=seeds,
        losses={SYNC: [found.target for found in races], GRACE: [found.final for found in races]},
        text=table(races, seeds),
        orders={},
        more={
            "ratio": round(fmean(found.ratio for found in races), 4),
            "bound": round(fmean(found.bound for found in races), 4),
            "races": [found.figures() for found in races],
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
