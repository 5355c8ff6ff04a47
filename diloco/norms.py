"""Norms: how large the contributions that counted were, and which one is absurd beside them."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diloco.messages import Commit, ModuleKey
from diloco.progress import ModuleView

REMEMBERED_ROUNDS = 4  # so few, since norms follow the inner rate; but all sources, which may be unequal, are in them
FEWEST, MOST = 20, 256  # contributions that are remembered in any case, and at most
LEAST = 10  # so many, before any is judged
FLOOR = math.log(6.0)  # what is not so many times the median is never absurd, however alike the last ones were


def bound(logs: Sequence[float], mads: float) -> float:
    """The largest natural log of a norm that is not absurd after `logs`, those of contributions that counted.

    Their median, and `mads` times their median absolute deviation, but at least `FLOOR`, above it: half of them may be
    wrong, and warm-up, where norms grow from round to round, stays below. inf where too few were seen, or for 0 `mads`.
    """
    if not mads or len(logs) < LEAST:
        return math.inf
    median = statistics.median(logs)
    deviation = statistics.median(abs(log - median) for log in logs)
    return median + max(mads * deviation, FLOOR)


@dataclass(kw_only=True)
class Norms:
    """What is judged by, and what it is judged with. Only what counted in an outer step is remembered, in its order.

    So the same contribution is judged alike whatever the order of arrival, and after a resume.
    """

    mads: float = 0.0  # 0 = nothing is absurd
    logs: dict[ModuleKey, list[float]] = field(default_factory=dict)  # by the first module that they were to

    def remember(self, commits: Sequence[Commit], modules: Mapping[ModuleKey, ModuleView], sources: int) -> None:
        """The contributions to these steps counted, of so many sources. A norm of 0 has no log, and says nothing."""
        most = min(max(REMEMBERED_ROUNDS * sources, FEWEST), MOST)
        for commit in commits:
            norms = [modules[commit.module].arrivals[key].norm for key in commit.keys]
            seen = [*self.logs.get(commit.module, ()), *(math.log(norm) for norm in norms if norm > 0)]
            self.logs[commit.module] = seen[-most:]

    def allowed(self, module: ModuleKey) -> float:
        """The largest norm that a contribution may have whose first module is this one; inf = any."""
        log = bound(self.logs.get(module, ()), self.mads)
        return math.exp(log) if log < math.log(sys.float_info.max) else math.inf
