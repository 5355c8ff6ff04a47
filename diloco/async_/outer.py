"""Outer optimizers for islands that hand in one by one: a step is taken on a single contribution, often a stale one.

Nesterov's step on each contribution is not an option: the momentum of k equal ones is applied again and again, and
decays k times as fast (arXiv:2401.09135, Eq. 5; pitfall L10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from diloco import sums
from diloco.messages import Tensors
from diloco.outer import OuterOptimizer, check_lr, check_momentum

LEAST_RATIO = 1e-12  # of a momentum's norm to the contribution's; below it the momentum has no direction


@dataclass(kw_only=True)
class DelayedNesterov(OuterOptimizer):
    """Each contribution moves the weights at once, the momentum only once in N (arXiv:2401.09135, Alg. 3).

    N = `delay`, c = `activation`, beta = `momentum`, epsilon = `lr`; B sums up the contributions of a window of N:
    each delta: B <- B + delta; theta <- theta - epsilon (delta / N + c beta m), but for the last of a window:
    m <- beta m + B / N; theta <- theta - epsilon (delta / N + (1 - c N + c) beta m); B <- 0.
    With c = 0 a window of N contributions equals one Nesterov step on their mean, so `lr` is that of synchronous
    DiLoCo. c > 0 spreads the momentum over the window, in [0, 1/N].

    `delay` 0 stands for the number of islands. A step is meant to have one contribution; where it has the merged ones
    of all islands, as with schedule=barrier, use delay=1, which is Nesterov. State: `momentum/<name>`,
    `buffer/<name>`, and `count`, the contributions so far (int64[]).
    """

    lr: float = 0.7
    momentum: float = 0.9
    delay: int = 0
    activation: float = 0.0

    def __post_init__(self) -> None:
        check_lr(self.lr)
        check_momentum(self.momentum)
        if self.delay < 0:
            raise ValueError(f"outer.delay={self.delay} must not be negative; give 0 (= as many as islands) or more")
        most = 1 / max(self.delay, 1)
        if not 0 <= self.activation <= most:
            raise ValueError(
                f"outer.activation={self.activation} is outside [0, 1/N] = [0, {most:g}] for outer.delay={self.delay}"
                " (N; 0 stands for as many as islands, and may allow less); give less: the paper has 0 and 0.1"
            )

    def resolved(self, islands: int) -> OuterOptimizer:
        """With a `delay` of 0 as the number of islands."""
        return replace(self, delay=self.delay or islands)

    def init(self, params: Tensors) -> Tensors:
        """Zeros."""
        state = {f"{kind}/{n}": torch.zeros_like(p) for kind in ("momentum", "buffer") for n, p in params.items()}
        return {**state, "count": torch.zeros((), dtype=torch.int64)}

    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        """Writes `params`, momenta, buffers and the count in place."""
        assert self.delay, "the delay is derived from the number of islands before a run begins"
        count = int(state["count"].add_(1))
        last = count % self.delay == 0
        share = (1 - self.activation * self.delay + self.activation) if last else self.activation
        for name, value in params.items():  # one tensor at a time, which stays in the processor's cache
            momentum, buffer = state[f"momentum/{name}"], state[f"buffer/{name}"].add_(delta[name])
            if last:
                momentum.mul_(self.momentum).add_(buffer, alpha=1 / self.delay)
                buffer.zero_()
            value.add_(delta[name], alpha=-self.lr / self.delay)
            if share:
                value.add_(momentum, alpha=-self.lr * share * self.momentum)


@dataclass(kw_only=True)
class HeLoCo(OuterOptimizer):
    """Nesterov's step on a delta that was brought nearer to the momentum, tensor by tensor (arXiv:2606.00271).

    With u and v the unit vectors of delta and of the momentum m, c their cosine, and the confidence
    f = |delta| / (|delta| + (1 - beta) |m|), where (1 - beta) m is the mean of past deltas that m sums up:
    c >= aligned: as it is. 0 <= c < aligned: |delta| phi((1 - l) u + l v) with l = min(turning (1 - c) f, 1), which
    turns it and keeps its norm. c < 0: delta - b c |delta| v with b = min(-damping c f, 1), which takes away a part b
    of what opposes the momentum. Where either of them is zero: as it is. aligned = damping = 0 is Nesterov.

    The formulas are those of a third party's summary of the paper, with its kappa and its cap on b at 1. The summary
    has m <- beta m + (1 - beta) delta; the step here is that of `Nesterov`. The strengths that the paper used are
    not known to us, and ours are mild. `lr` is a tenth of the synchronous one, since every contribution has a whole
    step: 0.07 is what the authors of asynchronous DiLoCo settled on in their notebook (pitfall L7).
    State: `momentum/<name>`.
    """

    lr: float = 0.07
    momentum: float = 0.9
    aligned: float = 0.25  # c_ok: unrelated directions have a cosine near 0, so that this much is agreement
    damping: float = 1.0  # k_s
    turning: float = 0.25  # k_d: at most about 18 degrees, so that a contribution is still mostly its own

    def __post_init__(self) -> None:
        check_lr(self.lr)
        check_momentum(self.momentum)
        if not 0 <= self.aligned <= 1:
            raise ValueError(f"outer.aligned={self.aligned} is a cosine: give 0 to 1")
        for name in ("damping", "turning"):
            if not 0 <= vars(self)[name] < math.inf:
                raise ValueError(f"outer.{name}={vars(self)[name]} must be a number of at least 0 (0 = none)")

    def init(self, params: Tensors) -> Tensors:
        """A momentum of zeros for each parameter."""
        return {f"momentum/{name}": torch.zeros_like(value) for name, value in params.items()}

    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        """Writes `params` and the momenta in place."""
        for name, value in params.items():
            momentum = state[f"momentum/{name}"]
            own, pull = self._correction(delta[name], momentum)
            value.add_(delta[name], alpha=-self.lr * own)
            if pull:
                value.add_(momentum, alpha=-self.lr * pull)
            momentum.mul_(self.momentum + pull).add_(delta[name], alpha=own)
            value.add_(momentum, alpha=-self.lr * self.momentum)

    def _correction(self, delta: torch.Tensor, momentum: torch.Tensor) -> tuple[float, float]:
        """The corrected delta is the first times `delta` and the second times `momentum`."""
        size, reference = sums.norm(delta), sums.norm(momentum)
        if not (0 < size < math.inf and LEAST_RATIO * size < reference < math.inf):
            return 1.0, 0.0
        cosine = sums.dot(delta, momentum) / size / reference
        confidence = size / (size + (1 - self.momentum) * reference)
        if cosine >= self.aligned:
            return 1.0, 0.0
        if cosine < 0:
            part = min(-self.damping * cosine * confidence, 1.0)
            return 1.0, -part * cosine * size / reference
        turn = min(self.turning * (1 - cosine) * confidence, 1.0)
        length = math.sqrt((1 - turn) ** 2 + turn**2 + 2 * turn * (1 - turn) * cosine)
        return (1 - turn) / length, turn * size / (length * reference)
