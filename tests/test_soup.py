"""Soups: of one, of several by hand, along a way, greedy, and what must not be averaged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from diloco.merge import Mean, MeanBy, Slerp
from diloco.messages import Tensors
from diloco.soup import check_same_start, greedy, soup

START = {"a.0.w": torch.tensor([1.0, 1.0]), "a.1.w": torch.tensor([0.3])}
EXPERTS: list[Tensors] = [
    {"a.0.w": torch.tensor([2.0, 1.0]), "a.1.w": torch.tensor([0.7])},
    {"a.0.w": torch.tensor([1.0, 4.0]), "a.1.w": torch.tensor([0.1])},
]
MEAN = Mean(by=MeanBy.examples)


@pytest.mark.parametrize("merge", [MEAN, Slerp(by=MeanBy.examples)])
def test_of_one_it_is_itself(merge: Mean | Slerp) -> None:
    for weights in ([1.0, 0.0], [0.2, 0.0]):
        found = soup(START, EXPERTS, weights, merge)
        assert all(torch.equal(found[name], value) for name, value in EXPERTS[0].items())
        assert all(found[name] is not value for name, value in EXPERTS[0].items())


def test_the_mean_by_hand() -> None:
    found = soup(START, EXPERTS, [3.0, 1.0], MEAN)
    assert found["a.0.w"].tolist() == pytest.approx([1.75, 1.75]) and found["a.1.w"].item() == pytest.approx(0.55)


def test_along_the_way_from_the_start() -> None:
    half = soup(START, EXPERTS, [1.0, 1.0], MEAN, eta=0.5)
    assert half["a.0.w"].tolist() == pytest.approx([1.25, 1.75]) and half["a.1.w"].item() == pytest.approx(0.35)
    nothing = soup(START, EXPERTS, [1.0, 1.0], MEAN, eta=0.0)
    assert all(torch.equal(nothing[name], value) for name, value in START.items())
    assert soup(START, EXPERTS, [1.0, 0.0], MEAN, eta=2.0)["a.1.w"].item() == pytest.approx(1.1)


def test_slerp_keeps_the_length_of_orthogonal_task_vectors() -> None:
    """[1, 0] and [0, 3]: sin 45 / sin 90 of each."""
    found = soup(START, EXPERTS, [1.0, 1.0], Slerp(by=MeanBy.examples))
    assert (found["a.0.w"] - START["a.0.w"]).tolist() == pytest.approx([0.5**0.5, 3 * 0.5**0.5])


def test_greedy_takes_what_makes_it_no_worse() -> None:
    """Of four, the best first; the third spoils it, the fourth does not."""
    values = {0: 3.0, 1: 1.0, 2: -4.0, 3: -1.0}
    asked: list[Sequence[float]] = []

    def loss_of(weights: Sequence[float]) -> float:
        asked.append(weights)
        return abs(sum(weight * values[i] for i, weight in enumerate(weights)) / sum(weights))

    weights, loss = greedy([abs(value) for value in values.values()], loss_of)
    assert weights == [0.0, 1.0, 0.0, 1.0] and loss == 0.0
    assert [sum(weights) for weights in asked] == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({**START, "a.0.w": torch.tensor([1.0, 1.1])}, "a.0.w has other values"),
        ({**START, "a.0.w": torch.ones(3)}, r"a.0.w is \(2,\) and \(3,\)"),
        ({"a.0.w": START["a.0.w"]}, "a.1.w is in one only"),
    ],
)
def test_other_starts_are_refused_by_name(other: Tensors, told: str) -> None:
    check_same_start({"first": START, "same": {name: value.clone() for name, value in START.items()}})
    with pytest.raises(ValueError, match=f"first and other were not trained from one start.*{told}"):
        check_same_start({"first": START, "other": other})
