"""Outer optimizers: what one step of the store on a module is.

Descent convention throughout: `delta` = anchor - local (the pseudo-gradient), so a step goes along
-delta. There is neither weight decay nor clipping here (pitfall L8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from diloco.messages import Tensors


@dataclass(kw_only=True)
class OuterOptimizer(ABC):
    """A pure rule with explicit state: `init` makes the state, `step` writes params and state in place."""

    @abstractmethod
    def init(self, params: Tensors) -> Tensors:
        """Fresh state for `params`: named tensors, so that it checkpoints as it is; float32, counters int64."""

    @abstractmethod
    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        """One step along -`delta` (same names and shapes). Writes `params` and `state` in place, not `delta`."""

    def resolved(self, islands: int) -> OuterOptimizer:
        """The same with every setting that was left to be derived from the number of islands."""
        return self


@dataclass(kw_only=True)
class Sgd(OuterOptimizer):
    """theta <- theta - lr * delta. With lr = 1 this is federated averaging (arXiv:2311.08105, section 3)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        check_lr(self.lr)

    def init(self, params: Tensors) -> Tensors:
        """No state."""
        return {}

    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        """Writes `params` in place."""
        for name, value in params.items():
            value.add_(delta[name], alpha=-self.lr)


@dataclass(kw_only=True)
class Nesterov(OuterOptimizer):
    """m <- beta m + delta; theta <- theta - lr (delta + beta m): torch's SGD(nesterov=True).

    The outer step of DiLoCo (arXiv:2311.08105, Alg. 1 line 14), lr = epsilon, momentum = beta. State: the
    momentum of each parameter as `momentum/<name>`, zero at first, which equals torch's first step.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_lr(self.lr)
        check_momentum(self.momentum)

    def init(self, params: Tensors) -> Tensors:
        """A momentum of zeros for each parameter."""
        return {f"momentum/{name}": torch.zeros_like(value) for name, value in params.items()}

    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        """Writes `params` and the momenta in place."""
        for name, value in params.items():  # one tensor at a time, which stays in the processor's cache
            momentum = state[f"momentum/{name}"].mul_(self.momentum).add_(delta[name])
            value.add_(delta[name], alpha=-self.lr).add_(momentum, alpha=-self.lr * self.momentum)


def check_lr(lr: float) -> None:
    """Raise ValueError unless this may be a rate."""
    if not 0 < lr < float("inf"):
        raise ValueError(f"outer.lr={lr} must be a positive number")


def check_momentum(momentum: float) -> None:
    """Raise ValueError unless this may be a momentum."""
    if not 0 <= momentum < 1:
        raise ValueError(f"outer.momentum={momentum} is outside [0, 1); the papers' value is 0.9")
