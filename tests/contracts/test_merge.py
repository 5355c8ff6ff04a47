"""What every Merge keeps: one row of ROWS for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean

from diloco.merge import RDA, Mean, MeanBy, Merge, Slerp, TrimmedMean
from diloco.messages import Tensors

Arrays = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    merge: Merge
    reference: Callable[[Arrays, Sequence[float]], Arrays]  # float64[k, ...], the weights -> float64[...]


def by_examples(values: Arrays, weights: Sequence[float]) -> Arrays:
    result: Arrays = np.average(values, axis=0, weights=weights)
    return result


def sizes_and_directions(values: Arrays, weights: Sequence[float]) -> Arrays:
    flat = values.reshape(len(values), -1)
    sizes = np.linalg.norm(flat, axis=1)
    if not sizes.any():
        return by_examples(values, weights)
    direction = by_examples(flat / sizes[:, None], weights)
    result: Arrays = np.average(sizes, weights=weights) * direction / np.linalg.norm(direction)
    return result.reshape(values.shape[1:])


def turned(values: Arrays, weights: Sequence[float]) -> Arrays:
    """Each tensor on its own, one after the other; what has one element or none has no angle."""
    found, total = values[0].copy(), weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += weight
        share = weight / total
        size = np.linalg.norm(found) * np.linalg.norm(value)
        angle = np.arccos((found * value).sum() / size) if found.size > 1 else 0.0
        if np.sin(angle) < 1e-3:
            found = (1 - share) * found + share * value
        else:
            found = (np.sin((1 - share) * angle) * found + np.sin(share * angle) * value) / np.sin(angle)
    return found


def trimmed(values: Arrays, weights: Sequence[float]) -> Arrays:
    """.3 of four is rounded up to two, but one is left out at each end, so that something is left; of two none."""
    result: Arrays = trim_mean(values, 0.25, axis=0)
    return result


ROWS = {
    "mean_uniform": Row(Mean(by=MeanBy.uniform), lambda values, _: values.mean(axis=0)),
    "mean_examples": Row(Mean(by=MeanBy.examples), by_examples),
    "rda": Row(RDA(), sizes_and_directions),
    "rda_mean": Row(RDA(mean_for="matrix|scalar"), by_examples),
    "slerp": Row(Slerp(group=".*"), lambda values, weights: turned(values, [1.0] * len(weights))),
    "trimmed_mean": Row(TrimmedMean(trim=0.3, clip=0), trimmed),
    "trimmed_mean_all": Row(TrimmedMean(trim=0, clip=0), lambda values, _: values.mean(axis=0)),
    "slerp_examples": Row(Slerp(group=".*", by=MeanBy.examples), turned),
}
WEIGHTS = [10.0, 20.0, 5.0, 65.0]


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def some_deltas(count: int = len(WEIGHTS)) -> list[Tensors]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"scalar": (), "empty": (0,), "matrix": (3, 4)}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_numpy(row: Row, count: int) -> None:
    stacked = {name: np.stack([d[name].double().numpy() for d in some_deltas(count)]) for name in some_deltas(1)[0]}
    merged = row.merge.combine(some_deltas(count), WEIGHTS[:count])
    assert list(merged) == list(stacked)
    for name, values in stacked.items():
        expected = row.reference(values, WEIGHTS[:count])
        assert merged[name].dtype == torch.float32
        assert tuple(merged[name].shape) == expected.shape
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_the_deltas_are_only_read_and_not_given_back(row: Row) -> None:
    """They may be memory that is shared between processes."""
    deltas = some_deltas()
    for count in (1, 4):
        merged = row.merge.combine(deltas[:count], WEIGHTS[:count])
        for value in merged.values():
            value.fill_(7.0)
    for delta, before in zip(deltas, some_deltas(), strict=True):
        for name, value in delta.items():
            assert torch.equal(value, before[name])


def test_weights_are_normalised(row: Row) -> None:
    merged = row.merge.combine(some_deltas(), WEIGHTS)
    scaled = row.merge.combine(some_deltas(), [1000 * weight for weight in WEIGHTS])
    for name, value in merged.items():
        torch.testing.assert_close(value, scaled[name], rtol=1e-6, atol=1e-6)


def test_equal_deltas_give_that_delta(row: Row) -> None:
    """Nothing is divided twice or not at all (the mean of k equal values is the value)."""
    deltas = [{"p": torch.full((3,), 0.75)} for _ in range(4)]
    assert row.merge.combine(deltas, [8.0, 8.0, 8.0, 8.0])["p"].tolist() == pytest.approx([0.75] * 3, rel=1e-6)


def test_the_same_order_gives_the_same_bits_whatever_the_container(row: Row) -> None:
    def one_by_one() -> Iterator[Tensors]:
        yield from some_deltas()

    first, second = row.merge.combine(some_deltas(), WEIGHTS), row.merge.combine(one_by_one(), WEIGHTS)
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_names_may_come_in_another_order(row: Row) -> None:
    turned = [dict(reversed(delta.items())) if i % 2 else delta for i, delta in enumerate(some_deltas())]
    first, second = row.merge.combine(some_deltas(), WEIGHTS), row.merge.combine(turned, WEIGHTS)
    for name, value in first.items():
        assert torch.equal(value, second[name])


@pytest.mark.parametrize(("count", "weights"), [(0, []), (1, []), (1, [1.0, 2.0]), (2, [1.0]), (0, [1.0])])
def test_none_or_a_different_number_is_refused(row: Row, count: int, weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        row.merge.combine(some_deltas(count), weights)


def test_examples_count_for_as_much_as_they_are() -> None:
    deltas = [{"p": torch.tensor([1.0])}, {"p": torch.tensor([5.0])}]
    assert Mean(by=MeanBy.examples).combine(deltas, [3.0, 1.0])["p"].tolist() == [2.0]


def test_uniform_ignores_the_examples() -> None:
    deltas = [{"p": torch.tensor([1.0])}, {"p": torch.tensor([5.0])}]
    assert Mean(by=MeanBy.uniform).combine(deltas, [3.0, 1.0])["p"].tolist() == [3.0]
