"""Slerp: task vectors turned towards each other, layer by layer."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial import geometric_slerp

from diloco.merge import Mean, MeanBy, Slerp
from diloco.messages import Tensors


def merged(*rows: list[float], merge: Slerp | None = None, weights: list[float] | None = None) -> list[float]:
    deltas: list[Tensors] = [{"w": torch.tensor(row)} for row in rows]
    found: list[float] = (merge or Slerp()).combine(deltas, weights or [1.0] * len(rows))["w"].tolist()
    return found


def test_orthogonal_ones_keep_their_norm() -> None:
    assert merged([3.0, 0.0], [0.0, 3.0]) == pytest.approx([3 / math.sqrt(2)] * 2, rel=1e-6)
    deltas: list[Tensors] = [{"w": 2 * row} for row in torch.eye(8)[:5]]
    assert float(Slerp().combine(deltas, [1.0] * 5)["w"].norm()) == pytest.approx(2.0, rel=1e-6)
    assert float(Mean().combine(deltas, [1.0] * 5)["w"].norm()) == pytest.approx(2 / math.sqrt(5), rel=1e-6)


def test_equal_ones_stay_what_they_are() -> None:
    assert merged([3.0, -4.0], [3.0, -4.0], [3.0, -4.0]) == pytest.approx([3.0, -4.0], rel=1e-6)
    assert merged([3.0, -4.0]) == [3.0, -4.0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("angle", [0.01, 1.0, 2.0, 3.1])
def test_unit_vectors_go_as_in_scipy(angle: float, share: float) -> None:
    start, end = [1.0, 0.0], [math.cos(angle), math.sin(angle)]
    found = merged(start, end, merge=Slerp(by=MeanBy.examples), weights=[1 - share, share])
    assert found == pytest.approx(geometric_slerp(start, end, [share])[0].tolist(), rel=1e-4, abs=1e-4)


def test_by_hand_with_different_sizes() -> None:
    """At 90 degrees both factors are sin 45 = .70711."""
    assert merged([2.0, 0.0], [0.0, 4.0]) == pytest.approx([1.41421, 2.82843], rel=1e-5)


def test_three_are_taken_one_after_the_other() -> None:
    """(e1 + e2) / sqrt 2, and then a third of the way to e3: cos 30 and sin 30."""
    rows = torch.eye(3).tolist()
    assert merged(*rows) == pytest.approx([math.cos(math.pi / 6) / math.sqrt(2)] * 2 + [0.5], rel=1e-5)


@pytest.mark.parametrize("other", [[-3.0, 4.0], [0.0, 0.0], [6.0, -8.0], [3.0, -4.0000001]])
def test_without_an_angle_it_is_the_mean(other: list[float]) -> None:
    expected = [(a + b) / 2 for a, b in zip([3.0, -4.0], other, strict=True)]
    assert merged([3.0, -4.0], other) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_layer_is_one_vector() -> None:
    """Its two parameters are orthogonal together, and equal or opposite one by one; what is outside is another."""
    names = ("model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.1.a.weight", "model.norm.weight")
    rows = ([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, 3.0])
    deltas: list[Tensors] = [{n: torch.tensor([x]) for n, x in zip(names, row, strict=True)} for row in rows]
    found = {name: value.item() for name, value in Slerp().combine(deltas, [1.0, 1.0]).items()}
    root = math.sqrt(2)
    assert list(found.values()) == pytest.approx([root, 0.0, 1.0, 2.0], abs=1e-6)  # (1, 0) * 2 sin 45; mean; mean


def test_a_group_that_is_no_pattern() -> None:
    with pytest.raises(ValueError, match=r"merge\.group='\['"):
        Slerp(group="[")
