"""DiLoCo's ablations at equal inner steps a worker: dropped contributions, shards by domain, number of islands.

    python -m experiments.benchmarks.ablations [--seeds 0,1,2] [--quick] [--to DIR]

All with H=10, and the outer rate and momentum that `experiments.benchmarks.learning` found for four islands on seed
0; nothing is tuned anew. With the same `--to`, runs that both have are not done twice. The last line is a JSON object.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from diloco.dealing import ShardSplit
from diloco.merge import MeanBy
from experiments.benchmarks.lab import Method, Order, arguments, conclude, table

BASE = "4 islands"
# A perplexity is exp(loss), so a relative cost of 2.1 % (arXiv:2311.08105, section 3.4) is this many nats a byte.
PAPER_COST = math.log(1.021)

DILOCO = Method(islands=4, inner_steps=10, outer_lr=0.7, momentum=0.8)
AVERAGES = Method(islands=4, inner_steps=10)  # the outer optimizer adds nothing to the mean
METHODS = {
    BASE: DILOCO,
    **{f"{p:.0%} dropped": replace(DILOCO, drop_probability=p) for p in (0.1, 0.3, 0.5)},
    "plain averages": AVERAGES,
    "plain averages, 50% dropped": replace(AVERAGES, drop_probability=0.5),
    "shards by domain": replace(DILOCO, split=ShardSplit.domain, by=MeanBy.examples),
    "one worker": Method(),
    "1 island": replace(DILOCO, islands=1),
    "2 islands": replace(DILOCO, islands=2),
    "8 islands": replace(DILOCO, islands=8),
}
ORDERS = {"50 % dropped costs at most 2.1 % perplexity": Order(better="50% dropped", worse=BASE, threshold=-PAPER_COST)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    lab, seeds = arguments("DiLoCo's ablations on a small model.", argv)
    losses = {name: [lab.loss(name, method, seed) for seed in seeds] for name, method in METHODS.items()}
    text = table(losses, against=BASE)
    conclude(lab, benchmark="ablations", seeds=seeds, losses=losses, text=text, orders=ORDERS, more={})
    return 0


if __name__ == "__main__":
    sys.exit(main())
