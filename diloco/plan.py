"""How much bandwidth training over slow links needs: a simulation of steps and transfers, without torch or a clock.

`required_gbits` answers for the methods of Streaming DiLoCo (arXiv:2501.18512, section 3.3 and its bandwidth table);
`Plan` for a run of this project. Both are lists of transfers that one link carries in turn while steps go on.

The conventions below reproduce the paper's table, as `python -m experiments.benchmarks.plan` shows cell by cell:

- A step is 3 L - 1 nodes of one length for L layers: forward from the first layer to the last, then from the last to
  the first the gradients of activations and of weights (of activations not for the first layer). With the L reductions
  these are the paper's 4 L - 1 nodes.
- All layers are of one size. A reduction sends 2 (1 - 1 / islands) times its parameters, on one link without latency
  that carries one after the other, from when the layer's weights have their gradient.
- Without lag, a layer's next forward waits for its reduction. With lag tau, a fragment is installed as a whole tau
  steps later, between two steps.
- Fragment p of P takes the layers whose number is p modulo P and is sent in step floor(p H / P) of each H.
- Utilisation is the time of the steps over all time, in the steady state. What the paper prints is the last value on
  np.logspace(-1, 3, 50) that does not reach it, at 16 bits a parameter (4 for FP4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

WARM_UP_ROUNDS = 2  # and those that the lag spans
MEASURED_ROUNDS = 2
CLOSE = 1e-9  # relative width at which a search ends
WHOLE = ("layers", "inner_steps", "islands", "shards", "layers_per_fragment")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one step gives the link to carry, and when it is needed."""

    gigabits: float
    ready_s: float  # after the step's start, as steps go without waiting
    needed_s: float  # after the start of the step that waits for it


def required_gbits(
    *,
    parameters: float,
    layers: int,
    step_s: float,
    inner_steps: int,
    layers_per_fragment: int | None = None,
    lag: int = 0,
    bits: float = 32,
    islands: int = 2,
    utilization: float,
) -> float:
    """Gbit/s at which training reaches `utilization` (0 to 1, neither of them): a threshold, not on a grid.

    `inner_steps` is H: 1 without fragments is data parallel, whose reductions overlap the backward pass; more are
    DiLoCo, and with `layers_per_fragment` Streaming DiLoCo. `lag` is tau: the steps that an exchange may take
    unnoticed. `bits` a parameter; `step_s` seconds a step. 0 for one island. Raises ValueError.
    """
    per_fragment = layers if layers_per_fragment is None else layers_per_fragment
    given = {"parameters": parameters, "layers": layers, "step_s": step_s, "inner_steps": inner_steps, "bits": bits}
    _check({**given, "islands": islands, "layers_per_fragment": per_fragment})
    if lag != int(lag) or not 0 <= lag < inner_steps:
        raise ValueError(f"lag={lag} with inner_steps={inner_steps}: give a whole number of steps from 0 to one less")
    num_fragments = math.ceil(layers / per_fragment)
    node_s = step_s / (3 * layers - 1)
    gigabits = 2 * (1 - 1 / islands) * parameters * bits / layers / 1e9
    sends: dict[int, list[Transfer]] = {}
    for fragment in range(num_fragments):
        step = fragment * inner_steps // num_fragments
        for layer in range(fragment, layers, num_fragments):
            backward = 2 * (layers - layer) - (layer == 0)
            ready_s, needed_s = (layers + backward) * node_s, 0.0 if lag else layer * node_s
            sends.setdefault(step, []).append(Transfer(gigabits=gigabits, ready_s=ready_s, needed_s=needed_s))
    for transfers in sends.values():
        transfers.sort(key=lambda transfer: transfer.ready_s)
    work_s = inner_steps * step_s
    return _threshold(
        lambda gbits: work_s / round_s(sends, gbits=gbits, step_s=step_s, inner_steps=inner_steps, lag=lag),
        utilization,
        nothing=islands == 1,
    )


def round_s(
    sends: Mapping[int, Sequence[Transfer]], *, gbits: float, step_s: float, inner_steps: int, lag: int
) -> float:
    """Seconds that a round of `inner_steps` takes in the steady state, waiting included.

    `sends`: step of a round -> what it sends, in the link's order; step + 1 + `lag` waits for that.
    """
    now_s = link_s = start_s = 0.0  # the present step's start; when the link is free; when the measured rounds began
    at = 0  # the present step
    waits: dict[int, list[tuple[float, float]]] = {}  # step -> (needed after its start, when it is there)
    eventful = sorted({*sends, *((step + 1 + lag) % inner_steps for step in sends)})
    warm_up_rounds = WARM_UP_ROUNDS + lag // inner_steps
    for round_ in range(warm_up_rounds + MEASURED_ROUNDS):
        if round_ == warm_up_rounds:
            start_s = now_s
        for step in (round_ * inner_steps + offset for offset in eventful):
            now_s, at = now_s + (step - at) * step_s, step
            for needed_s, there_s in waits.pop(step, ()):
                now_s = max(now_s, there_s - needed_s)
            for transfer in sends.get(step % inner_steps, ()):
                link_s = max(link_s, now_s + transfer.ready_s) + transfer.gigabits / gbits
                waits.setdefault(step + 1 + lag, []).append((transfer.needed_s, link_s))
        now_s, at = now_s + ((round_ + 1) * inner_steps - at) * step_s, (round_ + 1) * inner_steps
    busy_s = sum(transfer.gigabits for transfers in sends.values() for transfer in transfers) / gbits
    return max((now_s - start_s) / MEASURED_ROUNDS, busy_s)  # a long lag can hide for a while that the link is too slow


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run sends a round, and how long its islands wait for it where each has a node of its own.

    The store is spread over the nodes of `shards` islands, so that the busiest link carries
    (islands - 1) / shards of what an island sends, then as much of what it receives: (1 - 1 / islands) of both where
    every node has a shard. Without lag all of that is exposed; with it, what takes longer than `lag` steps. Left out:
    latency, the outer step itself, and what the workers of an island send each other. Raises ValueError.
    """

    fragments: tuple[int, ...]  # parameters of each, in the order in which they are exchanged
    bits_up: float  # a parameter
    bits_down: float
    islands: int
    shards: int
    inner_steps: int
    lag: int = 0
    step_s: float | None = None  # None = unknown
    link_gbits: float | None = None  # of an island, in each direction; None = unknown
    follows: bool = True  # islands get each version, so that updates reach them; else full values, all at once

    def __post_init__(self) -> None:
        if not self.fragments:
            raise ValueError("fragments=() has none; give the parameters of each")
        given = {f.name: vars(self)[f.name] for f in fields(self) if f.name not in ("fragments", "lag", "follows")}
        given |= {f"fragments[{i}]": size for i, size in enumerate(self.fragments)}
        _check({name: value for name, value in given.items() if value is not None})
        if self.lag != int(self.lag) or self.lag < 0:
            raise ValueError(f"lag={self.lag}: give a whole number of steps, or 0")

    @property
    def parameters(self) -> int:
        """All that are exchanged."""
        return sum(self.fragments)

    @property
    def bytes_up(self) -> int:
        """What an island sends a round."""
        return math.ceil(self.parameters * self.bits_up / 8)

    @property
    def bytes_down(self) -> int:
        """What it receives."""
        return math.ceil(self.parameters * self.bits_down / 8)

    @property
    def fragment_gigabits(self) -> tuple[float, ...]:
        """What the busiest link carries of each fragment, up and down."""
        share = (self.islands - 1) / min(self.shards, self.islands)
        return tuple(size * share * (self.bits_up + self.bits_down) / 1e9 for size in self.fragments)

    def fragment_wire_s(self, gbits: float) -> tuple[float, ...]:
        """How long each fragment is on the wire."""
        return tuple(gigabits / gbits for gigabits in self.fragment_gigabits)

    def exposed_s(self, *, gbits: float, step_s: float) -> float:
        """How long an island waits a round."""
        work_s = self.inner_steps * step_s
        sends: dict[int, list[Transfer]] = {}
        for index, gigabits in enumerate(self.fragment_gigabits):
            step = index * self.inner_steps // len(self.fragments)
            sends.setdefault(step, []).append(Transfer(gigabits=gigabits, ready_s=step_s, needed_s=0.0))
        taken_s = round_s(sends, gbits=gbits, step_s=step_s, inner_steps=self.inner_steps, lag=self.lag)
        return taken_s - work_s if taken_s > work_s * (1 + CLOSE) else 0.0

    def utilization_at(self, *, gbits: float, step_s: float) -> float:
        """Share of a round that is spent in inner steps."""
        work_s = self.inner_steps * step_s
        return work_s / (work_s + self.exposed_s(gbits=gbits, step_s=step_s))

    @property
    def utilization(self) -> float | None:
        """On the link and at the step time that are given; None where one is unknown, and 1 for one island."""
        if self.islands == 1:
            return 1.0
        if self.step_s is None or self.link_gbits is None:
            return None
        return self.utilization_at(gbits=self.link_gbits, step_s=self.step_s)

    def required_gbits(self, utilization: float, *, step_s: float = 1.0) -> float:
        """Gbit/s each way at which the utilisation is reached; in proportion to the steps a second."""
        return _threshold(
            lambda gbits: self.utilization_at(gbits=gbits, step_s=step_s), utilization, nothing=self.islands == 1
        )


def _threshold(utilization_at: Callable[[float], float], utilization: float, *, nothing: bool) -> float:
    """Where a function that grows with Gbit/s reaches `utilization`; 0 where there is `nothing` to send."""
    if not 0 < utilization < 1:
        raise ValueError(f"utilization={utilization} is a share of time; give more than 0 and less than 1")
    if nothing:
        return 0.0
    low = high = 1.0
    while utilization_at(high) < utilization:
        low, high = high, 4 * high
    while utilization_at(low) >= utilization:
        low, high = low / 4, low
    while high > low * (1 + CLOSE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if utilization_at(middle) < utilization else (low, middle)
    return high


def _check(given: Mapping[str, float]) -> None:
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: give a number above 0")
        if name in WHOLE and value != int(value):
            raise ValueError(f"{name}={value}: give a whole number of at least 1")
