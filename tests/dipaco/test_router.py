"""Routers: what they find, what they keep, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score

from dipaco import router as routers
from dipaco.router import KMeansRouter, LinearRouter, ProductRouter, Router, balancing_bias
from dipaco.saved import Floats, Integers
from dipaco.shards import loads


def planted(documents: int, sides: tuple[int, int], *, noise: float = 0.1) -> tuple[Floats, Integers]:
    """Features of width 8 whose halves have clusters of their own; and the pair of clusters as one number."""
    random = default_rng(0)
    first, second = (random.normal(size=(side, 4)) * 3 for side in sides)
    i, j = (random.integers(0, side, documents) for side in sides)
    features = np.concatenate([first[i], second[j]], axis=1) + noise * random.normal(size=(documents, 8))
    return features.astype(np.float32), (i * sides[1] + j).astype(np.int64)


def test_k_means_is_scikit_learns() -> None:
    features, _ = planted(300, (2, 2), noise=1.0)
    found = KMeansRouter.fit(features, paths=4, seed=3).assign(features)[:, 0]
    expected = KMeans(4, n_init=10, random_state=3).fit_predict(features)
    assert adjusted_rand_score(found, expected) == 1.0


def test_product_k_means_finds_a_planted_product() -> None:
    features, pairs = planted(600, (3, 3))
    router = ProductRouter.fit(features, paths=9, seed=0)
    found = router.assign(features)[:, 0]
    assert router.paths == 9 and adjusted_rand_score(found, pairs) == 1.0
    # path = i * k + j: paths with the same i share a cluster of the first half, those with the same j one of the second
    assert adjusted_rand_score(found // 3, pairs // 3) == adjusted_rand_score(found % 3, pairs % 3) == 1.0
    assert np.bincount(found, minlength=9).tolist() == sorted_like(found, np.bincount(pairs, minlength=9))


def sorted_like(found: Integers, sizes: Integers) -> list[int]:
    """The planted sizes in the order of the clusters found."""
    order = np.argsort(np.argsort(np.bincount(found, minlength=len(sizes)), kind="stable"), kind="stable")
    return np.sort(sizes)[order].tolist()


def test_scores_of_a_product_are_sums_of_distances() -> None:
    first, second = np.array([[0.0], [1.0]], np.float32), np.array([[0.0], [10.0]], np.float32)
    scores = ProductRouter(first, second).scores(np.array([[1.0, 9.0]], np.float32))
    assert scores.tolist() == [[-(1 + 81), -(1 + 1), -81, -1]]  # by hand: (i, j) = 00, 01, 10, 11


def test_a_linear_router_recovers_planted_domains_from_scores() -> None:
    features, domains = planted(800, (2, 2), noise=0.7)
    # Each path is the better the more a document is of its domain.
    own = np.eye(4)[domains] * 5 + default_rng(1).normal(size=(800, 4))
    held_out, rest = features[:200], features[200:]
    router = LinearRouter.fit(held_out, own[:200].argmax(axis=1), paths=4, match=rest)
    assert (router.assign(rest)[:, 0] == domains[200:]).mean() > 0.95
    plain = LogisticRegression(C=routers.INVERSE_PENALTY, max_iter=1000).fit(held_out, own[:200].argmax(axis=1))
    assert np.array_equal(router._weights, plain.coef_.astype(np.float32))


@pytest.mark.parametrize("target", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.05, 0.15, 0.3, 0.5]])
def test_the_bias_matches_target_loads(target: list[float]) -> None:
    features, domains = planted(3000, (2, 2), noise=2.0)
    router = LinearRouter.fit(features[:300], domains[:300], paths=4, match=features[300:], target=np.array(target))
    found = loads(router.assign(features[300:]), 4)
    assert np.abs(found / target - 1).max() <= 0.01


def test_the_bias_of_many_paths() -> None:
    scores = default_rng(0).normal(size=(6400, 16)).astype(np.float32) * np.linspace(0.5, 3, 16, dtype=np.float32)
    target = np.full(16, 1 / 16)
    found = loads((scores + balancing_bias(scores, target)).argmax(axis=1), 16)
    assert np.abs(found * 16 - 1).max() <= 0.01


def test_a_path_that_is_best_for_nothing_gets_its_target() -> None:
    features, domains = planted(1000, (2, 2), noise=1.0)
    labels = np.where(domains == 3, 2, domains)  # nobody's best path is 3
    router = LinearRouter.fit(features, labels, paths=4, match=features, target=np.full(4, 0.25))
    assert np.abs(loads(router.assign(features), 4) * 4 - 1).max() <= 0.01
    one = LinearRouter.fit(features, np.zeros(1000, np.int64), paths=2, match=features)  # all are of one path
    assert (one.assign(features) == 0).all()


def test_two_paths_have_scikit_learns_decision() -> None:
    features, domains = planted(400, (2, 1), noise=2.0)
    router = LinearRouter.fit(features, domains, paths=2, match=features, target=np.array([0.5, 0.5]))
    model = LogisticRegression(C=routers.INVERSE_PENALTY, max_iter=1000).fit(features, domains)
    difference = np.diff(router.scores(features), axis=1)[:, 0] - model.decision_function(features)
    assert np.ptp(difference) < 1e-4  # but for the bias


@pytest.fixture(params=["kmeans", "product", "linear"])
def fitted(request: pytest.FixtureRequest) -> Router:
    features, domains = planted(200, (2, 2))
    if request.param == "linear":
        return LinearRouter.fit(features, domains, paths=4, match=features)
    kind = {"kmeans": KMeansRouter, "product": ProductRouter}[request.param]
    return kind.fit(features, paths=4, seed=0)


def test_a_router_comes_back_from_its_folder(fitted: Router, tmp_path: Path) -> None:
    features, _ = planted(50, (2, 2))
    fitted.save(tmp_path / "deep" / "folder")
    loaded = routers.load(tmp_path / "deep" / "folder")
    assert type(loaded) is type(fitted) and loaded.paths == 4
    assert np.array_equal(loaded.scores(features), fitted.scores(features))


def test_what_every_router_keeps(fitted: Router) -> None:
    features, _ = planted(50, (2, 2))
    scores = fitted.scores(features)
    assert scores.shape == (50, 4) and scores.dtype == np.float32
    top = fitted.assign(features, top=3)
    assert top.dtype == np.int64 and all(len(set(row)) == 3 for row in top.tolist())
    assert np.array_equal(top[:, 0], scores.argmax(axis=1)) and np.array_equal(top[:, :1], fitted.assign(features))
    with pytest.raises(ValueError, match="fitted on features of width 8, and was given 6: use the base model"):
        fitted.scores(features[:, :6])
    for top_ in (0, 5):
        with pytest.raises(ValueError, match=f"top={top_} of 4 paths: use 1 to 4"):
            fitted.assign(features, top=top_)


def test_what_cannot_be_fitted() -> None:
    features, domains = planted(20, (2, 2))
    with pytest.raises(ValueError, match="needs a square number of paths, not 6: use 4 paths"):
        ProductRouter.fit(features, paths=6, seed=0)
    for kind in (KMeansRouter, ProductRouter):
        with pytest.raises(ValueError, match="3 documents cannot fill 4 paths: use fewer paths"):
            kind.fit(features[:3], paths=4, seed=0)
    with pytest.raises(ValueError, match="20 documents with 1 distinct features cannot fill 4 clusters"):
        KMeansRouter.fit(np.ones((20, 8), np.float32), paths=4, seed=0)
    with pytest.raises(ValueError, match="20 labels for 20 documents: give one of 0 to 2"):
        LinearRouter.fit(features, domains, paths=3, match=features)
    with pytest.raises(ValueError, match="give a share for each of 4 paths, with sum 1"):
        LinearRouter.fit(features, domains, paths=4, match=features, target=np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="was given 5"):
        LinearRouter.fit(features, domains, paths=4, match=features[:, :5])


def test_folders_that_hold_no_router(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no router that can be read"):
        routers.load(tmp_path)
    KMeansRouter(np.zeros((2, 3), np.float32)).save(tmp_path)
    (tmp_path / "router.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="holds no router that can be read"):
        routers.load(tmp_path)
    KMeansRouter(np.zeros((2, 3), np.float32)).save(tmp_path)
    meta = tmp_path / "router.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99, not 1: fit it anew"):
        routers.load(tmp_path)
