"""Documents to shards: overlap, capacity, replicas; and what is reported."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipaco import shards
from dipaco.saved import Floats


def scores(documents: int, paths: int, seed: int = 0, skew: float = 0.0) -> Floats:
    random = np.random.default_rng(seed)
    return (random.normal(size=(documents, paths)) - skew * np.arange(paths)).astype(np.float32)


@given(documents=st.integers(1, 40), paths=st.integers(1, 6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_document_is_in_exactly_n_shards(documents: int, paths: int, data: st.DataObject) -> None:
    overlap, slack = data.draw(st.integers(1, paths)), data.draw(st.floats(1, 3))
    documents = max(documents, paths)
    given_scores = scores(documents, paths, seed=data.draw(st.integers(0, 9)), skew=data.draw(st.floats(0, 3)))
    for chosen in (
        shards.overlapping(given_scores, overlap),
        shards.balanced(given_scores, slack=slack, overlap=overlap),
    ):
        assert chosen.shape == (documents, overlap) and chosen.min() >= 0 and chosen.max() < paths
        assert all(len(set(row)) == overlap for row in chosen.tolist())


def test_overlap_takes_the_best_shards() -> None:
    given_scores = np.array([[3, 1, 2], [0, 5, 4], [1, 1, 0]], np.float32)
    assert shards.overlapping(given_scores, 2).tolist() == [[0, 2], [1, 2], [0, 1]]


@pytest.mark.parametrize("slack", [1.0, 1.25, 2.0])
def test_no_shard_is_above_its_capacity(slack: float) -> None:
    given_scores = scores(103, 4, skew=2.0)  # nearly all want shard 0
    free = np.bincount(shards.overlapping(given_scores, 1)[:, 0], minlength=4)
    found = np.bincount(shards.balanced(given_scores, slack=slack)[:, 0], minlength=4)
    assert free.max() > 90 and found.max() <= np.ceil(slack * 103 / 4) and found.sum() == 103


@given(seed=st.integers(0, 9), slack=st.floats(1.2, 3), overlap=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_no_shard_starves(seed: int, slack: float, overlap: int) -> None:
    """However little the others' documents fit it, shard 4 gets the 1/slack of a fair share; nothing is lost."""
    given_scores = scores(200, 5, seed=seed, skew=3.0)
    assert np.bincount(shards.overlapping(given_scores, overlap).ravel(), minlength=5)[4] < 3
    chosen = shards.balanced(given_scores, slack=slack, overlap=overlap)
    found, fair = np.bincount(chosen.ravel(), minlength=5), 200 * overlap / 5
    assert found.min() >= min(fair / slack, np.floor(fair)) and found.max() <= np.ceil(slack * fair)
    assert all(len(set(row)) == overlap for row in chosen.tolist())


def test_a_small_shard_takes_what_loses_least() -> None:
    """Eight documents that want shard 0; with room for six, 1.33 is the least: the two that lose least go."""
    losses = np.array([9, 8, 7, 6, 5, 4, 0.1, 0.2], np.float32)
    given_scores = np.stack([losses, np.zeros(8, np.float32)], axis=1)
    assert shards.balanced(given_scores, slack=1.5)[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]  # 8/2/1.5 = 2.67


def test_with_room_for_all_nothing_changes() -> None:
    given_scores = scores(50, 4)
    assert np.array_equal(shards.balanced(given_scores, slack=4.0), shards.overlapping(given_scores, 1))


def test_who_loses_most_chooses_first() -> None:
    given_scores = np.array([[1.0, 0.9], [5.0, 0.0], [2.0, 1.5], [0.0, 0.1]], np.float32)  # margins .1, 5, .5, .1
    assert shards.balanced(given_scores, slack=1.0)[:, 0].tolist() == [1, 0, 0, 1]  # 0 has room for two


def test_balance_by_tokens() -> None:
    sizes = np.random.default_rng(1).integers(1, 100, size=200)
    chosen = shards.balanced(scores(200, 4, skew=2.0), slack=1.1, sizes=sizes)
    assert shards.loads(chosen, 4, sizes).max() <= 1.1 / 4 + 100 / sizes.sum()


@given(paths=st.integers(1, 4), replicas=st.integers(1, 3), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_replicas_share_a_paths_documents_evenly(paths: int, replicas: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(5, 10, size=60)
    own = [np.flatnonzero(random.random(60) < 0.6) for _ in range(paths)]
    dealt = shards.deal_replicas(own, sizes, paths * replicas)
    for path, documents in enumerate(own):
        parts = dealt[path::paths]  # source s trains path s % paths
        assert sorted(np.concatenate(parts).tolist()) == documents.tolist()
        tokens = [sizes[part].sum() for part in parts]
        assert max(tokens) - min(tokens) < 10


def test_loads_purity_and_concentration_by_hand() -> None:
    assignment, domains = np.array([0, 0, 0, 1, 1]), np.array([7, 7, 2, 2, 2])
    assert shards.loads(assignment, 3).tolist() == [0.6, 0.4, 0.0]
    assert shards.loads(assignment, 2, np.array([1, 1, 1, 1, 6])).tolist() == [0.3, 0.7]
    assert shards.loads(np.array([[0, 1], [0, 2]]), 3).tolist() == [0.5, 0.25, 0.25]
    assert shards.purity(assignment, domains) == 0.8  # 2 of 3 in path 0, both in path 1
    assert shards.concentration(assignment, domains) == 0.8  # both of domain 7, 2 of 3 of domain 2
    one = np.zeros(5, np.int64)
    assert shards.purity(one, domains) == 0.6 and shards.concentration(one, domains) == 1.0


def test_what_is_wrong_with_shards() -> None:
    for tokens in ([100, 0], [100, 32]):
        with pytest.raises(
            ValueError, match=rf"path 1 holds {tokens[1]} tokens, fewer than .* \(33\): workload.balance"
        ):
            shards.check_shards(tokens, needed=33)
    assert shards.check_shards([100, 33], needed=33) == []
    (warning,) = shards.check_shards([1000, 1000, 60], needed=33)
    assert "less than 10% of a fair share of 687 tokens: path 2 (60): workload.balance=1.5" in warning
    (warning,) = shards.check_shards([1000, 1000, 60], needed=33, balance=1.5)
    assert "workload.balance" not in warning and "workload.overlap=2" in warning
    assert shards.check_prefixes(np.array([33, 40, 90]), prefix_tokens=32) == []
    (warning,) = shards.check_prefixes(np.array([32, 40, 90]), prefix_tokens=32)
    assert "33% of the validation documents have no more than workload.prefix_tokens=32 tokens" in warning
    assert shards.few_tokens([900, 1000], parameters=900) == shards.few_tokens([9], parameters=900) == []
    assert shards.few_tokens([9, 9], parameters=0) == []
    (warning,) = shards.few_tokens([450, 1000], parameters=900)
    assert "2 paths share 1450 tokens: the smallest has 450, 0.5 for each" in warning


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="3 documents cannot fill 4 paths"):
        shards.overlapping(scores(3, 4), 1)
    for overlap in (0, 5):
        with pytest.raises(ValueError, match=f"overlap={overlap} with 4 paths: use 1 to 4"):
            shards.overlapping(scores(9, 4), overlap)
    with pytest.raises(ValueError, match="balance=0.9: a shard must have room for its fair share"):
        shards.balanced(scores(9, 4), slack=0.9)
    with pytest.raises(ValueError, match="workload.paths=4 do not divide 6 sources: use a multiple of 4"):
        shards.deal_replicas([np.arange(3)] * 4, np.ones(3), 6)
