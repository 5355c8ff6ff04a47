"""Events a second that the coordinator handles where islands run free: each contribution is an outer step.

    python -m experiments.benchmarks.async_events [--islands 1000] [--modules 8] [--quick]

As `coordinator` measures it: only `Coordinator.handle` is timed, in seconds of this process's CPU, and what it asks for
is answered in a random order. Told of `schedule=first_come`, plain and with everything that it can do, and of
`schedule=quorum`, whose modules are fragments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from diloco.async_.quorum import Quorum
from diloco.async_.schedule import FirstCome
from diloco.schedule import Schedule
from experiments.benchmarks import common
from experiments.benchmarks.coordinator import Game, view_of

SCHEDULES: dict[str, Schedule] = {
    "first come": FirstCome(),
    "first come, by speed, grace": FirstCome(by_speed=True, grace_s=0.01),
    "quorum": Quorum(),
}
STEPS = 24  # of a round


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("async_events", __doc__.partition("\n")[0])
    options.add_argument("--islands", type=common.positive, default=1000, help="that run free (1000)")
    options.add_argument("--modules", type=common.positive, default=8, help="modules of the store, of one path (8)")
    options.add_argument("--rounds", type=common.positive, default=4, help="of each block (4)")
    options.add_argument("--blocks", type=common.positive, default=3, help="of each schedule, in turn (3)")
    given = options.parse_args(argv)
    if given.quick:
        given.islands, given.rounds, given.blocks = 20, 2, 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if STEPS % given.modules:
        raise ValueError(f"--modules {given.modules} does not divide {STEPS}, the steps of a round")
    rates: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    for _ in range(given.blocks):
        for name, schedule in SCHEDULES.items():
            modules = {"modules": given.modules, "modules_per_path": given.modules}
            game = Game(view_of(schedule, islands=given.islands, steps=STEPS, **modules), schedule)
            game.play(1)
            block = game.play(given.rounds)
            rates[name].append(block.events / block.seconds)
    found = {name: common.median(rate) for name, rate in rates.items()}
    for name, rate in found.items():
        common.show(f"{name}, {given.islands} islands: {rate:,.0f} events/s")
    return {
        "benchmark": "async_events",
        "islands": given.islands,
        "modules": given.modules,
        "events_per_s": found,
        "lowest_events_per_s": min(found.values()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
