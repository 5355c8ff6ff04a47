"""The benchmarks of alignment in their quick form: that they run, and what their last line has. No figure is judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from diloco.workloads.objectives import OBJECTIVES
from experiments.benchmarks import align_islands, objectives, soup_front, warm, warp_front
from experiments.benchmarks.align import reward_at

FEW = ("dpo", "ipo", "simpo")  # objectives


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the policy is pre-trained once."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what differs in numbers only, a part."""
    monkeypatch.setattr(objectives, "OBJECTIVES", {name: OBJECTIVES[name] for name in FEW})
    monkeypatch.setattr(warm, "MEMBERS", warm.MEMBERS[::3])
    monkeypatch.setattr(soup_front, "SOUPS", soup_front.SOUPS[::4])


@pytest.mark.parametrize(
    ("main", "methods", "columns"),
    [
        (align_islands.main, align_islands.ROWS, {"reward", "kl", "reward_at", "sent_mb"}),
        (warp_front.main, ["REINFORCE, trajectory", "LITI of REINFORCE", "WARP, 3 iterations"], {"reward_at", "to_kl"}),
        (soup_front.main, ["before", "soup 0.5", "run 0.25"], {"friendly", "brief"}),
        (warm.main, ["single, mean of 6", "ensemble", "averaged"], {"train", "out_of_domain", "best_of_n"}),
        (objectives.main, FEW, {"accuracy", "margin", "kl"}),
    ],
    ids=["align_islands", "warp_front", "soup_front", "warm", "objectives"],
)
def test_it_runs(
    main: Callable[[Sequence[str]], int],
    methods: Sequence[str],
    columns: set[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--quick", "--to", str(folder)]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(methods) <= set(told["found"]) and told["seeds"] == [0]
    assert all(columns <= set(row) for name in methods for row in told["found"][name])
    record = folder / told["benchmark"]
    assert json.loads((record / "result.json").read_text())["found"] == told["found"]
    assert (record / "table.md").read_text().startswith("| method |")


def test_the_reward_at_a_divergence() -> None:
    """Between two points linearly; a point that a later one of less divergence beats does not count."""
    points = [(0.0, 0.0), (2.0, 0.4), (4.0, 0.3), (6.0, 0.8)]
    assert reward_at(points, 1.0) == pytest.approx(0.2)
    assert reward_at(points, 4.0) == pytest.approx(0.6)
    assert reward_at(points, 9.0) == pytest.approx(0.8)
