"""Mistakes with paths are refused, or told, before data is prepared: by the command line alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from diloco.layout import Whole
from diloco.schedule import Barrier
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from experiments.composition import Request, single, sweep
from experiments.mistakes import Mistake
from tests.toy import Line, launch, warned

GIVEN = "+experiment=dipaco_2x2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "schedule=first_come",
            "schedule=first_come takes data from a pool for all islands, .* schedule=path_rounds",
        ),
        ("schedule=quorum", "schedule=quorum takes data from a pool for all islands, and each of the layout's 4 paths"),
        ("layout.levels=[2,2,2,2,2]", r"levels=\[2, 2, 2, 2, 2\] do not cover the model's 4 blocks.* a deeper model"),
        ("layout.first_blocks=[4]", r"first_blocks=\[4\] do not cover the model's 4 blocks"),
        ("layout.fragments=5", "layout.fragments=5 are more than the model's 4 blocks"),
        ("workload.router=product layout.levels=[2,3]", "needs a square number of paths, not 6: use 4 paths"),
        ("workload.overlap=5", "workload.overlap=5 with 4 paths: use at most 4"),
        ("workload.paths=3", "workload.paths=3, but the layout has 4 paths"),
        ("workload=causal_lm", "sets workload.balance, which CausalLM has not: leave out workload=causal_lm, or"),
        ("merge=rda", "sets merge.by, which RDA has not: leave out merge=rda, or "),
        ("schedule=barrier islands=3", "islands=3 are fewer than the layout's 4 paths"),
    ],
)
def test_refused_by_the_command_line_alone(overrides: str, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        single(Request(overrides=(GIVEN, *overrides.split())))


def test_a_sweep_is_checked_as_a_whole() -> None:
    with pytest.raises(Mistake, match=r"member 1 \(layout.levels=\[2,3\]\): .* square number of paths"):
        sweep(Request(overrides=(GIVEN, "workload.router=product", "layout.levels=[2,2],[2,3]")))


def test_paths_that_do_not_move_are_told_of(tmp_path: Path) -> None:
    """As a warning of the run: it works, and is not what the paper does."""
    settings = {"workload": Line(blocks=2), "islands": 4, "rounds": 1, "layout": Paths(levels=[2, 2])}
    barrier = launch(tmp_path / "barrier", **settings, schedule=Barrier())
    assert any("schedule=barrier keeps each of the 4 paths" in text for text in warned(barrier.directory))
    rounds = launch(tmp_path / "rounds", **settings, schedule=PathRounds())
    whole = launch(tmp_path / "whole", **{**settings, "layout": Whole()}, schedule=Barrier())
    assert not warned(rounds.directory) and not warned(whole.directory)
