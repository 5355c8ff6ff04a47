"""The simulation of failures: what it comes to by hand, and that nobody pays for another's failure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import fmean

import pytest

from experiments.benchmarks import quorum_goodput
from experiments.benchmarks.outages import Span, Tape, Trouble, Unit, World, by_hand, data_parallel, record
from experiments.benchmarks.quorum_goodput import QUIET, islands, others

WORLD = World(hours=0.5)


def tape(*failures: float, stalls: tuple[float, ...] = (), chip: int = 0) -> Tape:
    """The same chip fails, or stalls, at these moments."""
    troubles = [tuple(Trouble(at_s=at_s, chip=chip) for at_s in times) for times in (failures, stalls)]
    return Tape(failures=troubles[0], stalls=troubles[1])


def test_a_step_is_held_up_by_a_stall_and_ended_by_a_halt() -> None:
    unit = Unit(WORLD, tape(100.25, stalls=(50.5,)), units=4, index=0, pause_s=18.0)
    halt = Span(from_s=100.25, to_s=118.25)
    assert [unit.step(at_s) for at_s in (49.0, 50.0, 60.0, 99.0)] == [50.0, 71.0, 71.5, 100.0]
    assert [unit.step(at_s) for at_s in (99.5, 110.0, 118.25)] == [halt, halt, 119.25]
    assert [unit.halt(at_s) for at_s in (100.0, 100.25, 118.25)] == [None, halt, None]
    assert [unit.there(at_s) for at_s in (100.0, 101.0, 700.25)] == [300_000, 299_750, 300_000]
    other = Unit(WORLD, tape(100.25, stalls=(50.5,)), units=4, index=1, pause_s=18.0)
    assert (other.step(50.0), other.step(100.0), other.there(101.0)) == (51.0, 101.0, 300_000)


def test_data_parallel_by_hand() -> None:
    """A failure at 100.25 s in half an hour: 100 steps of all, then steps of all but a slice, then of all again."""
    chips, slice_chips = WORLD.chips, WORLD.slice_chips
    from_s, without = 100.25 + 18, 582  # steps that begin before the slice is there again at 700.25
    after = math.ceil(1800 - from_s - without)
    useful = (100 + after) * chips + without * (chips - slice_chips)
    assert data_parallel(WORLD, tape(100.25), elastic=True) == pytest.approx(useful / (1800 * chips), rel=1e-9)
    fixed = 100 + math.ceil(1800 - 700.25)
    assert data_parallel(WORLD, tape(100.25), elastic=False) == pytest.approx(fixed / 1800, rel=1e-9)


def test_the_tape_has_the_failures_that_were_asked_for() -> None:
    world = World(hours=20)
    found = record(world, 0)
    expected = (20 * 3600 + world.repair_s) * world.chips / world.interrupt_s
    assert len(found.failures) == pytest.approx(expected, abs=4 * expected**0.5) and not found.stalls
    assert found == record(world, 0) != record(world, 1)
    assert fmean(trouble.chip for trouble in found.failures) == pytest.approx(world.chips / 2, rel=0.05)
    elastic = [data_parallel(world, record(world, seed), elastic=True) for seed in range(3)]
    assert fmean(elastic) == pytest.approx(by_hand(world, 1), abs=0.01)


@pytest.mark.parametrize("many", [2, 8])
def test_islands_have_the_availability_of_one_alone(many: int) -> None:
    """MTBF / (MTBF + down time); the interruptions of half an hour leave it uncertain by about two per cent."""
    found = [islands(WORLD, record(WORLD, seed), many) for seed in range(3)]
    assert fmean(outcome.goodput for outcome in found) == pytest.approx(by_hand(WORLD, many), abs=0.04)
    assert max(outcome.late / outcome.accepted for outcome in found) < 0.01


def test_islands_that_come_back_at_any_moment_are_heard() -> None:
    """Whoever returns is in another phase of a step than the others: nobody is late for long because of that."""
    world = replace(WORLD, hours=0.25)
    found = islands(world, record(world, 0), 16)
    assert found.late / found.accepted < 0.01
    assert found.goodput == pytest.approx(by_hand(world, 16), abs=0.03)


@pytest.mark.parametrize("kept", [False, True])
def test_a_failure_costs_an_island_its_pause_and_the_others_nothing(kept: bool) -> None:
    world = replace(WORLD, hours=0.1)
    quiet, found = (islands(world, of, 4, kept=kept) for of in (QUIET, tape(100.25)))
    assert found.steps[1:] == quiet.steps[1:]
    assert quiet.steps[0] - found.steps[0] == 18  # and a quarter of one
    assert quiet.late == 0 and found.goodput < quiet.goodput and found.merged < quiet.merged


def test_nobody_pays_for_an_island_that_is_lost_for_good_or_stalls() -> None:
    found = others(World(hours=0.1), 4)
    assert set(found) == {"undisturbed", "first lost for good", "first stalls"}
    assert len(set(found.values())) == 1 and found["undisturbed"] == pytest.approx(1, abs=0.01)


def test_quorum_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    assert quorum_goodput.main(["--quick"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "quorum_goodput" and set(found["scenes"]) == set(quorum_goodput.SCENES)
    for scene in found["scenes"].values():
        assert scene["order_in_seeds"] == found["seeds"] == 2
        told = scene["methods"]
        assert all(0 < told[m]["merged"] <= 1 and len(told[m]["seeds"]) == 2 for m in ("2", "8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--islands", "7"], "--islands 7"), (["--hours", "0"], "--hours 0"), (["--seeds", "0"], "")],
)
def test_what_cannot_be_simulated(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = quorum_goodput.main(options)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_failure_is_seen_before_its_pause_is_over() -> None:
    with pytest.raises(ValueError, match=r"detect_s=30.0"):
        World(detect_s=30.0)
