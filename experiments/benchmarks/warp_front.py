"""WARP: reward over divergence of REINFORCE, of the way from its start to its end, and of three iterations of WARP.

    python -m experiments.benchmarks.warp_front [--seeds 0,1,2] [--quick] [--to DIR] [--warp-lr R] [--eta E]

REINFORCE is held to an average of its own past (mu = .01), and measured on the way: its trajectory. LITI is the line
from the start to its end. WARP (arXiv:2406.16768): three times, two policies of a third of the steps each begin at
theta_init, are joined by slerp per layer, and theta_init goes eta of the way; its front is the line from the start to
the last merged weights. All see as many prompts. WARP throws away most of each step, and has a larger rate, found on
seed 0. `reward_at`: the mean over divergences that all three reach.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diloco import RunConfig
from diloco.merge import Mean, Slerp
from diloco.outer import Sgd
from diloco.workloads.online import Anchor, Online, Update
from experiments.benchmarks import align
from experiments.benchmarks.align import Policies
from experiments.benchmarks.lab import opened, options
from experiments.soups import Kitchen

ITERATIONS, POLICIES, ETA, WARP_LR = 3, 2, 0.5, 4e-4
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 5  # divergences at which fronts are compared


def configs(policies: Policies, seed: int, *, lr: float, eta: float) -> tuple[RunConfig, RunConfig]:
    """One policy alone, and WARP's iterations but the last, whose merged weights `main` does not scale back."""
    size = policies.size
    workload = Online(
        model=str(policies.start(seed)),
        update=Update.reinforce,
        anchor=Anchor.ema,
        anchor_rate=0.01,
        beta=0.05,
        completion_tokens=size.completion_tokens,
    )
    steps = 4 * size.steps  # in all
    alone = policies.config(seed, workload, inner_steps=max(1, steps // 12), rounds=12, batch=size.batch)
    warp = policies.config(
        seed,
        replace(workload, anchor=Anchor.round_ema),
        islands=POLICIES,
        inner_steps=max(1, steps // POLICIES // ITERATIONS),
        rounds=ITERATIONS - 1,
        lr=lr,
        merge=Slerp(),
        outer=Sgd(lr=eta),
    )
    return alone, warp


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = options("Fronts of REINFORCE, LITI and WARP.")
    parser.add_argument("--warp-lr", type=float, default=WARP_LR, help="inner rate of WARP's policies")
    parser.add_argument("--eta", type=float, default=ETA, help="how far WARP goes to what was merged")
    given = parser.parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    names = ("REINFORCE, trajectory", "LITI of REINFORCE", "WARP, 3 iterations")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    gaps: list[float] = []
    for seed in seeds:
        alone, warp = configs(policies, seed, lr=given.warp_lr, eta=given.eta)
        begun = lab.kept(warp)  # theta_init of the last iteration
        last = replace(warp, init_from=str(begun), rounds=1, outer=Sgd(lr=1.0), seed=seed + 100)
        curves = {names[0]: align.curve(lab.records(alone))}
        measure = Kitchen([lab.kept(alone)], Mean()).measure  # one and the same for both: alike to the sample
        for name, run in ((names[1], lab.kept(alone)), (names[2], lab.kept(last))):
            kitchen = Kitchen([run], Mean(), policies.start(seed))
            points = [measure(kitchen.soup([1.0], eta=eta)) for eta in ETAS]
            curves[name] = [(point["kl"], point["reward"]) for point in points]
        most = min(max(kl for kl, _ in curve) for curve in curves.values())
        grid = [most * (i + 1) / GRID for i in range(GRID)]
        at = {name: [align.reward_at(curve, kl) for kl in grid] for name, curve in curves.items()}
        for name, curve in curves.items():
            row = {"reward": curve[-1][1], "kl": curve[-1][0], "to_kl": most, "reward_at": float(np.mean(at[name]))}
            found[name].append(row)
            print(f"  seed {seed}  {name:24} {row}  {[(round(x, 3), round(y, 3)) for x, y in curve]}", flush=True)
        gaps.append(float(np.mean(np.subtract(at[names[2]], at[names[0]]))))
    spread = float(np.std([row["reward_at"] for row in found[names[0]]], ddof=1)) if len(seeds) > 1 else 0.0
    orders = {
        "WARP's front is not below REINFORCE's trajectory": gaps,
        f"by more than the spread over seeds ({spread:.4f})": [gap - spread for gap in gaps],
    }
    text = align.rows(found, ["reward", "kl", "to_kl", "reward_at"])
    align.conclude(lab, benchmark="warp_front", seeds=seeds, size=policies.size, found=found, text=text, orders=orders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
