"""Routing of DiPaCo at equal inner steps: how documents come to paths, and how often a path is chosen.

    python -m experiments.benchmarks.dipaco_routing [--seeds 0,1,2] [--paths 4] [--quick] [--to DIR]
        [--corpus botocore | --files 'a/*.txt,b/*.txt' [--domain-field F]] [--router-fraction F] [--flat]
        [--phase-steps S] [--inner-steps H]

First half: k-means, product k-means and discriminative re-sharding (arXiv:2403.10616, section 2.4), once and twice.
The paper's order is discriminative < product k-means <= k-means. All are trained in the same three phases, each with
fresh optimizer state, on the data in another order: what differs is which router deals the documents in a phase. Paths
can only score documents once they differ: phases of 130 steps are too short for that with modules that are shared.
A router that stays is not fitted again. The inner rate is constant and falls in the last phase.

    k-means            k-means          the same             the same
    product            product k-means  the same             the same
    discriminative     k-means          best path after 1    the same
    discriminative x2  k-means          best path after 1    best path after 2

Second half: the last row's model, with its path chosen once a document, or every 64, 32 or 16 tokens by a token router
(`dipaco.evaluate`). The paper's order is that more often is better.

Documents that score paths are in no phase's shards; only the pre-training that all begin with has read them.
All are measured on the same whole documents, without the first `PREFIX_TOKENS` bytes, by which a router chooses. The
last line is a JSON object; `purity` is that of the last phase's router on what is held out, by true domain.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from statistics import fmean

from diloco import RunConfig
from diloco.data import CORPORA, Data
from diloco.inner import AdamW, RateSchedule
from diloco.merge import Mean, MeanBy
from dipaco.evaluate import frequencies
from dipaco.paths import Paths
from dipaco.routing import RouterKind
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from experiments.benchmarks import common, kinds
from experiments.benchmarks.lab import Lab, Method, Order, conclude, opened, options, table

PREFIX_TOKENS = 128
PHASES = 3
KMEANS, PRODUCT, ONCE, TWICE = "k-means", "product k-means", "discriminative", "discriminative, twice"
ORDERS = {
    "discriminative below product k-means": Order(better=ONCE, worse=PRODUCT, threshold=0.0),
    "product k-means at most k-means": Order(better=PRODUCT, worse=KMEANS, threshold=0.0),
    "discriminative below k-means": Order(better=ONCE, worse=KMEANS, threshold=0.0),
    "a second re-sharding does not hurt": Order(better=TWICE, worse=ONCE, threshold=-0.005),
}
EVERY = (64, 32, 16)  # tokens
OFTEN = {every: f"{TWICE}; rerouted every {every}" for every in EVERY}
ORDERS |= {f"every {every} below once": Order(better=OFTEN[every], worse=TWICE, threshold=0.0) for every in EVERY}
SCORED = {ONCE: (1,), TWICE: (1, 2)}  # the phases that begin with a re-sharding by the paths of the phase before


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The runs of the first half: a row is a chain of phases, and rows share those in which they are equal."""

    lab: Lab
    paths: int
    router_fraction: float
    flat: bool  # paths share nothing
    method: Method

    def config(self, row: str, seed: int, phase: int) -> RunConfig:
        """One phase of a row, which goes on from the one before; that is trained now unless it was."""
        base = self.lab.begun(self.method, seed)
        before = self.lab.kept(self.config(row, seed, phase - 1)) if phase else None
        return replace(
            base,
            seed=seed + 100 * phase,  # another order of the data
            init_from=str(before) if before else base.init_from,
            inner=self._inner(last=phase == PHASES - 1),
            workload=self._workload(row, phase, before),
            layout=Paths(levels=[self.paths], private=["."]) if self.flat else Paths(levels=[isqrt(self.paths)] * 2),
            schedule=PathRounds(replicas=1, rescale=False),  # as in `dipaco_table`: with few rounds it costs
            merge=Mean(by=MeanBy.examples),
        )

    def _inner(self, *, last: bool) -> AdamW:
        scale = self.lab.scale
        rate = RateSchedule.cosine if last else RateSchedule.constant
        return AdamW(lr=self.method.lr, warmup_steps=scale.warmup_steps, rate=rate)

    def _workload(self, row: str, phase: int, before: Path | None) -> RoutedLM:
        settings = RoutedLM(
            model="micro", prefix_tokens=PREFIX_TOKENS, router_fraction=self.router_fraction, balance=1.5
        )
        if before is None:
            return replace(settings, router=RouterKind.product if row == PRODUCT else RouterKind.kmeans)
        if phase in SCORED.get(row, ()):
            return replace(settings, router=RouterKind.discriminative, scorer=str(before))
        return replace(settings, router=RouterKind.file, router_file=str(before / "export" / "router"))


def first_half(sharding: Sharding, seeds: Sequence[int]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Losses by row and seed after the last phase, and the mean purity of each row's last router."""
    losses: dict[str, list[float]] = {KMEANS: [], PRODUCT: [], ONCE: [], TWICE: []}
    purity: dict[str, list[float]] = {name: [] for name in losses}
    for seed in seeds:
        for name, found in losses.items():
            last = sharding.config(name, seed, PHASES - 1)
            sharding.lab.kept(last)
            found.append(sharding.lab.loss(name, sharding.method, seed, last))
            purity[name].append(sharding.lab.summary(last)["data"]["routing"]["validation"]["purity"])
    return losses, {name: round(fmean(found), 4) for name, found in purity.items()}


def second_half(sharding: Sharding, seeds: Sequence[int], *, quick: bool) -> dict[str, list[float]]:
    """Losses of the last row's model by how often a token router chooses the path, by seed."""
    losses: dict[str, list[float]] = {name: [] for name in OFTEN.values()}
    for seed in seeds:
        run = sharding.lab.kept(sharding.config(TWICE, seed, PHASES - 1))
        found = frequencies(run, EVERY, steps=2, documents=8) if quick else frequencies(run, EVERY)
        for every, name in OFTEN.items():
            losses[name].append(found[str(every)])
            print(f"  seed {seed}  {name:44} {found[str(every)]:.4f}", flush=True)
    return losses


def data(given: Namespace) -> Data:
    """Where the documents come from: by default as many kinds of text as there are paths, or all of them."""
    if given.corpus:
        return Data(corpus=given.corpus)
    if given.files:
        return Data(files=[pattern for pattern in given.files.split(",") if pattern], domain_field=given.domain_field)
    texts = kinds.files(given.to.absolute() / "kinds", min(given.paths, len(kinds.KINDS)))
    return Data(files=[str(path) for path in texts], domain_field="domain")


def more_options(parser: ArgumentParser) -> None:
    """What is exchanged to see where routing matters."""
    parser.add_argument("--paths", type=common.positive, default=4, help="a square number of them (4)")
    parser.add_argument("--corpus", choices=sorted(CORPORA), help="instead of the kinds of text of dipaco_table")
    parser.add_argument("--files", default="", help="instead: paths or globs with commas between; a file is a domain")
    parser.add_argument("--domain-field", default="", help="of rows of .jsonl or .parquet files, instead of the file")
    parser.add_argument("--router-fraction", type=float, default=0.1, help="of the documents, held out to score (.1)")
    parser.add_argument("--flat", action="store_true", help="paths share nothing, as in the paper's alternations")
    parser.add_argument("--phase-steps", type=common.positive, default=400, help="of a path in each phase (400)")
    parser.add_argument("--inner-steps", type=common.positive, default=10, help="H (10)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("How documents come to DiPaCo's paths, on a small model.")
    more_options(parser)
    given = parser.parse_args(argv)
    if given.paths == 1 or isqrt(given.paths) ** 2 != given.paths:
        parser.error(f"--paths {given.paths}: product k-means and two equal levels need a square, such as 4, 9 or 16")
    if given.phase_steps % given.inner_steps:
        parser.error(f"--phase-steps {given.phase_steps} is no whole number of rounds of {given.inner_steps} steps")
    lab, seeds = opened(given, data(given))
    steps = lab.scale.steps if given.quick else given.phase_steps
    lab.scale = replace(lab.scale, steps=steps, sequence_length=128)  # also of what is scored: short pieces take long
    method = Method(islands=given.paths, inner_steps=given.inner_steps, outer_lr=0.7, momentum=0.8)
    sharding = Sharding(
        lab=lab, paths=given.paths, router_fraction=given.router_fraction, flat=given.flat, method=method
    )
    losses, purity = first_half(sharding, seeds)
    losses |= second_half(sharding, seeds, quick=given.quick)
    text = table(losses, against=KMEANS)
    settings = {key: vars(given)[key] for key in ("paths", "router_fraction", "flat", "phase_steps")}
    more = {"purity": purity, "corpus": given.corpus or given.files or "kinds", **settings}
    conclude(lab, benchmark="dipaco_routing", seeds=seeds, losses=losses, text=text, orders=ORDERS, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
