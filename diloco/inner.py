"""Inner optimizers (torch's own), the rate schedule and clipping: one step of an island."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RateSchedule(Enum):
    """How the rate falls after warm-up: along a cosine, at the end only (warm-up, stable, decay), or not at all."""

    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class ComputeDtype(Enum):
    """The dtype of matrix products; local weights stay float32."""

    auto = "auto"  # bfloat16 on CUDA, float32 elsewhere
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True)
class Inner(ABC):
    """Settings that all inner optimizers share, and how the rate follows from the step in the task.

    The rate is derived on every step from the position in the shard's schedule, never kept (pitfall L19).
    """

    lr: float = 1e-3  # peak
    warmup_steps: int = 0
    rate: RateSchedule = RateSchedule.cosine
    final_lr_share: float = 0.0  # of the peak, at the end of the run
    decay_share: float = 0.2  # wsd: the share of the run in which the rate falls linearly
    weight_decay: float = 0.1  # decoupled; on matrices only, not on norms and biases
    clip: float = 1.0  # of the gradient's global norm; 0 = none
    dtype: ComputeDtype = ComputeDtype.auto
    compile: bool = False  # torch.compile of the model
    fresh_warmup_steps: int = 10  # after a source had to start with empty optimizer state in mid-run

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError where a setting is out of range."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"inner.lr={self.lr} must be a positive number")
        for name in ("warmup_steps", "weight_decay", "clip", "fresh_warmup_steps"):
            if vars(self)[name] < 0:
                raise ValueError(f"inner.{name}={vars(self)[name]} must not be negative")
        for name in ("final_lr_share", "decay_share"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"inner.{name}={vars(self)[name]} is outside [0, 1]")

    @abstractmethod
    def build(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """torch optimizers that hold each of `parameters` (name -> trainable tensor) exactly once."""

    def compute_dtype(self, device_type: str) -> torch.dtype:
        """The dtype of matrix products on a device of this type."""
        if self.dtype is ComputeDtype.auto:
            return torch.bfloat16 if device_type == "cuda" else torch.float32
        return torch.bfloat16 if self.dtype is ComputeDtype.bfloat16 else torch.float32

    def rate_share(self, step: int, total_steps: int, fresh_since: int | None = None) -> float:
        """The rate of inner step `step` (0-based) of `total_steps`, as a share of the peak.

        `fresh_since`: the step at which the source had to start with empty optimizer state, if it had to.
        """
        share = self._scheduled_share(step, total_steps)
        if fresh_since is not None and self.fresh_warmup_steps:
            share *= min((step - fresh_since + 1) / self.fresh_warmup_steps, 1.0)
        return share

    def _scheduled_share(self, step: int, total_steps: int) -> float:
        """As the schedule has it.

        Linear warm-up to 1 over `warmup_steps`, then as `rate` says; beyond `total_steps` it stays at its end
        (arXiv:2401.09135, Eq. 3, clamps likewise).
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / span, 1.0)
        if self.rate is RateSchedule.constant:
            return 1.0
        if self.rate is RateSchedule.wsd:
            left = (1.0 - done) / self.decay_share if self.decay_share > 0 else 1.0
            return self.final_lr_share + (1 - self.final_lr_share) * min(left, 1.0)
        return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(kw_only=True)
class AdamW(Inner):
    """AdamW, the papers' inner optimizer; torch's fused kernel."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.check()
        _check_betas(self.beta1, self.beta2)

    def build(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """One AdamW with a group for matrices and one for the rest."""
        groups = _decay_groups(parameters, self.weight_decay)
        return [torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)]


@dataclass(kw_only=True)
class Muon(Inner):
    """torch's Muon for the matrices inside the blocks; AdamW for embeddings, head and what is no matrix.

    `lr` is Muon's (arXiv:2505.23725 uses .02), `adamw_lr` that of the rest; both follow the same schedule.
    """

    lr: float = 0.02
    momentum: float = 0.95
    adamw_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        self.check()
        _check_betas(self.beta1, self.beta2)
        if not 0 < self.adamw_lr < math.inf:
            raise ValueError(f"inner.adamw_lr={self.adamw_lr} must be a positive number")

    def build(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """Muon first, then AdamW; either may be missing."""
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and not _is_embedding(n)}
        others = {n: p for n, p in parameters.items() if n not in matrices}
        built: list[Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                list(matrices.items()), lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum
            )
            built.append(muon)
        if others:
            groups = _decay_groups(others, self.weight_decay)
            betas = (self.beta1, self.beta2)
            built.append(torch.optim.AdamW(groups, lr=self.adamw_lr, betas=betas, fused=True))
        return built


@dataclass(kw_only=True)
class Sgd(Inner):
    """Plain stochastic gradient descent: the inner step of the papers' identities."""

    lr: float = 0.1
    momentum: float = 0.0
    rate: RateSchedule = RateSchedule.constant
    weight_decay: float = 0.0
    clip: float = 0.0
    fresh_warmup_steps: int = 0  # there are no moments to wait for

    def build(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """One SGD over all parameters."""
        groups = _decay_groups(parameters, self.weight_decay)
        return [torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)]


def set_rate(optimizers: list[Optimizer], share: float) -> float:
    """Set every group's rate to `share` of its peak (kept as `peak_lr`). Returns the first group's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * share
    return float(optimizers[0].param_groups[0]["lr"])


def state_of(optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Their state as tensors by `optimizer/parameter/name`, copied to CPU memory, and what else is in it."""
    tensors: dict[str, Tensor] = {}
    scalars: list[dict[str, Any]] = []
    for index, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}/{number}/{name}"] = value.cpu().clone()
                else:
                    scalars.append({"at": [index, number, name], "value": value})
    return tensors, scalars


def load_state(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], scalars: list[dict[str, Any]]) -> None:
    """Take back what `state_of` gave."""
    loaded: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for key, value in tensors.items():
        index, number, name = key.split("/")
        loaded[int(index)].setdefault(int(number), {})[name] = value
    for entry in scalars:
        at, number, name = entry["at"]
        loaded[at].setdefault(number, {})[name] = entry["value"]
    for optimizer, states in zip(optimizers, loaded, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def parameter_of(optimizers: Sequence[Optimizer], key: str) -> Tensor:
    """The parameter that a tensor of `state_of` belongs to, by its key."""
    index, number, _ = key.split("/")
    held = [p for group in optimizers[int(index)].param_groups for p in group["params"]]
    found: Tensor = held[int(number)]
    return found


def _decay_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, object]]:
    matrices = [(name, p) for name, p in parameters.items() if p.ndim >= 2]
    others = [(name, p) for name, p in parameters.items() if p.ndim < 2]
    groups: list[dict[str, object]] = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def _is_embedding(name: str) -> bool:
    return "embed" in name or "head" in name or "wte" in name or "wpe" in name


def _check_betas(beta1: float, beta2: float) -> None:
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"inner.beta1={beta1} and inner.beta2={beta2} must lie in [0, 1)")
