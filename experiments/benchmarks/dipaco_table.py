"""DiPaCo against dense and DiLoCo at equal inner steps a path: what do paths, and their data, bring?

    python -m experiments.benchmarks.dipaco_table [--seeds 0,1,2] [--paths 4] [--quick] [--to DIR]

The rows of arXiv:2403.10616's table on a small model: a dense one of a path's size, DiLoCo with as many workers as
there are paths, a flat mixture (nothing shared), DiPaCo with two levels, the same with the embedding private to each
path, and the dense model with as many times the steps. DiPaCo's and the mixture's documents go to paths by their true
domains, and DiPaCo's also by the shipped router. All are measured on the same whole documents, without the first
`PREFIX_TOKENS` bytes, by which the router chooses. The last line is a JSON object; `purity` is that of the router on
what is held out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from diloco import RunConfig
from diloco.layout import Layout
from diloco.merge import Mean, MeanBy
from dipaco.paths import Paths
from dipaco.routing import RouterKind
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from experiments.benchmarks import common
from experiments.benchmarks.lab import Lab, Method, Order, conclude, opened, options, table

PREFIX_TOKENS = 128
DENSE, DILOCO, FLAT, DIPACO, SHIPPED, PRIVATE, LONG = (
    "dense",
    "DiLoCo",
    "flat mixture",
    "DiPaCo, true domains",
    "DiPaCo, shipped router",
    "DiPaCo, true domains, own embeddings",
    "dense, as many times the steps",
)
KEYS = {"dipaco": DIPACO, "diloco": DILOCO, "dense": DENSE, "flat": FLAT}  # of the last line
ORDERS = {
    "true domains: at least .03 below DiLoCo": Order(better=DIPACO, worse=DILOCO, threshold=0.03),
    "shipped router: below DiLoCo": Order(better=SHIPPED, worse=DILOCO, threshold=0.0),
}


def chosen(lab: Lab, name: str, seed: int, paths: int) -> tuple[Method, RunConfig]:
    """A row's run: all start from the same pre-training."""
    method = Method(islands=paths, inner_steps=10, outer_lr=0.7, momentum=0.8)
    if name in (DENSE, LONG):
        method = Method(times_steps=paths if name == LONG else 1)
    base = lab.begun(method, seed)
    router = RouterKind.kmeans if name == SHIPPED else RouterKind.domains
    routed = RoutedLM(model="micro", router=router, prefix_tokens=PREFIX_TOKENS, balance=1.5 if name == SHIPPED else 0)
    if name in (DENSE, LONG, DILOCO):
        return method, replace(base, workload=replace(routed, paths=1))
    levels = [2, paths // 2]
    layout: Layout = Paths(levels=[paths], private=["."]) if name == FLAT else Paths(levels=levels)
    if name == PRIVATE:
        layout = Paths(levels=levels, private=["embed"])
    merge = Mean(by=MeanBy.examples)
    return method, replace(base, workload=routed, layout=layout, schedule=PathRounds(replicas=1), merge=merge)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("DiPaCo against dense and DiLoCo on a small model.")
    parser.add_argument("--paths", type=common.positive, default=4, help="an even number of them (4)")
    given = parser.parse_args(argv)
    if given.paths % 2:
        parser.error(f"--paths {given.paths} is odd: the first level has two modules")
    lab, seeds = opened(given)
    losses: dict[str, list[float]] = {name: [] for name in (DENSE, DILOCO, FLAT, DIPACO, SHIPPED, PRIVATE, LONG)}
    purity: list[float] = []
    for seed in seeds:
        for name, found in losses.items():
            method, config = chosen(lab, name, seed, given.paths)
            found.append(lab.loss(name, method, seed, config))
            if name == SHIPPED:
                purity.append(lab.summary(config)["data"]["routing"]["validation"]["purity"])
    means = {key: round(fmean(losses[name]), 4) for key, name in KEYS.items()}
    more = {**means, "purity": round(fmean(purity), 4), "paths": given.paths}
    text = table(losses, against=DILOCO)
    conclude(lab, benchmark="dipaco_table", seeds=seeds, losses=losses, text=text, orders=ORDERS, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
