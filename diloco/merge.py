"""Merges: how contributions become one pseudo-gradient, in float32."""

from __future__ import annotations

import math
import re
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from diloco import buffers, sums
from diloco.messages import Tensors

# Of a mean of unit vectors; below it, mostly what float32 and the codec have rounded. k orthogonal ones have 1/sqrt(k).
LEAST_LENGTH = 1e-4
GREATEST_COSINE = 1 - 1e-6  # nearer to 1 or -1, the sine of an angle is what float32 has rounded


@dataclass(kw_only=True)
class Merge(ABC):
    """Combines the deltas of one module, given in order of source, and normalises the weights itself."""

    @abstractmethod
    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """One float32 pseudo-gradient with the names and shapes of the deltas, which are only read, never given back.

        `weights` has one positive number a delta (the examples behind it). The iterable is read once, so
        that no more than one decoded delta need exist beside the sum.
        """

    def fold(self, into: Tensors, delta: Tensors, weight: float, planned: Sequence[float]) -> float | None:
        """Add `delta`'s share in a merge of all `planned` weights to `into`, a sum that is empty at first, in place.

        Returns the share; the shares of all that are planned add up to 1. None, and nothing is done, where a merge
        has to have all deltas at once.
        """
        return None


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
        total = _total(shares)
        mean: Tensors = {}
        for delta, share in zip(deltas, shares, strict=True):
            mean = _added(mean, delta, dict.fromkeys(delta, share / total))
        return mean

    def fold(self, into: Tensors, delta: Tensors, weight: float, planned: Sequence[float]) -> float:
        """As `combine` does it, one by one, to the bit."""
        uniform = self.by is MeanBy.uniform
        share = 1.0 / len(planned) if uniform else weight / _total(planned)
        into |= _added(into, delta, dict.fromkeys(delta, share))
        return share


@dataclass(kw_only=True)
class RDA(Merge):
    """Sizes and directions averaged apart, for each tensor (Decoupled DiLoCo, arXiv:2604.21428).

    (sum w |d| / sum w) phi(sum w phi(d) / sum w), with phi(x) = x / |x| and phi(0) = 0. The norm of the plain mean
    falls as 1/sqrt(k) for k contributions that are orthogonal; this one's does not, so that the outer rate may stay
    what it is. Parameters whose name `mean_for` matches (a regular expression, `re.search`; empty = none) get the
    weighted mean, as the paper has it for embeddings, and so does a tensor whose directions cancel out.
    Weights always count.
    """

    mean_for: str = r"embed|\bw[tp]e\b"  # embeddings, as models of `transformers` name them

    def __post_init__(self) -> None:
        try:
            re.compile(self.mean_for)
        except re.error as error:
            raise ValueError(f"merge.mean_for={self.mean_for!r} is no regular expression: {error}") from error

    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """The merged delta; raises ValueError where deltas and weights differ in number or none is given."""
        total = _total(weights)
        mean: Tensors = {}
        directions: Tensors = {}
        sizes: dict[str, float] = {}
        for delta, weight in zip(deltas, weights, strict=True):
            share = weight / total
            norms = {name: sums.norm(value) for name, value in delta.items() if not self._takes_mean(name)}
            mean = _added(mean, delta, dict.fromkeys(delta, share))
            directions = _added(directions, delta, {n: share / norm if norm else 0.0 for n, norm in norms.items()})
            sizes = {name: sizes.get(name, 0.0) + share * norm for name, norm in norms.items()}
        for name, direction in directions.items():
            length = sums.norm(direction)
            if length > LEAST_LENGTH and math.isfinite(sizes[name]):
                torch.mul(direction, sizes[name] / length, out=mean[name])
        return mean

    def _takes_mean(self, name: str) -> bool:
        return bool(self.mean_for) and re.search(self.mean_for, name) is not None


@dataclass(kw_only=True)
class Slerp(Merge):
    """Spherical interpolation of task vectors, group by group (WARP, arXiv:2406.16768, section 3.2 and appendix B).

    slerp(d1, d2, t) = sin((1 - t) W) / sin W d1 + sin(t W) / sin W d2, with cos W = d1 d2 / (|d1| |d2|), and more than
    two one after the other: slerp(slerp(d1 ... dm-1), dm, 1/m). Task vectors of one start are nearly orthogonal; their
    mean is shorter than each of them, and this is not. Where the angle W leaves no direction between them (collinear,
    opposite or zero ones), it is the mean.

    `group`: a regular expression; parameters for which it finds the same text are one vector, and those for which it
    finds none another. By default a layer of a transformer is one. The angle is that of what a module holds of them.
    `by` is as in `Mean`.
    """

    group: str = r"^.*?\.\d+(?=\.)"  # up to the first number: a layer
    by: MeanBy = MeanBy.uniform

    def __post_init__(self) -> None:
        try:
            re.compile(self.group)
        except re.error as error:
            raise ValueError(f"merge.group={self.group!r} is no regular expression: {error}") from error

    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """The merged delta; raises ValueError where deltas and weights differ in number or none is given."""
        shares = [1.0] * len(weights) if self.by is MeanBy.uniform else list(weights)
        _total(shares)
        merged: Tensors = {}
        groups: list[Tensors] = []
        total = 0.0
        for delta, share in zip(deltas, shares, strict=True):
            total += share
            if not merged:
                merged = _added(merged, delta, dict.fromkeys(delta, 1.0))
                groups = self._groups(merged)
            else:
                for group in groups:
                    _turn(group, delta, share / total)
        return merged

    def _groups(self, merged: Tensors) -> list[Tensors]:
        found: dict[str, Tensors] = {}
        for name, value in merged.items():
            match = re.search(self.group, name)
            found.setdefault(match[0] if match else "", {})[name] = value
        return list(found.values())


@dataclass(kw_only=True)
class TrimmedMean(Merge):
    """The coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498, Def. 2): some islands may send anything.

    Of each element, the largest `trim` (beta) of the k values and as many of the smallest are left out; the others'
    mean is taken. trim * k is rounded up, so that it holds out against a share `trim` of bad islands also after some
    were lost. Where that would leave nothing, one value is left of an odd number and two of an even one: the median. Of
    two contributions it is so the mean, and one stays what it is: neither protects against anything.

    Before, a contribution longer than `clip` times the median length is shortened to that; 0 = none is.

    Weights do not count, as in the paper: nobody gains by claiming many examples. Needs all deltas at once, in float32,
    and beside them a few thousand values of each.
    """

    trim: float = 0.2  # at each end, as a share of the contributions
    clip: float = 3.0  # lengths are those of what a module holds

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ValueError(
                f"merge.trim={self.trim} is outside [0, 0.5): the share of the contributions left out at each end;"
                " 0 leaves out none, 0.49 takes the median"
            )
        if not (self.clip == 0 or 1 <= self.clip < math.inf):
            raise ValueError(
                f"merge.clip={self.clip} is neither 0 (nothing is shortened) nor at least 1: so many times the median"
                " length a contribution may be long"
            )

    def left_out(self, count: int) -> int:
        """How many of `count` values are left out at each end."""
        return max(min(math.ceil(self.trim * count - 1e-9), (count - 1) // 2), 0)

    def combine(self, deltas: Iterable[Tensors], weights: Sequence[float]) -> Tensors:
        """The merged delta; raises ValueError where deltas and weights differ in number or none is given."""
        given = [delta for delta, _ in zip(deltas, weights, strict=True)]
        _total([1.0] * len(given))
        factors, cut = self._factors(given), self.left_out(len(given))
        merged = buffers.like(given[0])
        for name, into in merged.items():
            pieces = [torch.split(delta[name].reshape(-1), sums.PIECE) for delta in given]
            for index, out in enumerate(torch.split(into.view(-1), sums.PIECE)):
                rows = [each[index].to(torch.float32) for each in pieces]
                _inner_mean([row if f == 1 else row * f for row, f in zip(rows, factors, strict=True)], cut, out)
        return merged

    def _factors(self, given: Sequence[Tensors]) -> list[float]:
        """By what each is multiplied, so that none is too long. A zero has no length to compare with."""
        if not self.clip:
            return [1.0] * len(given)
        lengths = [math.hypot(*(sums.norm(value) for value in delta.values())) for delta in given]
        most = self.clip * statistics.median([length for length in lengths if length > 0] or [0.0])
        return [most / length if length > most else 1.0 for length in lengths]


def _inner_mean(rows: list[torch.Tensor], cut: int, out: torch.Tensor) -> None:
    """The mean of all but the `cut` largest and smallest of each element. Writes `out`; rows are float32[n], as it is.

    The largest goes to the end by exchanges of neighbours, and the smallest to the beginning: for few left out this is
    several times faster than sorting.
    """
    for done in range(cut):
        last = len(rows) - 1 - done
        for i in [*range(done, last), *reversed(range(done, last - 1))]:
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    kept = rows[cut : len(rows) - cut]
    torch.mul(kept[0], 1 / len(kept), out=out)
    for row in kept[1:]:
        out.add_(row, alpha=1 / len(kept))


def _turn(vector: Tensors, towards: Tensors, share: float) -> None:
    """Turn `vector`, its tensors taken together, by `share` of the way. Writes it in place; `towards` may have more."""
    sizes = [math.hypot(*(sums.norm(tensors[name]) for name in vector)) for tensors in (vector, towards)]
    product = math.fsum(sums.dot(value, towards[name].to(torch.float32)) for name, value in vector.items())
    cosine = product / math.prod(sizes) if math.prod(sizes) else 1.0
    old, new = 1.0 - share, share
    if abs(cosine) < GREATEST_COSINE:
        angle = math.acos(cosine)
        old, new = (math.sin(part * angle) / math.sin(angle) for part in (old, new))
    for name, value in vector.items():
        value.mul_(old).add_(towards[name], alpha=new)


def _total(shares: Sequence[float]) -> float:
    total = sum(shares)
    if not total > 0:
        raise ValueError(f"cannot take a mean of {len(shares)} contributions with the weights {list(shares)}")
    return total


def _added(into: Tensors, delta: Tensors, factors: Mapping[str, float]) -> Tensors:
    """`into`, made here if it is empty, after `delta` times its factor was added; of the names that have a factor."""
    if not factors:
        return into
    if into:
        for name, factor in factors.items():
            into[name].add_(delta[name], alpha=factor)
        return into
    into = buffers.like({name: delta[name] for name in factors})
    for name, factor in factors.items():
        torch.mul(delta[name].to(torch.float32), factor, out=into[name])
    return into
