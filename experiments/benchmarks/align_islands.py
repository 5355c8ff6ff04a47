"""Online DPO on four islands: how much reward for how many bytes, beside one worker and data parallel?

    python -m experiments.benchmarks.align_islands [--seeds 0,1,2] [--quick] [--to DIR]

All see as many prompts: one worker takes four times the steps; data parallel four times the batch (and is reckoned to
send a gradient on each step); four islands exchange after every ten steps. The judge is a lexicon of sentiment.
`reward_at`: where the divergence from the start is the smaller one of those that islands and data parallel end with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diloco.codec import Codec, Float32, Int4, Int8
from diloco.outer import Nesterov, OuterOptimizer, Sgd
from diloco.workloads.lora import LoRA
from diloco.workloads.online import Online
from experiments.benchmarks import align
from experiments.benchmarks.align import Policies
from experiments.benchmarks.lab import opened, options

ISLANDS, H, EVALUATIONS = 4, 10, 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train."""

    islands: int = 1
    times_steps: int = 1
    times_batch: int = 1
    rank: int = 0
    lr: float = 3e-4
    outer: OuterOptimizer | None = None
    codec: Codec = field(default_factory=Float32)  # both ways


ROWS = {
    "one worker": Row(times_steps=ISLANDS),
    "data parallel": Row(times_batch=ISLANDS),
    "4 islands, H=10, 8 bits": Row(islands=ISLANDS, outer=Nesterov(lr=0.7, momentum=0.5), codec=Int8()),
    "4 islands, H=10, LoRA in 4 bits": Row(
        islands=ISLANDS, outer=Nesterov(lr=0.7, momentum=0.5), rank=4, lr=3e-3, codec=Int4()
    ),
    "data parallel, LoRA": Row(times_batch=ISLANDS, rank=4, lr=3e-3),
}
ONE, PARALLEL, DILOCO, LORA, PARALLEL_LORA = ROWS


def trained(policies: Policies, row: Row, seed: int) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """What came out of a row, and (kl, reward) on the way."""
    size = policies.size
    workload = Online(
        model=str(policies.start(seed)),
        completion_tokens=size.completion_tokens,
        lora=LoRA(rank=row.rank),
    )
    h = min(H, size.steps)
    rounds = size.steps * row.times_steps // h
    config = policies.config(
        seed,
        workload,
        islands=row.islands,
        inner_steps=h,
        rounds=rounds,
        batch=size.batch * row.times_batch,
        lr=row.lr,
        outer=row.outer or Sgd(lr=1.0),
        eval_every=max(1, rounds // EVALUATIONS),
    )
    config = replace(config, codec=row.codec, codec_down=row.codec)
    summary: dict[str, Any] = policies.lab.summary(config)
    steps, parameters = rounds * h, summary["trainable_parameters"]
    parallel = 2 * 4 * parameters * (ISLANDS - 1) * steps  # a ring all-reduce of the gradients on every step
    sent = parallel if row.times_batch > 1 else summary["bytes_sent"] if row.islands > 1 else 0
    figures = {"reward": summary["reward_after"], "kl": summary["kl"], "sent_mb": sent / 1e6}
    return figures, align.curve(policies.lab.records(config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("Online DPO on four islands beside data parallel.").parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for seed in seeds:
        curves = {}
        for name, row in ROWS.items():
            figures, curves[name] = trained(policies, row, seed)
            found[name].append(figures)
            print(f"  seed {seed}  {name:24} {figures}", flush=True)
        least = min(found[name][-1]["kl"] for name in (DILOCO, PARALLEL))
        for name in ROWS:
            found[name][-1] |= {"at_kl": least, "reward_at": align.reward_at(curves[name], least)}
    by_seed = range(len(seeds))
    at = {name: [found[name][i]["reward_at"] for i in by_seed] for name in ROWS}
    bytes_ = {name: [found[name][i]["sent_mb"] for i in by_seed] for name in ROWS}
    orders = {
        "islands earn at least 98 % of data parallel's reward at equal divergence": [
            mine - 0.98 * theirs for mine, theirs in zip(at[DILOCO], at[PARALLEL], strict=True)
        ],
        "at least 10 times fewer bytes": [
            theirs / mine - 10 for mine, theirs in zip(bytes_[DILOCO], bytes_[PARALLEL], strict=True)
        ],
        "adapters: at least 1,000 times fewer bytes than data parallel of all weights": [
            theirs / mine - 1000 for mine, theirs in zip(bytes_[LORA], bytes_[PARALLEL], strict=True)
        ],
    }
    text = align.rows(found, ["reward", "kl", "reward_at", "sent_mb"])
    align.conclude(
        lab, benchmark="align_islands", seeds=seeds, size=policies.size, found=found, text=text, orders=orders
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
