"""Dynamic local steps: how many steps an island takes, by its speed (DyLU, arXiv:2401.09135, Eq. 6)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from diloco.views import RunView

ROUNDING = 1e-9  # 0.9 / 1 * 50 is a little less than 45


def steps_by_speed(speed: float, fastest: float, inner_steps: int) -> int:
    """floor(v / max v * H), at least 1; the fastest takes H."""
    return max(1, math.floor(speed / fastest * inner_steps + ROUNDING))


def measured(run: RunView) -> list[float | None]:
    """Steps a second of each source in the median of its last tasks, so that one slow one changes nothing.

    None: nothing was seen of it yet.
    """
    return [None if not s.paces_s else _speed(s.paces_s) for s in run.sources.values()]


def _speed(paces_s: Sequence[float]) -> float:
    return 1 / max(statistics.median(paces_s), 1e-9)
