"""Failures and stalls of simulated chips, drawn once from a seed, and what they leave of chips that train in step.

All methods of a comparison read the same tape: the same chips fail at the same moments.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

YEAR_S = 365 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class World:
    """The machine and how it breaks; all made up, but for the first two, which are the paper's."""

    chips: int = 1_200_000
    interrupt_s: float = YEAR_S  # of one chip, in the mean between two failures
    slice_chips: int = 250  # are out of work together when one of them fails
    repair_s: float = 600.0  # from a failure until the slice is there again
    pause_s: float = 18.0  # for which those who train in step with it stand still: see it, regroup, fetch the state
    detect_s: float = 5.0  # of them until it is seen
    stalls_per_h: float = 0.0  # of all chips together
    stall_s: float = 20.0  # for which a stalled chip, and who trains in step with it, makes no progress
    step_s: float = 1.0  # an inner step
    push_s: float = 0.2  # from the end of a step until the store has a fragment
    hours: float = 2.0

    def __post_init__(self) -> None:
        if self.detect_s > self.pause_s:
            raise ValueError(f"detect_s={self.detect_s} is a part of pause_s={self.pause_s}; it cannot be longer")

    @property
    def end_s(self) -> float:
        """When the simulation ends."""
        return self.hours * 3600


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One chip, at one moment."""

    at_s: float
    chip: int


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What happens to whom: in order of time, from `repair_s` before the start on, so that it starts as it goes on."""

    failures: tuple[Trouble, ...]
    stalls: tuple[Trouble, ...]


@dataclass(frozen=True, kw_only=True)
class Span:
    """From one moment to another."""

    from_s: float
    to_s: float


def record(world: World, seed: int) -> Tape:
    """Poisson processes over all chips; chips of a slice that is away do not fail again."""
    draw = random.Random(f"failures/{seed}")
    failures: list[Trouble] = []
    back_s: dict[int, float] = {}  # by slice: when it is there again
    for trouble in _drawn(world, world.chips / world.interrupt_s, draw):
        of = trouble.chip // world.slice_chips
        if back_s.get(of, -math.inf) <= trouble.at_s:
            back_s[of] = trouble.at_s + world.repair_s
            failures.append(trouble)
    stalls = _drawn(world, world.stalls_per_h / 3600, random.Random(f"stalls/{seed}"))
    return Tape(failures=tuple(failures), stalls=tuple(stalls))


def _drawn(world: World, rate: float, draw: random.Random) -> list[Trouble]:
    found, at_s = [], -world.repair_s
    while rate and (at_s := at_s + draw.expovariate(rate)) < world.end_s:
        found.append(Trouble(at_s=at_s, chip=draw.randrange(world.chips)))
    return found


def spans(troubles: Sequence[Trouble], lasts_s: float) -> list[Span]:
    """Each takes so long; what comes while it lasts makes it no longer."""
    found: list[Span] = []
    for trouble in troubles:
        if not found or trouble.at_s >= found[-1].to_s:
            found.append(Span(from_s=trouble.at_s, to_s=trouble.at_s + lasts_s))
    return found


class Unit:
    """Chips that train in step: one island, or all there are."""

    def __init__(self, world: World, tape: Tape, *, units: int, index: int, pause_s: float) -> None:
        """The `index`-th of so many equal units. `pause_s`: for which a failure halts it."""
        self.chips = world.chips // units
        own = range(index * self.chips, (index + 1) * self.chips)
        failures = [trouble for trouble in tape.failures if trouble.chip in own]
        self.halts = spans(failures, pause_s)
        self._stalls = spans([trouble for trouble in tape.stalls if trouble.chip in own], world.stall_s)
        self._step_s = world.step_s
        gone = [(trouble.at_s, -world.slice_chips) for trouble in failures]
        back = [(trouble.at_s + world.repair_s, world.slice_chips) for trouble in failures]
        changes = list(heapq.merge(gone, back))
        self._changed_s = [at_s for at_s, _ in changes]
        self._there = list(accumulate((change for _, change in changes), initial=self.chips))
        self._halted_s, self._stalled_s = ([span.from_s for span in found] for found in (self.halts, self._stalls))

    def there(self, now_s: float) -> int:
        """Chips that are not away."""
        return self._there[bisect_right(self._changed_s, now_s)]

    def halt(self, now_s: float) -> Span | None:
        """The halt of this moment."""
        return _at(self.halts, self._halted_s, now_s)

    def step(self, start_s: float) -> float | Span:
        """When a step that begins now ends; or the halt that ends it, and it has to be done again."""
        end_s = start_s + self._step_s
        seen_s = start_s
        while stall := _next(self._stalls, self._stalled_s, seen_s):
            if stall.from_s >= end_s:
                break
            end_s += stall.to_s - max(stall.from_s, start_s)
            seen_s = stall.to_s
        halt = _next(self.halts, self._halted_s, start_s)
        return halt if halt is not None and halt.from_s < end_s else end_s


def _at(of: Sequence[Span], from_s: Sequence[float], now_s: float) -> Span | None:
    index = bisect_right(from_s, now_s) - 1
    return of[index] if index >= 0 and now_s < of[index].to_s else None


def _next(of: Sequence[Span], from_s: Sequence[float], now_s: float) -> Span | None:
    """That of this moment, or the first after it."""
    index = bisect_right(from_s, now_s)
    return _at(of, from_s, now_s) or (of[index] if index < len(of) else None)


def data_parallel(world: World, tape: Tape, *, elastic: bool) -> float:
    """Goodput of all chips in step: a failure halts all, for a pause, or until the slice is there again.

    Nothing is lost but the step in which it happens; the pause includes what it takes to go on from the step before.
    """
    unit = Unit(world, tape, units=1, index=0, pause_s=world.pause_s if elastic else world.repair_s)
    useful = 0  # steps of a chip
    now_s = 0.0
    while now_s < world.end_s:
        end = unit.step(now_s)
        if isinstance(end, Span):
            now_s = end.to_s
            continue
        useful += unit.there(now_s) if elastic else unit.chips
        now_s = end
    return useful * world.step_s / (unit.chips * world.end_s)


def by_hand(world: World, units: int) -> float:
    """Goodput of units that go on without each other: MTBF / (MTBF + down time), and no slice that is away.

    A failure costs the pause and, in the mean, half the step in which it happens.
    """
    slices = 1 / (1 + world.slice_chips * world.repair_s / world.interrupt_s)
    failures_per_s = slices * world.chips / units / world.interrupt_s
    return slices / (1 + failures_per_s * (world.pause_s + world.step_s / 2))
