"""Does DiLoCo learn? One worker, four islands, data parallel and four times the steps, at equal inner steps a worker.

    python -m experiments.benchmarks.learning [--seeds 0,1,2] [--quick] [--to DIR]

The outer rate and momentum of each H, and data parallel's own best inner rate, are searched on seed 0 alone and
then used for all seeds. Data parallel is one island with four times the batch: the same maths as four DDP workers.
The last line is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.benchmarks.lab import FULL, Lab, Method, Order, arguments, conclude, table

ISLANDS = 4
SEARCH_SEED = 0
PAPER = (0.7, 0.9)  # outer rate and momentum of arXiv:2311.08105
ROUNDS = (PAPER, (0.7, 0.8), (0.7, 0.5), (1.0, 0.5))
GRID = {5: ROUNDS, 10: ROUNDS, 50: ROUNDS, 1: (PAPER, (1.0, 0.0))}  # H -> outer rates and momenta tried
RATES = (2e-3, 4e-3, 8e-3)  # inner rates tried for data parallel; the first is the one that all others have

ONE, PARALLEL, PARALLEL_BEST, SEQUENTIAL = (
    "one worker",
    "data parallel, 4x batch, shared rate",
    "data parallel, 4x batch, its best rate",
    "one worker, 4x steps",
)
ORDERS = {
    "DiLoCo H=10 below one worker": Order(better="DiLoCo H=10", worse=ONE, threshold=0.08),
    "DiLoCo H=50 with .7/.9 below one worker": Order(better="DiLoCo H=50, .7/.9", worse=ONE, threshold=0.03),
    "DiLoCo H=10 below H=50": Order(better="DiLoCo H=10", worse="DiLoCo H=50", threshold=0.03),
    "4x sequential steps below DiLoCo H=10": Order(better=SEQUENTIAL, worse="DiLoCo H=10", threshold=0.05),
}


def diloco(inner_steps: int, outer: tuple[float, float]) -> Method:
    """Four islands that exchange every `inner_steps` steps; `outer` is rate and momentum."""
    return Method(islands=ISLANDS, inner_steps=inner_steps, outer_lr=outer[0], momentum=outer[1])


def searched(lab: Lab, name: str, choices: Mapping[str, Method], tried: dict[str, dict[str, float]]) -> Method:
    """The best of `choices` on the seed of the search; a benchmark at another scale takes the first."""
    if lab.scale != FULL:
        return next(iter(choices.values()))
    tried[name] = {text: lab.loss(f"{name} {text}", method, SEARCH_SEED) for text, method in choices.items()}
    return choices[min(tried[name], key=tried[name].__getitem__)]


def methods(lab: Lab, tried: dict[str, dict[str, float]]) -> dict[str, Method]:
    """What is compared, by the name in the table. Writes the losses of the search to `tried`."""
    parallel = Method(times_batch=ISLANDS)
    found = {ONE: Method()}
    for inner_steps, grid in GRID.items():
        name = f"DiLoCo H={inner_steps}"
        choices = {f"{lr:g}/{momentum:g}": diloco(inner_steps, (lr, momentum)) for lr, momentum in grid}
        found[name] = searched(lab, name, choices, tried)
    found["DiLoCo H=50, .7/.9"] = diloco(50, PAPER)
    found[PARALLEL] = parallel
    rates = {f"lr {rate:g}": replace(parallel, lr=rate) for rate in RATES}
    found[PARALLEL_BEST] = searched(lab, "data parallel, 4x batch", rates, tried)
    found[SEQUENTIAL] = Method(times_steps=ISLANDS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    lab, seeds = arguments("DiLoCo against its baselines on a small model.", argv)
    tried: dict[str, dict[str, float]] = {}
    compared = methods(lab, tried)
    losses = {name: [lab.loss(name, method, seed) for seed in seeds] for name, method in compared.items()}
    text = table(losses, against=ONE)
    more = {"search": tried}
    conclude(lab, benchmark="learning", seeds=seeds, losses=losses, text=text, orders=ORDERS, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
