"""RDA: sizes and directions averaged apart."""

from __future__ import annotations

import math

import pytest
import torch

from diloco.merge import RDA, Mean, MeanBy
from diloco.messages import Tensors


def merged(*rows: list[float], weights: list[float] | None = None, name: str = "w", mean_for: str = "") -> list[float]:
    deltas: list[Tensors] = [{name: torch.tensor(row)} for row in rows]
    found: list[float] = RDA(mean_for=mean_for).combine(deltas, weights or [1.0] * len(rows))[name].tolist()
    return found


@pytest.mark.parametrize("count", [2, 4, 16])
def test_orthogonal_ones_of_one_norm_keep_it_whatever_their_number(count: int) -> None:
    deltas: list[Tensors] = [{"w": row} for row in 3 * torch.eye(16)[:count]]
    weights = [1.0] * count
    assert float(RDA().combine(deltas, weights)["w"].norm()) == pytest.approx(3.0, rel=1e-6)
    assert float(Mean().combine(deltas, weights)["w"].norm()) == pytest.approx(3.0 / math.sqrt(count), rel=1e-6)


def test_weights_by_hand() -> None:
    """Sizes (3 * 2 + 1 * 4) / 4 = 2.5; directions (3 e1 + e2) / 4, of length sqrt(10) / 4."""
    unit = 2.5 / math.sqrt(10)
    assert merged([2.0, 0.0], [0.0, 4.0], weights=[3.0, 1.0]) == pytest.approx([3 * unit, unit], rel=1e-6)


def test_a_single_one_and_equal_ones_stay_what_they_are() -> None:
    assert merged([3.0, -4.0]) == pytest.approx([3.0, -4.0], rel=1e-6)
    assert merged([3.0, -4.0], [3.0, -4.0], weights=[1.0, 7.0]) == pytest.approx([3.0, -4.0], rel=1e-6)


def test_sizes_of_equal_directions_are_averaged() -> None:
    assert merged([1.0, 1.0], [3.0, 3.0]) == pytest.approx([2.0, 2.0], rel=1e-6)


def test_a_zero_has_a_size_but_no_direction() -> None:
    """Sizes (0 + 5) / 2; the direction is that of the other one."""
    assert merged([0.0, 0.0], [3.0, 4.0]) == pytest.approx([1.5, 2.0], rel=1e-6)
    assert merged([0.0, 0.0], [0.0, 0.0]) == [0.0, 0.0]


def test_directions_that_cancel_out_give_the_mean() -> None:
    assert merged([1.0, 2.0], [-1.0, -2.0]) == [0.0, 0.0]
    assert merged([1.0, 2.0], [-3.0, -6.0]) == pytest.approx([-1.0, -2.0], rel=1e-6)
    third = [math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)]  # of a circle: the sum is zero but for rounding
    rows = [[1.0, 0.0], third, [third[0], -third[1]]]
    assert merged(*rows) == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "tok_embeddings.weight"]
)
def test_embeddings_get_the_weighted_mean(name: str) -> None:
    deltas: list[Tensors] = [{name: torch.tensor([2.0, 0.0])}, {name: torch.tensor([0.0, 4.0])}]
    mean = Mean(by=MeanBy.examples).combine(deltas, [3.0, 1.0])
    assert torch.equal(RDA().combine(deltas, [3.0, 1.0])[name], mean[name])
    assert not torch.allclose(RDA(mean_for="").combine(deltas, [3.0, 1.0])[name], mean[name])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "twte.w"])
def test_the_rest_does_not(name: str) -> None:
    deltas: list[Tensors] = [{name: torch.tensor([2.0, 0.0])}, {name: torch.tensor([0.0, 2.0])}]
    assert float(RDA().combine(deltas, [1.0, 1.0])[name].norm()) == pytest.approx(2.0, rel=1e-6)


def test_each_tensor_counts_for_itself() -> None:
    """Of two tensors, one in which the islands agree and one in which they are orthogonal."""
    deltas: list[Tensors] = [
        {"same": torch.tensor([2.0, 0.0]), "other": torch.tensor([2.0, 0.0])},
        {"same": torch.tensor([2.0, 0.0]), "other": torch.tensor([0.0, 2.0])},
    ]
    found = RDA().combine(deltas, [1.0, 1.0])
    assert found["same"].tolist() == pytest.approx([2.0, 0.0])
    assert found["other"].tolist() == pytest.approx([math.sqrt(2)] * 2)


def test_very_small_and_very_large_ones_stay_finite() -> None:
    for size in (1e-38, 1e-22, 1e-12, 1e12, 1e30):
        assert all(math.isfinite(value) for value in merged([size, 0.0], [0.0, size]))


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"merge\.mean_for='\('"):
        RDA(mean_for="(")
