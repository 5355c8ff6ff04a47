"""The planner: by hand, by the laws that any link obeys, and against the tables of the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.plan import Plan, Transfer, required_gbits, round_s
from experiments.benchmarks import plan as benchmark

PERCENT = 0.01


def required(**settings: Any) -> float:
    """Of a model of 1 Gbit that takes a second a step, unless told otherwise."""
    usual = {"parameters": 1e9 / 32, "layers": 1, "step_s": 1.0, "inner_steps": 1, "utilization": 0.5}
    return required_gbits(**{**usual, **settings})


def plan(**settings: Any) -> Plan:
    """Of one fragment of 1 Gbit, two islands with a shard each, and ten steps a round."""
    usual = {"fragments": (10**9,), "bits_up": 1, "bits_down": 1, "islands": 2, "shards": 2, "inner_steps": 10}
    return Plan(**{**usual, **settings})


# --- by hand ---


def test_one_layer_is_on_the_wire_between_two_steps() -> None:
    """A step of 1 s, then 2 (1 - 1/2) Gbit: half of the time each at 1 Gbit/s."""
    assert required() == pytest.approx(1.0)
    assert required(utilization=0.8) == pytest.approx(4.0)  # .25 s after each second
    assert required(utilization=0.8, inner_steps=10) == pytest.approx(0.4)  # 2.5 s after each ten
    assert required(utilization=0.8, inner_steps=10, bits=8) == pytest.approx(0.1)
    assert required(islands=4) == pytest.approx(1.5)  # 2 (1 - 1/4)
    assert required(islands=1) == 0.0


def test_two_layers_overlap_the_backward_pass() -> None:
    """Nodes of .2 s: F1 F2 A2 W2 W1. Layer 2 is sent from .8 s on, layer 1 after it; .5 Gbit each."""
    # 1 Gbit/s: layer 2 until 1.3, layer 1 until 1.8; F1 waits for .8 s, and F2 not at all.
    assert required(layers=2, utilization=1 / 1.8) == pytest.approx(1.0)
    # 4 Gbit/s: .125 s each, so layer 2 is there at .925, and layer 1, ready at 1.0, at 1.125.
    assert required(layers=2, utilization=1 / 1.125) == pytest.approx(4.0)


def test_lag_hides_what_a_step_takes() -> None:
    """One fragment a round of 10 s. It is on the wire for a second without being waited for."""
    settings = {"inner_steps": 10, "lag": 1}
    assert required(**settings, utilization=10 / 11) == pytest.approx(0.5)  # 2 s on the wire, one of them hidden
    assert required(**settings, utilization=1 - 1e-6) == pytest.approx(1.0, rel=1e-4)
    assert required(inner_steps=10, utilization=10 / 11) == pytest.approx(1.0)


def test_fragments_are_sent_at_their_own_times() -> None:
    """Two layers in two fragments, in steps 0 and 5: each .5 Gbit is waited for alone."""
    settings = {"layers": 2, "layers_per_fragment": 1, "inner_steps": 10}
    # Layer 1 is sent when its step ends: .5 s. Layer 2 from .8 s on and needed at 1.2: .1 s of waiting.
    assert required(**settings, utilization=10 / 10.6) == pytest.approx(1.0)


def test_a_link_that_carries_less_than_is_sent_is_seen_with_any_lag() -> None:
    """Nobody waits in the first rounds, but 11 s on the wire do not fit into rounds of 10 s."""
    sends = {step: [Transfer(gigabits=5.5, ready_s=1.0, needed_s=0.0)] for step in (0, 5)}
    assert round_s(sends, gbits=1.0, step_s=1.0, inner_steps=10, lag=9) == pytest.approx(11.0)


def test_a_plan_by_hand() -> None:
    """Of 1 Gbit up and 1 down, the half stays on the node: 1 s at 1 Gbit/s after 10 s of steps."""
    found = plan(step_s=1.0, link_gbits=1.0)
    assert found.bytes_up == found.bytes_down == 125_000_000
    assert found.fragment_wire_s(1.0) == (pytest.approx(1.0),)
    assert found.exposed_s(gbits=1.0, step_s=1.0) == pytest.approx(1.0)
    assert found.utilization == pytest.approx(10 / 11)
    assert found.required_gbits(0.8) == pytest.approx(0.4)
    assert found.required_gbits(0.8, step_s=0.1) == pytest.approx(4.0)
    assert plan(lag=1).required_gbits(0.5) == pytest.approx(1 / 11)  # 11 s, of which one is hidden


@pytest.mark.parametrize(
    ("islands", "shards", "gigabits"),
    [(2, 2, 1.0), (4, 4, 1.5), (4, 8, 1.5), (2, 1, 2.0), (16, 8, 3.75), (1, 1, 0.0)],
)
def test_the_busiest_link_of_a_plan(islands: int, shards: int, gigabits: float) -> None:
    """All but the own contribution reaches a node's shards: (islands - 1) / shards of 1 Gbit, and as much leaves it."""
    assert plan(islands=islands, shards=shards).fragment_gigabits == (pytest.approx(gigabits),)


def test_fragments_of_a_plan_are_exchanged_in_turn() -> None:
    found = plan(fragments=(6 * 10**8, 4 * 10**8), lag=1, step_s=0.1, link_gbits=1.0)
    assert found.fragment_wire_s(1.0) == (pytest.approx(0.6), pytest.approx(0.4))
    assert found.exposed_s(gbits=1.0, step_s=0.1) == pytest.approx(0.5 + 0.3)


def test_what_is_unknown_stays_unknown() -> None:
    assert plan().utilization is None
    assert plan(step_s=1.0).utilization is None
    assert plan(islands=1).utilization == 1.0 and plan(islands=1).required_gbits(0.9) == 0.0


# --- laws ---

SIZES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 13),
        "inner_steps": st.integers(1, 40),
        "layers_per_fragment": st.none() | st.integers(1, 15),
        "islands": st.integers(2, 9),
        "step_s": st.floats(0.01, 10.0),
    }
)


@given(SIZES, st.data())
def test_more_utilization_needs_more_bandwidth_and_more_lag_less(sizes: dict[str, Any], data: st.DataObject) -> None:
    lag = data.draw(st.integers(0, sizes["inner_steps"] - 1))
    low, high = sorted(data.draw(st.tuples(*[st.floats(0.02, 0.98)] * 2)))
    needed = [required(**sizes, lag=lag, utilization=u) for u in (low, high)]
    assert 0 < needed[0] <= needed[1] * (1 + 1e-6)
    assert required(**{**sizes, "step_s": sizes["step_s"] * 2}, lag=lag, utilization=low) == pytest.approx(
        needed[0] / 2, rel=1e-6
    )
    assert required(**sizes, lag=lag, bits=64, utilization=low) == pytest.approx(2 * needed[0], rel=1e-6)
    if lag:
        assert required(**sizes, lag=lag, utilization=low) <= required(**sizes, utilization=low) * (1 + 1e-6)


FRAGMENTS = st.lists(st.integers(1, 10**9), min_size=1, max_size=9).map(tuple)


@given(FRAGMENTS, st.integers(1, 40), st.data())
def test_more_bandwidth_never_lowers_utilization(fragments: Any, inner_steps: int, data: st.DataObject) -> None:
    lag = data.draw(st.integers(0, 2 * inner_steps))
    found = plan(fragments=fragments, inner_steps=inner_steps, lag=lag)
    low, high = sorted(data.draw(st.tuples(*[st.floats(1e-3, 1e3)] * 2)))
    slow, fast = (found.utilization_at(gbits=gbits, step_s=0.1) for gbits in (low, high))
    assert 0 < slow <= fast * (1 + 1e-9) <= 1 + 1e-9
    target = data.draw(st.floats(0.02, 0.98))
    needed = found.required_gbits(target, step_s=0.1)
    assert found.utilization_at(gbits=needed, step_s=0.1) == pytest.approx(target, rel=1e-6)
    if not lag:  # all of it is exposed
        assert found.exposed_s(gbits=1.0, step_s=0.1) == pytest.approx(sum(found.fragment_wire_s(1.0)), abs=1e-6)


# --- the papers ---


def test_the_table_of_streaming_diloco() -> None:
    every = [cell for rows in benchmark.tables().values() for row in rows.values() for cell in row]
    assert len(every) == 50
    assert benchmark.share(every, 1) == 1.0
    assert benchmark.share(every, 0) >= 0.88


def test_the_rows_of_the_scaling_laws() -> None:
    every = [cell for row in benchmark.by_inner_steps().values() for cell in row]
    assert len(every) == 25
    assert benchmark.share(every, 1) >= 0.95 and benchmark.share(every, 2) == 1.0


def test_the_grid_rounds_down() -> None:
    grid = benchmark.GRID
    assert benchmark.Cell(printed=1.4, threshold=float(grid[14])).ours == grid[13]
    assert benchmark.Cell(printed=1.4, threshold=float(grid[14]) * 1.001).ours == grid[14]
    assert benchmark.Cell(printed=1.4, threshold=1e-9).ours == grid[0]
    assert benchmark.Cell(printed=round(float(grid[20]), 1), threshold=float(grid[22]) + PERCENT).steps == 2


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"utilization": 1.0}, "utilization=1.0 .* less than 1"),
        ({"utilization": 0}, "more than 0"),
        ({"utilization": math.nan}, "utilization=nan"),
        ({"parameters": 0}, "parameters=0: give a number above 0"),
        ({"step_s": -1.0}, "step_s=-1.0"),
        ({"step_s": math.inf}, "step_s=inf"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 1.5}, "layers=1.5: give a whole number of at least 1"),
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"islands": 0}, "islands=0"),
        ({"bits": 0}, "bits=0"),
        ({"layers_per_fragment": 0}, "layers_per_fragment=0"),
        ({"lag": -1}, "lag=-1"),
        ({"lag": 1}, "lag=1 with inner_steps=1"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        required(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fragments": ()}, "fragments=\\(\\) has none"),
        ({"fragments": (1, 0)}, r"fragments\[1\]=0"),
        ({"shards": 0}, "shards=0"),
        ({"bits_down": math.nan}, "bits_down=nan"),
        ({"step_s": 0.0}, "step_s=0.0"),
        ({"link_gbits": math.inf}, "link_gbits=inf"),
        ({"lag": -1}, "lag=-1"),
    ],
)
def test_a_plan_refuses_nonsense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**settings)
