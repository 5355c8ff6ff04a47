"""The coordinate-wise trimmed mean: what is left out, what is shortened, and what a bad contribution can do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from diloco.codec import Float32, Int8
from diloco.merge import Mean, TrimmedMean
from diloco.messages import Commit, Contribution, Fold, IslandId, ModuleKey, Snapshot, SourceId, Tensors
from diloco.outer import Sgd
from diloco.store import ModuleStore
from diloco.sums import PIECE

KEY = ModuleKey("whole.0/0")


def merged(*rows: list[float], trim: float = 0.2, clip: float = 0.0) -> list[float]:
    deltas: list[Tensors] = [{"w": torch.tensor(row)} for row in rows]
    found: list[float] = TrimmedMean(trim=trim, clip=clip).combine(deltas, [1.0] * len(rows))["w"].tolist()
    return found


def some(count: int, size: int = 50) -> list[Tensors]:
    generator = torch.Generator().manual_seed(count)
    return [
        {"w": torch.randn(size, generator=generator), "b": torch.randn(2, 3, generator=generator)} for _ in range(count)
    ]


def stacked(deltas: list[Tensors], name: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.stack([delta[name].double().numpy() for delta in deltas])


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.2, 0.25, 0.4, 0.49])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13, 64])
def test_equals_scipy(count: int, trim: float) -> None:
    merge, deltas = TrimmedMean(trim=trim, clip=0), some(count)
    cut = (merge.left_out(count) + 0.5) / count  # scipy rounds down
    found = merge.combine(deltas, [1.0] * count)
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), trim_mean(stacked(deltas, name), cut, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("trim", "count", "expected"),
    [
        (0.2, 5, 1),
        (0.2, 10, 2),
        (0.2, 64, 13),
        (0.2, 4, 1),  # of five one was lost: one bad one is still left out
        (0.2, 3, 1),
        (0.2, 2, 0),  # would leave nothing
        (0.2, 1, 0),
        (0.07, 100, 7),  # though .07 * 100 is more than 7 in floats
        (0.49, 5, 2),
        (0.49, 4, 1),
        (0.49, 100, 49),
        (0.0, 100, 0),
    ],
)
def test_how_many_are_left_out(trim: float, count: int, expected: int) -> None:
    assert TrimmedMean(trim=trim).left_out(count) == expected


def test_by_hand() -> None:
    """Of 1 2 3 4 100 the mean of 2 3 4; each element for itself."""
    rows = [[1.0, 9.0], [100.0, -7.0], [3.0, 1.0], [2.0, 2.0], [4.0, 3.0]]
    assert merged(*rows) == pytest.approx([3.0, 2.0])


def test_one_and_two_are_their_mean_and_three_the_median() -> None:
    assert merged([5.0, -1.0]) == [5.0, -1.0]
    assert merged([5.0], [1.0]) == [3.0]
    assert merged([5.0], [1.0], [1000.0]) == [5.0]
    assert merged([5.0], [1.0], [1000.0], [3.0], trim=0.49) == [4.0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_without_trimming_and_clipping_it_is_the_mean_to_the_bit(count: int) -> None:
    deltas, weights = some(count), [1.0] * count
    found, mean = TrimmedMean(trim=0, clip=0).combine(deltas, weights), Mean().combine(deltas, weights)
    assert all(torch.equal(value, mean[name]) for name, value in found.items())


def test_clipping_that_changes_nothing_changes_nothing() -> None:
    deltas, weights = some(7), [1.0] * 7
    found, same = (TrimmedMean(trim=0, clip=clip).combine(deltas, weights) for clip in (3.0, 0.0))
    assert all(torch.equal(value, same[name]) for name, value in found.items())


@given(order=st.permutations(range(6)), trim=st.sampled_from([0.0, 0.2, 0.4]), clip=st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_the_order_of_islands_does_not_matter(order: list[int], trim: float, clip: float) -> None:
    merge, deltas = TrimmedMean(trim=trim, clip=clip), some(6)
    first, second = (merge.combine(given, [1.0] * 6) for given in (deltas, [deltas[i] for i in order]))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


def test_weights_do_not_count() -> None:
    deltas = some(5)
    found, same = (TrimmedMean().combine(deltas, weights) for weights in ([1.0] * 5, [1e9, 1.0, 2.0, 3.0, 4.0]))
    assert all(torch.equal(value, same[name]) for name, value in found.items())


def test_the_parts_in_which_large_tensors_are_computed_do_not_show() -> None:
    deltas: list[Tensors] = [{"w": delta["w"].view(2, -1)} for delta in some(5, size=2 * PIECE + 10)]
    found = TrimmedMean(clip=0).combine(deltas, [1.0] * 5)["w"]
    assert found.shape == deltas[0]["w"].shape
    np.testing.assert_allclose(found.numpy(), trim_mean(stacked(deltas, "w"), 0.2, axis=0), rtol=1e-5, atol=1e-6)


def test_a_long_one_is_shortened_to_a_multiple_of_the_median_length() -> None:
    """Lengths 5, 5, 10 and 50: their median is 7.5, and twice that is what the last one is shortened to."""
    rows = [[3.0, 4.0], [4.0, -3.0], [6.0, 8.0], [30.0, -40.0]]
    assert merged(*rows, trim=0, clip=2.0) == pytest.approx([(13 + 9) / 4, (9 - 12) / 4], rel=1e-6)


def test_the_length_is_that_of_all_tensors_of_a_module() -> None:
    """3 and 4 are 5, as the two others are; the last is three times as long, and shortened to twice."""
    deltas: list[Tensors] = [{"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}] * 2
    deltas += [{"a": torch.tensor([9.0]), "b": torch.tensor([12.0])}]
    found = TrimmedMean(trim=0, clip=2.0).combine(deltas, [1.0] * 3)
    assert (found["a"].item(), found["b"].item()) == pytest.approx((4.0, 16 / 3))


def test_zeros_are_no_length_to_compare_with() -> None:
    assert merged([0.0], [0.0], [0.0], [2.0], trim=0, clip=1.0) == [0.5]
    assert merged([0.0], [0.0], clip=1.0) == [0.0]


@pytest.mark.parametrize("size", [1e-30, 1e25, 1e38])
def test_very_small_and_very_large_ones_stay_finite(size: float) -> None:
    for clip in (0.0, 3.0):
        assert all(map(math.isfinite, merged([size, 0.0], [-size, size], [size, size], clip=clip)))


@pytest.mark.parametrize("bad", [-10.0, 1e6, 0.0, -1e30])
def test_what_one_of_five_sends_moves_no_element_beyond_the_others(bad: float) -> None:
    honest = some(4)
    poison = {name: torch.full_like(value, bad) for name, value in honest[0].items()}
    for place, clip in itertools.product(range(5), (0.0, 3.0)):
        deltas = [*honest[:place], poison, *honest[place:]]
        found = TrimmedMean(clip=clip).combine(deltas, [1.0] * 5)
        for name, value in found.items():
            others = torch.stack([delta[name] for delta in honest])
            assert bool((value >= others.min(dim=0).values - 1e-6).all())
            assert bool((value <= others.max(dim=0).values + 1e-6).all())


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, math.nan])
def test_a_share_that_leaves_nothing_is_refused(trim: float) -> None:
    with pytest.raises(ValueError, match=r"merge\.trim=.* is outside \[0, 0\.5\).* 0 leaves out none"):
        TrimmedMean(trim=trim)


@pytest.mark.parametrize("clip", [-1.0, 0.5, math.inf, math.nan])
def test_a_multiple_below_one_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=r"merge\.clip=.* neither 0 .* nor at least 1"):
        TrimmedMean(clip=clip)


def test_in_the_store_also_where_contributions_would_be_added_up_as_they_come() -> None:
    """It has to have all at once: nothing is folded, and the commit finds all."""
    codec, deltas = Int8(), [{"w": row} for row in torch.randn(5, 300, generator=torch.Generator().manual_seed(0))]
    deltas[2] = {"w": -10 * deltas[2]["w"]}
    sources, weights = tuple(map(SourceId, range(5))), (1.0,) * 5
    store = ModuleStore(outer=Sgd(lr=1.0), merge=TrimmedMean(clip=0), codec=codec, codec_down=Float32())
    start = Float32().encode({"w": torch.zeros(300)})
    store.fill([Snapshot(module=KEY, version=0, base_version=None, payload=start)])
    sent = Contribution(
        module=KEY, source=SourceId(0), island=IslandId(0), round=0, base_version=0, payload=codec.encode(deltas[0])
    )
    for source, delta in zip(sources, deltas, strict=True):
        assert store.push(replace(sent, source=source, payload=codec.encode(delta))).good
    store.fold(Fold(module=KEY, round=0, sources=sources[:3], weights=weights[:3], planned=weights))
    store.commit(Commit(module=KEY, round=0, sources=sources, weights=weights, planned=weights))
    decoded = np.stack([codec.decode(codec.encode(delta))["w"].double().numpy() for delta in deltas])
    (snapshot,) = store.pull({KEY: None})
    found = Float32().decode(snapshot.payload)["w"].numpy()
    np.testing.assert_allclose(found, -trim_mean(decoded, 0.2, axis=0), rtol=1e-5, atol=1e-6)
