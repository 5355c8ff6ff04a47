"""Can one bad island spoil a run? One of five sends poison: to a plain mean, a trimmed mean, and a filter of norms.

    python -m experiments.benchmarks.poisoned [--seeds 0,1,2] [--quick] [--to DIR]

The poison is put in where the store takes a contribution in, so that it judges, merges and counts it as any other. A
run diverged if it ends above the loss that it began with. The filter of norms is off but for its own rows. The last
line is one JSON object.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from diloco import RunConfig
from diloco.config import register
from diloco.merge import Mean, Merge, TrimmedMean
from diloco.messages import Contribution, Tensors, Verdict
from diloco.runtime.base import Backend, Job, Store
from diloco.runtime.local import Local
from diloco.store import ModuleStore
from experiments.benchmarks.lab import QUICK, Lab, Method, Scale, conclude, options, table

ISLANDS = 5
CONSTANT = 0.1  # in place of every value: 7 times as long as an honest contribution in the first round, 80 in the last
TIMES = -10.0
WITHIN = 0.02  # of the loss without poison: what is wanted
MOST_LOSS = 100.0  # that is told of a run that diverged
SCALE = Scale(steps=200, pretrain_steps=100, batch=4, eval_sequences=256)
LONG = Method(islands=ISLANDS, inner_steps=50, outer_lr=0.7, momentum=0.5)
SHORT = Method(islands=ISLANDS, inner_steps=10, outer_lr=0.7, momentum=0.8)
LATER = {LONG.inner_steps: 2, SHORT.inner_steps: 5}  # the round from which it is bad, where norms are known by then
CLEAN, TRIMMED, FILTERED, SHORT_CLEAN = "mean", "trimmed mean", "mean, filter", "H=10: mean"


class Poison(Enum):
    """What a bad island sends in place of its contribution."""

    flipped = "flipped"  # minus ten times it
    constant = "constant"
    nan = "nan"


@dataclass(kw_only=True)
class Poisoned(Local):
    """Runtime `local`, and an island from which poison comes."""

    poison: Poison = Poison.flipped
    bad: int = 1  # which island
    first_round: int = 0  # from which on

    def open(self, job: Job) -> Backend:
        """The same with another store."""
        return super().open(_PoisonedJob(**vars(job), sender=self))


@dataclass(frozen=True, kw_only=True)
class _PoisonedJob(Job):
    sender: Poisoned

    def make_store(self) -> ModuleStore:
        """One that receives what such islands would send."""
        return _PoisonedStore(self)


class _PoisonedStore(ModuleStore):
    def __init__(self, job: _PoisonedJob) -> None:
        super().__init__(outer=job.outer, merge=job.merge, codec=job.codec, codec_down=job.codec_down)
        self._poisoner, self._codec = job.sender, job.codec

    def push(self, contribution: Contribution) -> Verdict:
        """As if the bad island had encoded other values."""
        sender = self._poisoner
        if contribution.island == sender.bad and contribution.round >= sender.first_round:
            values = poisoned(self._codec.decode(contribution.payload), sender.poison)
            contribution = replace(contribution, payload=self._codec.encode(values))
        return super().push(contribution)


def poisoned(values: Tensors, poison: Poison) -> Tensors:
    """What is sent in place of `values`; new tensors."""
    match poison:
        case Poison.flipped:
            return {name: TIMES * value for name, value in values.items()}
        case Poison.constant:
            return {name: torch.full_like(value, CONSTANT) for name, value in values.items()}
        case Poison.nan:
            return {name: torch.full_like(value, math.nan) for name, value in values.items()}


register(group="runtime", name="poisoned", node=Poisoned)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to merge, with or without a bad island."""

    method: Method = LONG
    merge: Merge = field(default_factory=Mean)
    sender: Poisoned | None = None
    norm_mads: float = 0.0

    def config(self, lab: Lab, seed: int) -> RunConfig:
        """The run."""
        common = lab.begun(self.method, seed)
        store = Store(shards=1, norm_mads=self.norm_mads)
        return replace(common, merge=self.merge, store=store, runtime=self.sender or common.runtime)


def rows() -> dict[str, Row]:
    """By the name in the table."""
    found = {CLEAN: Row(), TRIMMED: Row(merge=TrimmedMean())}
    for poison in Poison:
        found[f"{CLEAN}, {poison.value}"] = Row(sender=Poisoned(poison=poison))
        found[f"{TRIMMED}, {poison.value}"] = Row(merge=TrimmedMean(), sender=Poisoned(poison=poison))
    found |= {f"{FILTERED}, {p.value} later": _filtered(LONG, p) for p in (Poison.flipped, Poison.constant)}
    found[SHORT_CLEAN] = Row(method=SHORT)
    for poison in (Poison.flipped, Poison.constant):
        sender = Poisoned(poison=poison)
        found[f"H=10: {TRIMMED}, {poison.value}"] = Row(method=SHORT, merge=TrimmedMean(), sender=sender)
    found[f"H=10: {FILTERED}, flipped later"] = _filtered(SHORT, Poison.flipped)
    return found


def _filtered(method: Method, poison: Poison) -> Row:
    sender = Poisoned(poison=poison, first_round=LATER[method.inner_steps])
    return Row(method=method, sender=sender, norm_mads=Store().norm_mads)


def judged(losses: Mapping[str, Sequence[float]], started: Sequence[float]) -> dict[str, object]:
    """What is wanted, by seed: the share by which a trimmed mean's loss is above that without poison; who diverged.

    Also the share of what was learned that is lost. `started`: losses before training, by seed.
    """
    above, lost = {}, {}
    for name, found in losses.items():
        clean = losses[SHORT_CLEAN if name.startswith("H=10") else CLEAN]
        if TRIMMED in name:
            above[name] = [round(loss / base - 1, 4) for loss, base in zip(found, clean, strict=True)]
            learned = zip(found, clean, started, strict=True)
            lost[name] = [round((loss - base) / (start - base), 3) for loss, base, start in learned]
    spoiled = [f"{CLEAN}, {poison.value}" for poison in (Poison.flipped, Poison.constant)]
    diverged = {name: [loss > start for loss, start in zip(losses[name], started, strict=True)] for name in spoiled}
    kept = {name: all(share <= WITHIN for share in found) for name, found in above.items()}
    return {"above_clean": above, "within": kept, "lost_of_learned": lost, "diverged": diverged}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("Poisoned contributions to means, trimmed means and a filter of norms.").parse_args(argv)
    lab = Lab(given.to, QUICK if given.quick else SCALE)
    seeds = [0] if given.quick else [int(seed) for seed in given.seeds.split(",")]
    losses: dict[str, list[float]] = {}
    rejected: dict[str, list[object]] = {}
    started: list[float] = []
    for name, row in rows().items():
        for seed in seeds:
            chosen = row.config(lab, seed)
            losses.setdefault(name, []).append(min(lab.loss(name, row.method, seed, chosen), MOST_LOSS))
            summary = lab.summary(chosen)
            counts = {reason: count for reason, count in summary["rejected_by_reason"].items() if count}
            rejected.setdefault(name, []).append(counts)
            started += [summary["initial_val_loss"]] if name == CLEAN else []
    more = {**judged(losses, started), "started": [round(loss, 5) for loss in started], "rejected": rejected}
    text = table(losses, against=CLEAN)
    conclude(lab, benchmark="poisoned", seeds=seeds, losses=losses, text=text, orders={}, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
