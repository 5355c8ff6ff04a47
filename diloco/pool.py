"""Pool: the data of a run whose sources train on whatever shard is due, every step of it once.

Nothing here is drawn anew: what comes next follows from the seed and from what was given out before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diloco.messages import ShardId


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Consecutive steps of a shard; `first_step` is also the position in the shard's rate schedule."""

    shard: ShardId
    first_step: int
    steps: int

    def cut(self, steps: int) -> Stretch:
        """At most so many steps of it, from its beginning."""
        return Stretch(shard=self.shard, first_step=self.first_step, steps=min(self.steps, steps))


@dataclass(kw_only=True)
class Pool:
    """How far each shard was given out, and what was given out in vain.

    `drawn`: the next shard is drawn, under-served ones only (arXiv:2401.09135, Eq. 2); else each source has its own.
    """

    drawn: bool
    left: int  # steps that are to be given out for the first time
    positions: list[int]  # by shard: steps given out
    begun: list[int]  # by shard: the position that the pool started with; only steps after it count as served
    returned: list[Stretch] = field(default_factory=list)  # given out in vain; the oldest comes first
    under_way: int = 0  # steps given out, and neither handed over nor returned
    done: int = 0  # steps handed over
    draws: int = 0

    @classmethod
    def starting(cls, drawn: bool, *, shards: int, steps: int, done: int) -> Pool:
        """So many `steps` of each shard in the mean, of which all have `done` some."""
        at = [done] * shards
        return cls(drawn=drawn, left=(steps - done) * shards, positions=list(at), begun=at, done=done * shards)

    @property
    def exhausted(self) -> bool:
        """All steps were handed over."""
        return self.left == 0 and self.under_way == 0 and not self.returned

    def next(self, own: ShardId, steps: int, examples: Sequence[int], seed: int) -> Stretch | None:
        """What to train next, at most `steps`; None where everything is given out. Changes nothing.

        `own`: the shard of the source that asks. `examples`: of each shard.
        """
        if self.returned:
            return self.returned[0].cut(steps)
        if self.left == 0:
            return None
        shard = self._draw(examples, seed) if self.drawn else own
        return Stretch(shard=shard, first_step=self.positions[shard], steps=min(steps, self.left))

    def give(self, stretch: Stretch) -> None:
        """It is given out: what `next` has just told."""
        self.under_way += stretch.steps
        if self.returned:
            oldest = self.returned.pop(0)
            rest = oldest.steps - stretch.steps
            if rest:
                first_step = stretch.first_step + stretch.steps
                self.returned.insert(0, Stretch(shard=stretch.shard, first_step=first_step, steps=rest))
            return
        self.positions[stretch.shard] += stretch.steps
        self.left -= stretch.steps
        self.draws += self.drawn

    def give_back(self, stretch: Stretch) -> None:
        """It was given out in vain: somebody else will train on it."""
        self.under_way -= stretch.steps
        self.returned.append(stretch)

    def hand_over(self, steps: int) -> None:
        """So many steps are done with."""
        self.under_way -= steps
        self.done += steps

    def _draw(self, examples: Sequence[int], seed: int) -> ShardId:
        served, wanted = np.subtract(self.positions, self.begun), np.asarray(examples)
        lacking = np.maximum(wanted / wanted.sum() - served / (served.sum() or 1), 0.0)
        upto = np.cumsum(lacking if lacking.any() else wanted)
        drawn = random.Random(f"shard/{seed}/{self.draws}").random() * upto[-1]
        return ShardId(min(int(np.searchsorted(upto, drawn, side="right")), len(upto) - 1))
