"""Merges: how contributions become one pseudo-gradient, in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from diloco import buffers
from diloco.messages import Tensors


@dataclass(kw_only=True)
class Merge(ABC):
    """Combines the deltas of one module, given in order of source, and normalises the weights itself."""

    @abstractmethod
    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """One float32 pseudo-gradient with the names and shapes of the deltas, which are only read, never given back.

        `weights` has one positive number a delta (the examples behind it). The iterable is read once, so
        that no more than one decoded delta need exist beside the sum.
        """


class MeanBy(Enum):
    """What a contribution counts for in a mean."""

    uniform = "uniform"
    examples = "examples"


@dataclass(kw_only=True)
class Mean(Merge):
    """The weighted mean (arXiv:2311.08105, Alg. 1 line 12).

    `by=uniform` (1/k each) is the paper's choice for iid shards, `by=examples` (in proportion to the
    shard's examples) its choice for unequal ones. The divisor is that of the actual contributors (L6).
    """

    by: MeanBy = MeanBy.uniform

    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """The mean; raises ValueError where deltas and weights differ in number or none is given."""
        shares = [1.0] * len(weights) if self.by is MeanBy.uniform else list(weights)
        total = sum(shares)
        if not total > 0:
            raise ValueError(f"cannot take a mean of {len(weights)} contributions with the weights {shares}")
        mean: Tensors = {}
        for delta, share in zip(deltas, shares, strict=True):
            first = not mean
            mean = mean or buffers.like(delta)
            for name, value in delta.items():
                if first:
                    torch.mul(value.to(torch.float32), share / total, out=mean[name])
                else:
                    mean[name].add_(value, alpha=share / total)
        return mean
