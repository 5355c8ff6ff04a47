"""Sums in pieces, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diloco import sums

SIZES = [(), (0,), (3,), (sums.PIECE,), (sums.PIECE + 1,), (1000, 1000)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_equal_those_in_float64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    exact = float((left.double() * right.double()).sum())
    assert sums.norm(left) == pytest.approx(float(left.double().norm()), rel=1e-6)
    assert sums.dot(left, right) == pytest.approx(exact, abs=1e-6 * (1 + sums.norm(left) * sums.norm(right)))


def test_the_same_bits_on_any_number_of_threads() -> None:
    left, right = torch.randn(2, 300, 1001, generator=torch.Generator().manual_seed(2))
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add((sums.norm(left), sums.dot(left, right), sums.norm(left.T), sums.dot(left.T, right.T)))
    assert len(found) == 1
