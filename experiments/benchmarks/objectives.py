"""Every preference objective on the same pairs: accuracy, margin and divergence, with its own settings as shipped.

    python -m experiments.benchmarks.objectives [--seeds 0,1,2] [--quick] [--to DIR]

Pairs are two answers of the pre-trained policy to each prompt, of which the friendlier one is chosen. No order is
expected: the rate is the same for all, and right for few.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diloco.merge import Mean
from diloco.workloads.judges import sentiment
from diloco.workloads.objectives import OBJECTIVES
from diloco.workloads.online import Online
from diloco.workloads.preference import Preference
from experiments.benchmarks import align
from experiments.benchmarks.align import Policies
from experiments.benchmarks.lab import opened, options
from experiments.pairs import answered
from experiments.soups import Kitchen

PROMPTS, QUICK_PROMPTS = 600, 24


def pairs(policies: Policies, seed: int, prompts: int, *, completions: int = 2) -> Path:
    """Pairs of answers of a seed's policy, in a file, made unless it is there."""
    path = policies.lab.folder / f"pairs_{seed}_{prompts}_{completions}.jsonl"
    if not path.is_file():
        workload = Online(model=str(policies.start(seed)), completion_tokens=policies.size.completion_tokens)
        corpus = workload.corpus(policies.data(1), seed=seed, shards=1)
        model = workload.build_model(seed)
        rows = corpus.assignment[0][:prompts].tolist()
        found = answered(model, corpus, rows, sentiment, workload, completions=completions, seed=seed)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for _, row in found), encoding="utf-8")
        temporary.rename(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("Every preference objective on the same pairs.").parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OBJECTIVES}
    for seed in seeds:
        file = pairs(policies, seed, QUICK_PROMPTS if given.quick else PROMPTS)
        start = str(policies.start(seed))
        judged = Online(model=start, completion_tokens=policies.size.completion_tokens)
        for name in OBJECTIVES:
            config = policies.config(seed, Preference(model=start, objective=name), lr=3e-4, batch=16, eval_every=0)
            config = replace(config, data=replace(config.data, files=[str(file)], validation_fraction=0.2))
            run = lab.kept(config)
            told = [r for r in lab.records(config) if r["event"] == "evaluation"][-1]
            (values,) = Kitchen([run], Mean()).ingredients.values()
            kl = policies.measure(judged, seed, values)
            row = {"accuracy": told["eval/accuracy"], "margin": told["eval/margin"], **kl}
            found[name].append(row)
            print(f"  seed {seed}  {name:14} {row}", flush=True)
    assert all(np.isfinite(row["margin"]) for rows in found.values() for row in rows)
    text = align.rows(found, ["accuracy", "margin", "kl", "reward"])
    align.conclude(lab, benchmark="objectives", seeds=seeds, size=policies.size, found=found, text=text, orders={})
    return 0


if __name__ == "__main__":
    sys.exit(main())
