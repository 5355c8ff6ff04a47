"""Delayed Nesterov against torch, the paper's equations and numbers by hand; HeLoCo in two dimensions by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diloco.async_.outer import DelayedNesterov, HeLoCo
from diloco.checkpoint import read_modules, write_modules
from diloco.codec import Float32
from diloco.merge import Mean
from diloco.messages import Commit, Contribution, IslandId, ModuleKey, Snapshot, SourceId, Tensors
from diloco.outer import Nesterov, OuterOptimizer
from diloco.store import ModuleStore

KEY = ModuleKey("whole.0/0")


def random_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"w": (4, 3), "b": (5,)}.items()}


def after(outer: OuterOptimizer, deltas: list[float], *, momentum: float = 0.0, start: float = 0.0) -> float:
    """Where a single parameter is after these deltas."""
    params = {"p": torch.tensor([start], dtype=torch.float64)}
    state = outer.init(params)
    state["momentum/p"].fill_(momentum)
    for delta in deltas:
        outer.step(params, {"p": torch.tensor([delta], dtype=torch.float64)}, state)
    return float(params["p"])


# --- delayed Nesterov ---


@pytest.mark.parametrize("delay", range(1, 9))
def test_a_window_equals_one_step_of_torch_on_its_mean(delay: int) -> None:
    params = random_tensors(0)
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=0.7, momentum=0.9, nesterov=True)
    outer = DelayedNesterov(lr=0.7, momentum=0.9, delay=delay)
    state = outer.init(params)
    for window in range(20):
        deltas = [random_tensors(1 + window * delay + i) for i in range(delay)]
        for delta in deltas:
            outer.step(params, {name: 0.05 * value for name, value in delta.items()}, state)
        for name, value in theirs.items():
            value.grad = 0.05 * torch.stack([delta[name] for delta in deltas]).mean(dim=0)
        optimizer.step()
        for name, value in params.items():
            torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-6, atol=1e-6)
            assert not state[f"buffer/{name}"].any()


def test_sixteen_of_four_come_to_what_four_steps_do() -> None:
    """-8.501; a server that applies the buffer once more at the end of each window comes to -16.90 (pitfall L1)."""
    assert after(DelayedNesterov(lr=0.7, momentum=0.9, delay=4), [1.0] * 16) == pytest.approx(-8.501, abs=1e-3)


def test_one_island_is_nesterov_to_the_bit() -> None:
    params, other = random_tensors(0), random_tensors(0)
    outer, nesterov = DelayedNesterov(delay=1), Nesterov()
    state, plain = outer.init(params), nesterov.init(other)
    for seed in range(1, 10):
        outer.step(params, random_tensors(seed), state)
        nesterov.step(other, random_tensors(seed), plain)
        for name, value in params.items():
            assert torch.equal(value, other[name])
            assert torch.equal(state[f"momentum/{name}"], plain[f"momentum/{name}"])


def test_activation_by_hand() -> None:
    """N = 2, c = .25, lr .5, beta .8, deltas 1, 3, 2, 4: 1 - c N + c = .75.

    1: m = 0; theta = 0 - .5 (1/2 + 0) = -.25
    3: m = (1 + 3) / 2 = 2; theta = -.25 - .5 (3/2 + .75 * .8 * 2) = -1.6
    2: theta = -1.6 - .5 (2/2 + .25 * .8 * 2) = -2.3
    4: m = .8 * 2 + (2 + 4) / 2 = 4.6; theta = -2.3 - .5 (4/2 + .75 * .8 * 4.6) = -4.68
    """
    outer = DelayedNesterov(lr=0.5, momentum=0.8, delay=2, activation=0.25)
    for count, expected in enumerate([-0.25, -1.6, -2.3, -4.68], start=1):
        assert after(outer, [1.0, 3.0, 2.0, 4.0][:count]) == pytest.approx(expected, abs=1e-12)


def test_nesterov_on_each_of_four_amplifies_the_momentum() -> None:
    """Why it is delayed: Eq. 5 of arXiv:2401.09135, beside the one step that four equal contributions are to be."""
    m, g, beta = 2.0, 1.0, 0.9
    naive = (4 + 4 * beta + 3 * beta**2 + 2 * beta**3 + beta**4) * g + beta**2 * (1 + beta + beta**2 + beta**3) * m
    assert after(Nesterov(lr=0.7, momentum=beta), [g] * 4, momentum=m) == pytest.approx(-0.7 * naive, rel=1e-12)
    once = g + beta * (beta * m + g)
    delayed = after(DelayedNesterov(lr=0.7, momentum=beta, delay=4), [g] * 4, momentum=m)
    assert delayed == pytest.approx(-0.7 * once, rel=1e-12)
    assert naive > 4 * once


def test_the_delay_is_the_number_of_islands_where_it_is_left_open() -> None:
    outer = DelayedNesterov(lr=0.3, momentum=0.5, activation=0.25)
    assert outer.resolved(4) == DelayedNesterov(lr=0.3, momentum=0.5, activation=0.25, delay=4)
    with pytest.raises(AssertionError, match="number of islands"):
        outer.step({}, {}, outer.init({}))


@pytest.mark.parametrize(("delay", "activation"), [(4, 0.26), (4, -0.1), (0, 1.1), (2, float("nan"))])
def test_an_activation_outside_its_range_is_refused(delay: int, activation: float) -> None:
    with pytest.raises(ValueError, match=rf"outer\.activation={activation} .*outer\.delay={delay}"):
        DelayedNesterov(delay=delay, activation=activation)


def test_an_activation_too_large_for_the_islands_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outer\.activation=0\.5 .*\[0, 0\.333333\] for outer\.delay=3"):
        DelayedNesterov(activation=0.5).resolved(3)
    assert DelayedNesterov(activation=1 / 3).resolved(3) == DelayedNesterov(activation=1 / 3, delay=3)


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outer\.delay=-1 .*islands"):
        DelayedNesterov(delay=-1)


# --- in the store ---


def commit(store: ModuleStore, round_: int) -> None:
    payload = Float32().encode(random_tensors(50 + round_))
    source = SourceId(round_ % 3)
    given = {"module": KEY, "round": round_}
    store.push(
        Contribution(**given, source=source, island=IslandId(source), base_version=round_, payload=payload)  # type: ignore[arg-type]
    )
    store.commit(Commit(**given, sources=(source,), weights=(1.0,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "outer", [DelayedNesterov(delay=3, activation=0.2), HeLoCo(aligned=0.9)], ids=["delayed", "heloco"]
)
def test_saved_in_a_window_and_loaded_it_goes_on_to_the_same_bits(outer: OuterOptimizer, tmp_path: Path) -> None:
    store, loaded = (ModuleStore(outer=outer, merge=Mean(), codec=Float32(), codec_down=Float32()) for _ in range(2))
    payload = Float32().encode(random_tensors(0))
    store.fill([Snapshot(module=KEY, version=0, base_version=None, payload=payload)])
    for round_ in range(4):
        commit(store, round_)
    write_modules(str(tmp_path), store.state())
    loaded.load_state(read_modules(str(tmp_path), [KEY]))
    assert loaded.outer_digests() == store.outer_digests()
    for round_ in range(4, 9):
        for each in (store, loaded):
            commit(each, round_)
    states = [each.state()[KEY].tensors for each in (store, loaded)]
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype and torch.equal(value, states[1][name])
    if isinstance(outer, DelayedNesterov):
        assert int(states[1]["outer/count"]) == 9


# --- HeLoCo ---

LR, BETA = 0.5, 0.9


def step_by(outer: HeLoCo, delta: list[float], momentum: list[float]) -> torch.Tensor:
    """The corrected delta: the new momentum less beta times the old one. Also checks the step of the weights."""
    params = {"p": torch.zeros(len(delta), dtype=torch.float64)}
    old = torch.tensor(momentum, dtype=torch.float64)
    state = {"momentum/p": old.clone()}
    outer.step(params, {"p": torch.tensor(delta, dtype=torch.float64)}, state)
    corrected = state["momentum/p"] - outer.momentum * old
    expected = -outer.lr * (corrected + outer.momentum * state["momentum/p"])
    torch.testing.assert_close(params["p"], expected, rtol=1e-12, atol=1e-12)
    return corrected


def test_an_aligned_one_is_kept() -> None:
    outer = HeLoCo(lr=LR, momentum=BETA, aligned=0.6)
    assert step_by(outer, [3.0, 4.0], [10.0, 0.0]).tolist() == pytest.approx([3.0, 4.0])  # a cosine of .6
    assert step_by(outer, [5.0, 0.0], [10.0, 0.0]).tolist() == pytest.approx([5.0, 0.0])


def test_a_weakly_aligned_one_is_turned_and_keeps_its_norm() -> None:
    """delta = 5 (.6, .8), (1 - beta) m = (5, 0), so f = 1/2; l = .5 (1 - .6) / 2 = .1: .9 u + .1 v = (.64, .72)."""
    found = step_by(HeLoCo(lr=LR, momentum=BETA, aligned=0.7, turning=0.5), [3.0, 4.0], [50.0, 0.0])
    length = math.hypot(0.64, 0.72)
    assert found.tolist() == pytest.approx([5 * 0.64 / length, 5 * 0.72 / length])
    assert float(found.norm()) == pytest.approx(5.0)


def test_an_orthogonal_one_is_turned_by_at_most_what_the_default_allows() -> None:
    found = step_by(HeLoCo(), [0.0, 1.0], [1e-6, 0.0])  # f is nearly 1
    assert math.degrees(math.atan2(float(found[0]), float(found[1]))) == pytest.approx(18.43, abs=0.01)


def test_it_is_turned_no_further_than_onto_the_momentum() -> None:
    found = step_by(HeLoCo(lr=LR, momentum=BETA, turning=1e6), [0.0, 2.0], [7.0, 0.0])
    assert found.tolist() == pytest.approx([2.0, 0.0])


def test_what_opposes_the_momentum_is_damped() -> None:
    """delta = 5 (-.6, .8), f = 1/2: b = .5 * .6 / 2 = .15, so that .85 of the -3 along the momentum stays."""
    found = step_by(HeLoCo(lr=LR, momentum=BETA, damping=0.5), [-3.0, 4.0], [50.0, 0.0])
    assert found.tolist() == pytest.approx([-3.0 * 0.85, 4.0])


def test_no_more_is_taken_away_than_there_is() -> None:
    found = step_by(HeLoCo(lr=LR, momentum=BETA, damping=1e6), [-3.0, 4.0], [50.0, 0.0])
    assert found.tolist() == pytest.approx([0.0, 4.0])


@pytest.mark.parametrize(
    ("delta", "momentum"),
    [([3.0, -4.0], [0.0, 0.0]), ([0.0, 0.0], [3.0, -4.0]), ([0.0, 0.0], [0.0, 0.0]), ([3.0, -4.0], [-1e-30, 1e-30])],
)
def test_without_a_direction_it_is_kept(delta: list[float], momentum: list[float]) -> None:
    assert step_by(HeLoCo(lr=LR, momentum=BETA), delta, momentum).tolist() == pytest.approx(delta)


def test_the_first_step_is_nesterovs_to_the_bit() -> None:
    params, other = random_tensors(0), random_tensors(0)
    outer, nesterov = HeLoCo(lr=LR, momentum=BETA), Nesterov(lr=LR, momentum=BETA)
    outer.step(params, random_tensors(1), outer.init(params))
    nesterov.step(other, random_tensors(1), nesterov.init(other))
    for name, value in params.items():
        assert torch.equal(value, other[name])


def test_each_tensor_is_corrected_for_itself() -> None:
    params = {"with": torch.zeros(2), "against": torch.zeros(2)}
    state = {f"momentum/{name}": torch.tensor([50.0, 0.0]) for name in params}
    delta = {"with": torch.tensor([3.0, 4.0]), "against": torch.tensor([-3.0, 4.0])}
    HeLoCo(lr=LR, momentum=BETA, damping=0.5).step(params, delta, state)
    assert state["momentum/with"].tolist() == pytest.approx([48.0, 4.0])
    assert state["momentum/against"].tolist() == pytest.approx([45.0 - 2.55, 4.0])


def test_very_small_and_very_large_ones_stay_finite() -> None:
    for size in (1e-38, 1e-22, 1.0, 1e15, 1e30):
        for other in (1e-38, 1e-22, 1.0, 1e15, 1e30):
            params = {"p": torch.zeros(2)}
            state = {"momentum/p": torch.tensor([other, other])}
            HeLoCo().step(params, {"p": torch.tensor([-size, 2 * size])}, state)
            assert all(bool(value.isfinite().all()) for value in (*params.values(), *state.values()))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("aligned", -0.1), ("aligned", 1.1), ("damping", -1.0), ("turning", -1.0), ("turning", float("inf"))],
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"outer\.{setting}={value}"):
        HeLoCo(**{setting: value})
