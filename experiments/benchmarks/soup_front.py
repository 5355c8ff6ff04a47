"""Rewarded soups: two experts, one friendly and one brief, and the line between them beside runs on mixed rewards.

    python -m experiments.benchmarks.soup_front [--seeds 0,1,2] [--quick] [--to DIR]

REINFORCE from one policy on sentiment, on brevity (scaled, so that both have as much to give), and on (1 - w) sentiment
+ w brevity for w = .25, .5, .75, each on as many prompts; soups of the two experts (arXiv:2306.04488). Of the front the
point counts that is best by the mixed reward, which a user would choose.
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

HERE = "experiments.benchmarks.soup_front"  # also where this is the main module
SHARES = (0.25, 0.5, 0.75)
SOUPS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
SCALE = 0.2  # of brevity


def brief(answers: Sequence[Answer]) -> list[float]:
    """What a short answer is worth here."""
    return [SCALE * reward for reward in brevity(answers)]


def _mixed(share: float) -> Callable[[Sequence[Answer]], list[float]]:
    def judge(answers: Sequence[Answer]) -> list[float]:
        pairs = zip(sentiment(answers), brief(answers), strict=True)
        return [(1 - share) * friendly + share * short for friendly, short in pairs]

    return judge


blend_25, blend_50, blend_75 = map(_mixed, SHARES)  # judges of the runs, by name


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
    return _worth(found[f"run {share:g}"][index], share) - _worth(found["before"][index], share)


def _worth(row: Mapping[str, float], share: float) -> float:
    return (1 - share) * row["friendly"] + share * row["brief"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("The front of rewarded soups beside runs on mixed rewards.").parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    found: dict[str, list[dict[str, float]]] = {}
    gaps: dict[float, list[float]] = {share: [] for share in SHARES}
    for seed in seeds:
        kitchen = Kitchen(
            [trained(policies, seed, judge) for judge in ("sentiment", f"{HERE}:brief")], Mean(by=MeanBy.examples)
        )
        names = list(kitchen.ingredients)

        def both(figures: dict[str, float], names: list[str] = names) -> dict[str, float]:
            return {kind: figures[f"{name}/reward"] for kind, name in zip(("friendly", "brief"), names, strict=True)}

        measured = {"before": both(kitchen.measure(kitchen.start))}
        for share in SOUPS:
            measured[f"soup {share:g}"] = both(kitchen.measure(kitchen.soup([1 - share, share])))
        for share in SHARES:
            judge = f"{HERE}:blend_{100 * share:.0f}"
            (alone,) = Kitchen([trained(policies, seed, judge)], Mean()).ingredients.values()
            measured[f"run {share:g}"] = both(kitchen.measure(alone))
            soups = [_worth(measured[f"soup {s:g}"], share) for s in SOUPS]
            gaps[share].append(max(soups) - _worth(measured[f"run {share:g}"], share))
        for name, row in measured.items():
            found.setdefault(name, []).append(row)
            print(f"  seed {seed}  {name:10} {row}", flush=True)
    orders = {
        f"the best soup earns at least 95 % of the run's gain, w = {share:g}": [
            gap + 0.05 * _gain(found, share, i) for i, gap in enumerate(gaps[share])
        ]
        for share in SHARES
    }
    text = align.rows(found, ["friendly", "brief"])
    align.conclude(lab, benchmark="soup_front", seeds=seeds, size=policies.size, found=found, text=text, orders=orders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
