"""Little text, trained on for long: who overfits, and what does early stopping save?

    python -m experiments.benchmarks.dipaco_overfit [--seeds 0,1,2] [--paths 4] [--quick] [--to DIR]
        [--bytes-per-path B]

As many kinds of text as there are paths (`kinds`), cut so that a path has `--bytes-per-path` bytes to train on, as many
again for validation, and twice the steps of `dipaco_table`: some twenty epochs. A flat mixture (nothing shared) and
DiPaCo with two levels, each with and without early stopping: then `STOP_FRACTION` of a path's documents are held out,
and of each path the round counts that did best on them (arXiv:2403.10616, section 4.3: 12.39 becomes 12.22).

The last line is a JSON object. `rise`: how far the last loss is above the lowest of the curve, by method and seed;
`epochs` and `tokens_a_path`: of a path's own text; `best_rounds`: which round counts for each path, by seed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from diloco import RunConfig
from diloco.data import Data
from diloco.merge import Mean, MeanBy
from dipaco.paths import Paths
from dipaco.routing import RouterKind
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from experiments.benchmarks import common, kinds
from experiments.benchmarks.dipaco_table import PREFIX_TOKENS, levels
from experiments.benchmarks.lab import Lab, Method, Order, conclude, opened, options, table

STOP_FRACTION = 0.15
EVALUATIONS = 16
BYTES_PER_PATH = 40_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train on too little text."""

    flat: bool
    stops: bool


ROWS = {
    "flat mixture": Row(flat=True, stops=False),
    "flat mixture, early stopping": Row(flat=True, stops=True),
    "DiPaCo": Row(flat=False, stops=False),
    "DiPaCo, early stopping": Row(flat=False, stops=True),
}
FLAT, FLAT_STOPS, DIPACO, DIPACO_STOPS = ROWS
ORDERS = {
    "the mixture gains by early stopping": Order(better=FLAT_STOPS, worse=FLAT, threshold=0.0),
    "DiPaCo overfits less than the mixture": Order(better=DIPACO, worse=FLAT, threshold=0.0),
}


def chosen(lab: Lab, row: Row, seed: int, paths: int) -> tuple[Method, RunConfig]:
    """A row's run: all start from the same pre-training."""
    method = Method(islands=paths, inner_steps=10, outer_lr=0.7, momentum=0.8, times_steps=2)
    base = lab.begun(method, seed)
    routed = RoutedLM(
        model="micro",
        router=RouterKind.domains,
        prefix_tokens=PREFIX_TOKENS,
        stop_fraction=STOP_FRACTION if row.stops else 0.0,
    )
    return method, replace(
        base,
        workload=routed,
        layout=Paths(levels=[paths], private=["."]) if row.flat else Paths(levels=levels(paths)),
        schedule=PathRounds(replicas=1, rescale=False),
        merge=Mean(by=MeanBy.examples),
        eval_every=max(base.rounds // EVALUATIONS, 1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("Little text, trained on for long: overfitting and early stopping.")
    parser.add_argument("--paths", type=common.positive, default=4, help="4 or 8: there are eight kinds of text")
    parser.add_argument("--bytes-per-path", type=common.positive, default=BYTES_PER_PATH, help="to train on")
    given = parser.parse_args(argv)
    if levels(given.paths)[0] == 1 or given.paths > len(kinds.KINDS):
        parser.error(f"--paths {given.paths}: use 4, 6 or 8")
    folder = given.to.absolute() / f"kinds_{given.bytes_per_path}"
    texts = kinds.files(folder, given.paths, most_bytes=2 * given.bytes_per_path)
    lab, seeds = opened(given, Data(files=[str(path) for path in texts], domain_field="domain"))
    lab.scale = replace(lab.scale, validation_fraction=0.5)  # of so little text, or it would say little
    losses: dict[str, list[float]] = {name: [] for name in ROWS}
    rise: dict[str, list[float]] = {name: [] for name in ROWS}
    best_rounds: dict[str, list[dict[str, int]]] = {name: [] for name, row in ROWS.items() if row.stops}
    tokens_a_path: list[int] = []
    for seed in seeds:
        for name, row in ROWS.items():
            method, config = chosen(lab, row, seed, given.paths)
            losses[name].append(lab.loss(name, method, seed, config))
            curve = [record["eval/loss"] for record in lab.records(config) if record["event"] == "evaluation"]
            rise[name].append(round(curve[-1] - min(curve), 4))
            summary = lab.summary(config)
            if row.stops:
                best_rounds[name].append(summary["best_rounds"])
            else:
                tokens_a_path += summary["data"]["shard_tokens"]
    trained = 2 * lab.scale.steps * lab.scale.batch * lab.scale.sequence_length
    more = {
        "paths": given.paths,
        "tokens_a_path": round(fmean(tokens_a_path)),
        "epochs": round(trained / fmean(tokens_a_path), 1),
        "rise": rise,
        "best_rounds": best_rounds,
    }
    text = table(losses, against=FLAT)
    conclude(lab, benchmark="dipaco_overfit", seeds=seeds, losses=losses, text=text, orders=ORDERS, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
