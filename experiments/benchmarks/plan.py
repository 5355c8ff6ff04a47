"""The planner against the papers: the bandwidth tables of Streaming DiLoCo and of the scaling laws, cell by cell.

For each method the Gbit/s at which 50, 80, 90, 95 and 99 % of the time goes into computing: the papers' value, ours on
their grid np.logspace(-1, 3, 50) (the last value that does not reach the utilisation), and ours without a grid. The
conventions are those of `diloco.plan`, at 16 bits a parameter (4 for FP4), two islands, and parameters exactly 1e9 and
1e10. The tables are of arXiv:2501.18512 (H = 100, fragments of 3 layers) and arXiv:2503.09799 (10 B by H), which came
from another run of the papers' simulator and are mostly one step lower.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diloco.plan import required_gbits
from experiments.benchmarks import common

GRID = np.logspace(-1, 3, 50)  # Gbit/s
UTILIZATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
ROUNDING = 1e-9  # relative: of the grid's values


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one row of a table is of."""

    inner_steps: int = 100
    layers_per_fragment: int | None = None
    lag: int = 0
    bits: int = 16


@dataclass(frozen=True, kw_only=True)
class Model:
    """As the papers' simulator has it."""

    parameters: float
    layers: int
    step_s: float


MODELS = {"1B": Model(parameters=1e9, layers=24, step_s=0.1), "10B": Model(parameters=1e10, layers=48, step_s=0.8)}
METHODS = {
    "data parallel": Method(inner_steps=1),
    "DiLoCo": Method(),
    "streaming": Method(layers_per_fragment=3),
    "... with overlap": Method(layers_per_fragment=3, lag=1),
    "... and FP4": Method(layers_per_fragment=3, lag=1, bits=4),
}
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "1B": {
        "data parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
        "DiLoCo": (1.4, 6.2, 13.3, 23.3, 86.8),
        "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
        "... with overlap": (1.4, 4.3, 6.2, 9.1, 11.0),
        "... and FP4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    "10B": {
        "data parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
        "DiLoCo": (1.7, 7.5, 16.0, 33.9, 104.8),
        "streaming": (1.7, 5.2, 9.1, 13.3, 19.3),
        "... with overlap": (1.7, 3.6, 5.2, 6.2, 7.5),
        "... and FP4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
}
BY_INNER_STEPS: dict[int, tuple[float, ...]] = {
    1: (104.8, 184.2, 222.3, 222.3, 390.7),
    10: (16, 49.4, 86.8, 152.6, 222.3),
    50: (3, 11, 23.3, 41, 126.5),
    100: (1.4, 6.2, 13.3, 23.3, 86.8),
    300: (0.5, 2, 4.3, 9.1, 41),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table, printed and computed."""

    printed: float  # Gbit/s, rounded as the paper does
    threshold: float  # ours, without a grid

    @property
    def ours(self) -> float:
        """The last value of the grid below the threshold."""
        return float(GRID[self._index])

    @property
    def steps(self) -> int:
        """Of the grid, by which ours is above what was printed."""
        return self._index - int(np.argmin(np.abs(np.log(GRID / self.printed))))

    @property
    def _index(self) -> int:
        return max(0, int(np.searchsorted(GRID, self.threshold * (1 - ROUNDING))) - 1)


def cells(model: Model, method: Method, printed: Sequence[float]) -> list[Cell]:
    """A row of a table, for each of UTILIZATIONS."""
    found = []
    for utilization, value in zip(UTILIZATIONS, printed, strict=True):
        threshold = required_gbits(
            parameters=model.parameters,
            layers=model.layers,
            step_s=model.step_s,
            inner_steps=method.inner_steps,
            layers_per_fragment=method.layers_per_fragment,
            lag=method.lag,
            bits=method.bits,
            utilization=utilization,
        )
        found.append(Cell(printed=value, threshold=threshold))
    return found


def tables(models: Sequence[str] = tuple(MODELS)) -> dict[str, dict[str, list[Cell]]]:
    """Streaming DiLoCo's table: model -> method -> cells."""
    return {
        name: {method: cells(MODELS[name], METHODS[method], row) for method, row in PAPER[name].items()}
        for name in models
    }


def by_inner_steps() -> dict[str, list[Cell]]:
    """The scaling laws' rows of the 10 B model: `H = ...` -> cells."""
    return {f"H = {h}": cells(MODELS["10B"], Method(inner_steps=h), row) for h, row in BY_INNER_STEPS.items()}


def share(found: Sequence[Cell], within: int) -> float:
    """Of the cells, that of those at most so many steps of the grid from what was printed."""
    return sum(abs(cell.steps) <= within for cell in found) / len(found)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("plan", __doc__.partition("\n")[0])
    given = options.parse_args(argv)
    return common.run(lambda: _measure(quick=given.quick))


def _measure(*, quick: bool) -> dict[str, Any]:
    found = tables(("1B",) if quick else tuple(MODELS))
    for model, rows in found.items():
        _show(f"{model}: paper / ours on the grid (ours) in Gbit/s", rows)
    every = [cell for rows in found.values() for row in rows.values() for cell in row]
    figures: dict[str, Any] = {
        "benchmark": "plan",
        "cells": len(every),
        "within_one_step": share(every, 1),
        "exact": share(every, 0),
    }
    if not quick:
        rows = by_inner_steps()
        _show("10B by inner steps H", rows)
        of_h = [cell for row in rows.values() for cell in row]
        figures |= {"h_rows_within_one_step": share(of_h, 1), "h_rows_within_two_steps": share(of_h, 2)}
        figures["h_rows_exact"] = share(of_h, 0)
    return figures


def _show(title: str, rows: Mapping[str, Sequence[Cell]]) -> None:
    """Marked with how many steps of the grid ours is off, where it is."""
    common.show(f"\n{title}")
    common.show(f"{'':16}" + "".join(f"{f'{u:.0%}':>25}" for u in UTILIZATIONS))
    for name, row in rows.items():
        texts = []
        for cell in row:
            off = f"{cell.steps:+d} " if cell.steps else ""
            texts.append(f"{off}{cell.printed:.1f} / {cell.ours:.1f} ({cell.threshold:.2f})")
        common.show(f"{name:16}" + "".join(f"{text:>25}" for text in texts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
