"""DiPaCo against dense and DiLoCo at equal inner steps a path: what do paths, and their data, bring?

    python -m experiments.benchmarks.dipaco_table [--seeds 0,1,2] [--paths 4] [--quick] [--to DIR]

The rows of arXiv:2403.10616's table on a small model and as many kinds of text as there are paths (`kinds`): a dense
model of a path's size, DiLoCo with as many workers as there are paths, a flat mixture (nothing shared), DiPaCo with two
levels, the same with the embedding private to each path, and the dense model with as many times the steps. DiPaCo's and
the mixture's documents go to paths by their true domains, and DiPaCo's also by the shipped router; where there are more
paths than kinds, only by the router. The paper's sqrt(P) rescale of steps is a row of its own: with 40 rounds it costs
more than it brings (nothing is shared in the mixture, so it has none). All are measured on the same whole documents,
without the first `PREFIX_TOKENS` bytes, by which the router chooses. The last line is a JSON object; `purity` is that
of the router on what is held out.

`--quick`: one seed, half the steps, and the rows that the last line tells of; five minutes on two free cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from diloco import RunConfig
from diloco.data import Data
from diloco.merge import Mean, MeanBy
from dipaco.paths import Paths
from dipaco.routing import RouterKind
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from experiments.benchmarks import common, kinds
from experiments.benchmarks.lab import FULL, Lab, Method, Order, conclude, opened, options, table

PREFIX_TOKENS = 128
DENSE, DILOCO, FLAT, DIPACO, SHIPPED, PRIVATE, RESCALED, LONG = (
    "dense",
    "DiLoCo",
    "flat mixture",
    "DiPaCo, true domains",
    "DiPaCo, shipped router",
    "DiPaCo, true domains, own embeddings",
    "DiPaCo, true domains, sqrt(P) rescale",
    "dense, as many times the steps",
)
KEYS = {"dipaco": DIPACO, "diloco": DILOCO, "dense": DENSE, "flat": FLAT}  # of the last line
ORDERS = {
    "true domains: at least .03 below DiLoCo": Order(better=DIPACO, worse=DILOCO, threshold=0.03),
    "shipped router: below DiLoCo": Order(better=SHIPPED, worse=DILOCO, threshold=0.0),
    "DiLoCo: below dense": Order(better=DILOCO, worse=DENSE, threshold=0.0),
}
QUICK_SCALE = replace(FULL, steps=200)


def rows(paths: int, *, quick: bool) -> list[str]:
    """Which are measured, in order."""
    known = [DENSE, DILOCO, FLAT, DIPACO, SHIPPED, PRIVATE, RESCALED, LONG]
    left_out = {PRIVATE, RESCALED, LONG} if quick else set()
    if paths > len(kinds.KINDS):
        left_out |= {FLAT, DIPACO, PRIVATE, RESCALED}
    return [name for name in known if name not in left_out]


def levels(paths: int) -> list[int]:
    """Two of them, as square as can be: 2 x 2, 2 x 4, 4 x 4."""
    first = max(count for count in range(1, paths + 1) if paths % count == 0 and count * count <= paths)
    return [first, paths // first]


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
    layout = Paths(levels=levels(paths), private=["embed"] if name == PRIVATE else [])
    if name == FLAT:
        layout = Paths(levels=[paths], private=["."])
    merge = Mean(by=MeanBy.examples)
    schedule = PathRounds(replicas=1, rescale=name in (FLAT, RESCALED))
    return method, replace(base, workload=routed, layout=layout, schedule=schedule, merge=merge)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("DiPaCo against dense and DiLoCo on a small model.")
    parser.add_argument("--paths", type=common.positive, default=4, help="how many, no prime number (4)")
    given = parser.parse_args(argv)
    if levels(given.paths)[0] == 1:
        parser.error(f"--paths {given.paths} is no product of two levels: use 4, 8 or 16")
    seeds = opened(given)[1]
    texts = kinds.files(given.to.absolute() / "kinds", min(given.paths, len(kinds.KINDS)))
    data = Data(files=[str(path) for path in texts], domain_field="domain")
    lab = Lab(given.to, QUICK_SCALE if given.quick else FULL, data)
    losses: dict[str, list[float]] = {name: [] for name in rows(given.paths, quick=given.quick)}
    purity: list[float] = []
    for seed in seeds:
        for name, found in losses.items():
            method, config = chosen(lab, name, seed, given.paths)
            found.append(lab.loss(name, method, seed, config))
            if name == SHIPPED:
                purity.append(lab.summary(config)["data"]["routing"]["validation"]["purity"])
    means = {key: round(fmean(losses[name]), 4) for key, name in KEYS.items() if name in losses}
    more = {**means, "purity": round(fmean(purity), 4), "paths": given.paths}
    text = table(losses, against=DILOCO)
    orders = {name: order for name, order in ORDERS.items() if order.better in losses}
    conclude(
        lab, benchmark=f"dipaco_table_{given.paths}", seeds=seeds, losses=losses, text=text, orders=orders, more=more
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
