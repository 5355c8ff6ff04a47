"""Routers: features of documents -> a score for each path, the highest of which a document belongs to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

import numpy as np

from dipaco import saved
from dipaco.saved import Doubles, Floats, Integers

FORMAT = 1  # of saved routers
RESTARTS = 10  # of k-means, for up to MANY paths; a third of it for more
MANY = 16  # paths
INVERSE_PENALTY = 10.0  # LogisticRegression's C: 1, 10 and 100 differ by at most .03 in purity on botocore
BIAS_TEMPERATURES = np.geomspace(1, 1e-3, 13)  # in standard deviations of the scores
BIAS_STEPS = 50  # for each temperature
BIAS_TOLERANCE = 0.01  # of each path's target


class Router(ABC):
    """Scores paths by features."""

    @property
    @abstractmethod
    def paths(self) -> int:
        """How many paths it chooses among."""

    @abstractmethod
    def scores(self, features: Floats) -> Floats:
        """float32[documents, paths]; higher is better. ValueError where `features` are of another width."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write router.npz and router.json into `folder`, for `load`."""

    def assign(self, features: Floats, top: int = 1) -> Integers:
        """int64[documents, top]: the best paths of each document, the best first."""
        if not 1 <= top <= self.paths:
            raise ValueError(f"top={top} of {self.paths} paths: use 1 to {self.paths}")
        return best(self.scores(features), top)


@final
class KMeansRouter(Router):
    """The nearest of k centres (arXiv:2403.10616, section 2.4.1)."""

    def __init__(self, centers: Floats) -> None:
        """`centers`: float32[paths, width]."""
        self._centers = centers

    @classmethod
    def fit(cls, features: Floats, *, paths: int, seed: int) -> KMeansRouter:
        """k-means of `features`, float32[documents, width]. ValueError for fewer documents than paths."""
        return cls(_centers(features, paths, seed))

    @property
    def paths(self) -> int:
        """As many as centres."""
        return len(self._centers)

    def scores(self, features: Floats) -> Floats:
        """Minus the squared distances to the centres."""
        _check_width(features, self._centers.shape[1])
        return -_squared_distances(features, self._centers)

    def save(self, folder: Path) -> None:
        """The centres."""
        saved.write(folder, "router", {"centers": self._centers}, {"kind": "kmeans", "format": FORMAT})


@final
class ProductRouter(Router):
    """k-means of each half of the features: path i * k + j, of k * k, for the price of k + k centres.

    Product k-means of arXiv:2403.10616, section 2.4.1.
    """

    def __init__(self, first: Floats, second: Floats) -> None:
        """`first`: float32[k, width // 2], centres in the first half; `second`: those in the rest."""
        self._first, self._second = first, second

    @classmethod
    def fit(cls, features: Floats, *, paths: int, seed: int) -> ProductRouter:
        """ValueError where `paths` is no square, or there are fewer documents than paths."""
        check_square(paths)
        check_enough(len(features), paths)
        side, half = math.isqrt(paths), features.shape[1] // 2
        return cls(_centers(features[:, :half], side, seed), _centers(features[:, half:], side, seed))

    @property
    def paths(self) -> int:
        """As many as pairs of a centre of either half."""
        return len(self._first) * len(self._second)

    def scores(self, features: Floats) -> Floats:
        """Minus the sum of the squared distances in the two halves; path i * k + j has centres i and j."""
        half = self._first.shape[1]
        _check_width(features, half + self._second.shape[1])
        first = _squared_distances(features[:, :half], self._first)  # float32[documents, k]
        second = _squared_distances(features[:, half:], self._second)
        return -(first[:, :, None] + second[:, None, :]).reshape(len(features), -1)

    def save(self, folder: Path) -> None:
        """The centres of both halves."""
        arrays = {"first": self._first, "second": self._second}
        saved.write(folder, "router", arrays, {"kind": "product", "format": FORMAT})


@final
class LinearRouter(Router):
    """A linear classifier with one class a path: discriminative routing of arXiv:2403.10616, section 2.4.2."""

    def __init__(self, weights: Floats, bias: Floats) -> None:
        """`weights`: float32[paths, width]; `bias`: float32[paths]."""
        self._weights, self._bias = weights, bias

    @classmethod
    def fit(
        cls, features: Floats, labels: Integers, *, paths: int, match: Floats, target: Doubles | None = None
    ) -> LinearRouter:
        """Logistic regression of `labels` (best paths) on `features`, then a bias for the loads.

        With the bias, the shares of the documents with features `match` that go to each path are `target`
        within 1 %, or a document or two where they are few; by default the shares of the labels. Documents
        with equal features stay together, so a share may miss its target by as many. A path that is no
        document's label gets what others score lowest, up to its target. Raises ValueError for labels
        outside 0 ... paths - 1, a target of another length, or features of another width.
        """
        if len(labels) != len(features) or len(labels) == 0 or labels.min() < 0 or labels.max() >= paths:
            raise ValueError(
                f"{len(labels)} labels for {len(features)} documents: give one of 0 to {paths - 1} to each"
            )
        shares = np.bincount(labels, minlength=paths) / len(labels) if target is None else target
        if shares.shape != (paths,) or shares.min() < 0 or abs(shares.sum() - 1) > 1e-6:
            raise ValueError(f"target={shares.tolist()}: give a share for each of {paths} paths, with sum 1")
        _check_width(match, features.shape[1])
        found = np.unique(labels)
        weights = np.zeros((paths, features.shape[1]), dtype=np.float32)
        bias = np.zeros(paths, dtype=np.float32)
        if len(found) > 1:
            from sklearn.linear_model import LogisticRegression
            from threadpoolctl import threadpool_limits

            with threadpool_limits(1):  # so that the same data give the same bits
                model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000).fit(features, labels)
            binary = len(found) == 2  # then scikit-learn has the second class's row alone
            weights[found[1:] if binary else found] = model.coef_
            bias[found[1:] if binary else found] = model.intercept_
        bias[np.setdiff1d(np.arange(paths), found)] = bias[found].min()
        scores = match @ weights.T + bias
        return cls(weights, bias + balancing_bias(scores, shares))

    @property
    def paths(self) -> int:
        """As many as classes."""
        return len(self._bias)

    def scores(self, features: Floats) -> Floats:
        """The classes' logits."""
        _check_width(features, self._weights.shape[1])
        return features @ self._weights.T + self._bias

    def save(self, folder: Path) -> None:
        """Weights and bias."""
        arrays = {"weights": self._weights, "bias": self._bias}
        saved.write(folder, "router", arrays, {"kind": "linear", "format": FORMAT})


def load(folder: Path) -> Router:
    """What `save` wrote into `folder`. Raises ValueError where it is not there or of another version."""
    arrays, meta = saved.read(folder, "router")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder}: its router has format {meta.get('format')}, not {FORMAT}: fit it anew")
    if meta["kind"] == "kmeans":
        return KMeansRouter(arrays["centers"])
    if meta["kind"] == "product":
        return ProductRouter(arrays["first"], arrays["second"])
    return LinearRouter(arrays["weights"], arrays["bias"])


def best(scores: Floats, top: int) -> Integers:
    """int64[documents, top]: the paths with the highest scores, the highest first; of equal ones the lower path."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :top].astype(np.int64)


def balancing_bias(scores: Floats, target: Doubles) -> Floats:
    """float32[paths]: what to add to `scores`, float[documents, paths], for the loads to have the shares `target`.

    The dual prices of a transport problem: found for soft assignments (arXiv:1306.0895, eq. 4, the Sinkhorn
    iteration) at falling temperatures. Paths with target 0 get nothing.
    """
    bias = np.zeros(len(target))
    wanted = np.where(target > 0, target, 1e-30)
    spread = float(scores.std()) or 1.0
    closest, found = np.inf, bias.copy()
    for temperature in BIAS_TEMPERATURES * spread:
        for _ in range(BIAS_STEPS):
            shifted = scores + bias
            loads = np.bincount(shifted.argmax(axis=1), minlength=len(target)) / len(scores)
            misses = (np.abs(loads - target) / wanted)[target > 0]
            if misses.sum() < closest:  # the sum: where two paths have equal scores, one of them misses all in any case
                closest, found = float(misses.sum()), bias.copy()
            if misses.max() <= BIAS_TOLERANCE / 2:  # half: float32 and ties move a few documents
                return found.astype(np.float32)
            soft = np.exp((shifted - shifted.max(axis=1, keepdims=True)) / temperature)
            soft /= soft.sum(axis=1, keepdims=True)
            bias += temperature * (np.log(wanted) - np.log(soft.mean(axis=0) + 1e-30))
            bias -= bias.mean()
    return found.astype(np.float32)


def check_square(paths: int) -> None:
    """Raise ValueError where product k-means cannot have so many paths."""
    if math.isqrt(paths) ** 2 != paths:
        near = max(1, round(paths**0.5)) ** 2
        raise ValueError(
            f"workload.router=product needs a square number of paths, not {paths}: use {near} paths, or "
            "workload.router=kmeans"
        )


def check_enough(documents: int, paths: int) -> None:
    """Raise ValueError where there are fewer documents than paths."""
    if documents < paths:
        raise ValueError(
            f"{documents} documents cannot fill {paths} paths: use fewer paths, cut text files with "
            "data.document=passage or line, or give more data"
        )


def _centers(features: Floats, clusters: int, seed: int) -> Floats:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    check_enough(len(features), clusters)
    distinct = len(np.unique(features, axis=0))
    if distinct < clusters:
        raise ValueError(
            f"{len(features)} documents with {distinct} distinct features cannot fill {clusters} clusters: use fewer "
            "paths, a larger workload.prefix_tokens, or more data"
        )
    restarts = RESTARTS if clusters <= MANY else RESTARTS // 3
    with threadpool_limits(1):  # so that the same data give the same bits
        found: Any = KMeans(clusters, n_init=restarts, random_state=seed).fit(features)
    return np.asarray(found.cluster_centers_, dtype=np.float32)


def _squared_distances(features: Floats, centers: Floats) -> Floats:
    """float32[documents, centers]."""
    products = features @ centers.T
    squares = (features**2).sum(axis=1)[:, None] + (centers**2).sum(axis=1)
    return np.asarray(squares - 2 * products, dtype=np.float32)


def _check_width(features: Floats, width: int) -> None:
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"the router was fitted on features of width {width}, and was given {features.shape[-1]}: use the base "
            "model and settings that it was fitted with (workload.base, workload.router_file), or fit a new router"
        )
