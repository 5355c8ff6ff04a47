"""Rewarded soups: two experts, one friendly and one brief, and the line between them beside runs on mixed rewards.

    python -m experiments.benchmarks.soup_front [--seeds 0,1,2] [--quick] [--to DIR]

REINFORCE from one policy on sentiment, on brevity, and on (1 - w) sentiment + w brevity for w = .25, .5, .75, each on
as many prompts; the soups of the two experts with the same weights (arXiv:2306.04488).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diloco.merge import Mean, MeanBy
from diloco.workloads.judges import Answer, brevity, sentiment
from diloco.workloads.online import Online, Update
from experiments.benchmarks import align
from experiments.benchmarks.align import Policies
from experiments.benchmarks.lab import opened, options
from experiments.soups import Kitchen

SHARES = (0.25, 0.5, 0.75)


def _mixed(share: float) -> Callable[[Sequence[Answer]], list[float]]:
    def judge(answers: Sequence[Answer]) -> list[float]:
        pairs = zip(sentiment(answers), brevity(answers), strict=True)
        return [(1 - share) * friendly + share * brief for friendly, brief in pairs]

    return judge


mixed_25, mixed_50, mixed_75 = map(_mixed, SHARES)  # judges of the runs, by name


def trained(policies: Policies, seed: int, judge: str) -> Path:
    """The run from the policy of a seed that this judge taught."""
    size = policies.size
    workload = Online(
        model=str(policies.start(seed)),
        judge=judge,
        update=Update.reinforce,
        beta=0.02,
        completion_tokens=size.completion_tokens,
    )
    config = policies.config(seed, workload, inner_steps=2 * size.steps, eval_every=0)
    return policies.lab.kept(config)


def _gain(found: Mapping[str, Sequence[Mapping[str, float]]], share: float, index: int) -> float:
    """Of the run on a mixed reward over what it began with."""
    run, before = found[f"run {share:g}"][index], found["before"][index]
    return (1 - share) * (run["friendly"] - before["friendly"]) + share * (run["brief"] - before["brief"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("The front of rewarded soups beside runs on mixed rewards.").parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    found: dict[str, list[dict[str, float]]] = {}
    gaps: dict[float, list[float]] = {share: [] for share in SHARES}
    for seed in seeds:
        kitchen = Kitchen(
            [trained(policies, seed, judge) for judge in ("sentiment", "brevity")], Mean(by=MeanBy.examples)
        )
        names = list(kitchen.ingredients)

        def both(figures: dict[str, float], names: list[str] = names) -> dict[str, float]:
            return {kind: figures[f"{name}/reward"] for kind, name in zip(("friendly", "brief"), names, strict=True)}

        measured = {"before": both(kitchen.measure(kitchen.start))}
        for share in (0.0, *SHARES, 1.0):
            measured[f"soup {share:g}"] = both(kitchen.measure(kitchen.soup([1 - share, share])))
        for share in SHARES:
            judge = f"experiments.benchmarks.soup_front:mixed_{100 * share:.0f}"
            (alone,) = Kitchen([trained(policies, seed, judge)], Mean()).ingredients.values()
            measured[f"run {share:g}"] = both(kitchen.measure(alone))
            mixed = [
                (1 - share) * one["friendly"] + share * one["brief"]
                for one in (measured[f"soup {share:g}"], measured[f"run {share:g}"])
            ]
            gaps[share].append(mixed[0] - mixed[1])
        for name, row in measured.items():
            found.setdefault(name, []).append(row)
            print(f"  seed {seed}  {name:10} {row}", flush=True)
    orders = {
        f"the soup earns at least 95 % of the run's gain, w = {share:g}": [
            gap + 0.05 * _gain(found, share, i) for i, gap in enumerate(gaps[share])
        ]
        for share in SHARES
    }
    text = align.rows(found, ["friendly", "brief"])
    align.conclude(lab, benchmark="soup_front", seeds=seeds, size=policies.size, found=found, text=text, orders=orders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
