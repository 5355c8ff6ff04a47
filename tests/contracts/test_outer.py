"""What every OuterOptimizer keeps: one row of ROWS for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diloco.async_.outer import DelayedNesterov, HeLoCo
from diloco.messages import Tensors
from diloco.outer import Nesterov, OuterOptimizer, Sgd


@dataclass(frozen=True)
class Row:
    outer: OuterOptimizer
    reference: Callable[[list[Tensor]], torch.optim.Optimizer] | None  # torch's own, which each step equals
    has_state: bool
    by_hand: float  # where a parameter that was 0 is after four steps with a delta of 1


def torch_nesterov(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


ROWS = {
    "sgd": Row(Sgd(lr=0.5), lambda p: torch.optim.SGD(p, lr=0.5), False, -2.0),
    # m = 1, 1.9, 2.71, 3.439; steps of 1 + .9 m = 1.9, 2.71, 3.439, 4.0951, in sum 12.1441, times .7
    "nesterov": Row(
        Nesterov(lr=0.7, momentum=0.9),
        torch_nesterov,
        True,
        -8.50087,
    ),
    # m = 1, 1.5, 1.75, 1.875; steps of 1 + .5 m = 1.5, 1.75, 1.875, 1.9375, in sum 7.0625, times .4
    "nesterov_low": Row(
        Nesterov(lr=0.4, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.4, momentum=0.5, nesterov=True), True, -2.825
    ),
    "delayed_nesterov_1": Row(DelayedNesterov(lr=0.7, momentum=0.9, delay=1), torch_nesterov, True, -8.50087),
    # four of weight 1/4, and m = 1 once: .7 (1 + .9)
    "delayed_nesterov_4": Row(DelayedNesterov(lr=0.7, momentum=0.9, delay=4), None, True, -1.33),
    "heloco_off": Row(HeLoCo(lr=0.7, momentum=0.9, aligned=0.0, damping=0.0), torch_nesterov, True, -8.50087),
    "heloco": Row(HeLoCo(lr=0.7, momentum=0.9), None, True, -8.50087),  # what is parallel is left alone
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def random_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"scalar": (), "empty": (0, 3), "vector": (5,), "matrix": (4, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.reference], ids=[n for n in ROWS if ROWS[n].reference]
)
def test_many_steps_equal_torch(row: Row) -> None:
    assert row.reference is not None
    params = random_tensors(0)
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = row.reference(list(theirs.values()))
    state = row.outer.init(params)
    for step in range(50):
        delta = {name: 0.05 * value for name, value in random_tensors(1 + step).items()}
        row.outer.step(params, delta, state)
        for name, value in theirs.items():
            value.grad = delta[name]
        optimizer.step()
    for name, value in params.items():
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-6, atol=1e-6)


def test_constant_delta_gives_the_number_by_hand(row: Row) -> None:
    params = {"p": torch.zeros(3)}
    state = row.outer.init(params)
    for _ in range(4):
        row.outer.step(params, {"p": torch.ones(3)}, state)
    assert params["p"].tolist() == pytest.approx([row.by_hand] * 3, abs=2e-6)


def test_params_and_state_are_written_in_place_and_the_delta_is_not(row: Row) -> None:
    params, delta = random_tensors(0), random_tensors(1)
    state = row.outer.init(params)
    before = {name: value.clone() for name, value in params.items()}
    kept = {name: value.clone() for name, value in delta.items()}
    storage = {name: value.data_ptr() for name, value in {**params, **state}.items()}
    tensors = {name: id(value) for name, value in {**params, **state}.items()}
    for _ in range(2):
        row.outer.step(params, delta, state)
    assert {name: value.data_ptr() for name, value in {**params, **state}.items()} == storage
    assert {name: id(value) for name, value in {**params, **state}.items()} == tensors
    for name, value in delta.items():
        assert torch.equal(value, kept[name])
    for name in ("scalar", "vector", "matrix"):
        assert not torch.equal(params[name], before[name]), f"{name} did not move"


def test_state_is_named_and_not_empty_after_a_step(row: Row) -> None:
    params, delta = random_tensors(0), random_tensors(1)
    state = row.outer.init(params)
    row.outer.step(params, delta, state)
    assert all(
        value.dtype == torch.float32 or value.dtype == torch.int64 and value.ndim == 0 for value in state.values()
    )
    moved = [name for name, value in state.items() if value.count_nonzero()]
    assert bool(moved) == row.has_state
    for name in params:  # each tensor of the state says whose it is, so that it can be digested by parameter
        assert any(key.endswith(f"/{name}") for key in state) == row.has_state


def test_state_shares_no_storage_with_params(row: Row) -> None:
    params = random_tensors(0)
    before = {name: value.clone() for name, value in params.items()}
    for value in row.outer.init(params).values():
        value.fill_(7)
    for name, value in params.items():
        assert torch.equal(value, before[name])


def test_copied_state_goes_on_to_the_same_bits(row: Row) -> None:
    params = random_tensors(0)
    state = row.outer.init(params)
    row.outer.step(params, random_tensors(1), state)
    other_params = {name: value.clone() for name, value in params.items()}
    other_state = {name: value.clone() for name, value in state.items()}
    for pair in ((params, state), (other_params, other_state)):
        row.outer.step(pair[0], random_tensors(2), pair[1])
    for name, value in params.items():
        assert torch.equal(value, other_params[name])


def test_weights_follow_the_islands(row: Row) -> None:
    """The local weights moved by +2, so the delta is -2 and the global weights go up."""
    anchor, local = torch.full((2,), 1.0), torch.full((2,), 3.0)
    params = {"p": anchor.clone()}
    delta = {"p": anchor - local}
    assert delta["p"].tolist() == [-2.0, -2.0]
    row.outer.step(params, delta, row.outer.init(params))
    assert bool((params["p"] > anchor).all())


def test_order_of_names_in_the_delta_does_not_matter(row: Row) -> None:
    params, other = random_tensors(0), random_tensors(0)
    delta = random_tensors(1)
    row.outer.step(params, delta, row.outer.init(params))
    row.outer.step(other, dict(reversed(delta.items())), row.outer.init(other))
    for name, value in params.items():
        assert torch.equal(value, other[name])


def test_sgd_with_rate_one_takes_the_mean_of_the_islands() -> None:
    params = {"p": torch.tensor([1.0, -2.0])}
    Sgd(lr=1.0).step(params, {"p": torch.tensor([0.25, 0.5])}, {})
    assert params["p"].tolist() == [0.75, -2.5]


@pytest.mark.parametrize("lr", [0.0, -0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("part", [Sgd, Nesterov, DelayedNesterov, HeLoCo])
def test_a_rate_that_is_no_positive_number_is_refused(
    part: type[Sgd | Nesterov | DelayedNesterov | HeLoCo], lr: float
) -> None:
    with pytest.raises(ValueError, match=r"outer\.lr"):
        part(lr=lr)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("part", [Nesterov, DelayedNesterov, HeLoCo])
def test_a_momentum_outside_its_range_is_refused(
    part: type[Nesterov | DelayedNesterov | HeLoCo], momentum: float
) -> None:
    with pytest.raises(ValueError, match=r"outer\.momentum"):
        part(momentum=momentum)


def test_what_is_not_left_open_is_not_resolved(row: Row) -> None:
    assert row.outer.resolved(5) == row.outer
