"""Dynamic local steps: how many steps an island takes, by its speed (DyLU, arXiv:2401.09135, Eq. 6)."""

from __future__ import annotations

import math

ROUNDING = 1e-9  # 0.9 / 1 * 50 is a little less than 45


def steps_by_speed(speed: float, fastest: float, inner_steps: int) -> int:
    """floor(v / max v * H), at least 1; the fastest takes H."""
    return max(1, math.floor(speed / fastest * inner_steps + ROUNDING))
