"""The benchmarks of learning in their quick form: that they run, and what their last line has. No figure is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import ablations, lab, learning
from experiments.benchmarks.lab import Order


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_both_print_their_figures_and_share_what_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learning.main(["--quick", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    names = set(learning.methods(lab.Lab(tmp_path, lab.QUICK), {}))
    assert set(result["losses"]) == set(result["mean"]) == names  # type: ignore[call-overload]
    assert set(result["orders"]) == set(learning.ORDERS)  # type: ignore[call-overload]
    assert all({"threshold", "per_seed", "holds"} == set(found) for found in result["orders"].values())  # type: ignore[attr-defined]
    written = {path.name for path in (tmp_path / "learning").iterdir()}
    assert written == {"config.yaml", "environment.json", "metrics.csv", "result.json", "table.md"}

    before = {path.name for path in tmp_path.glob("seed*")}
    assert ablations.main(["--quick", "--to", str(tmp_path)]) == 0
    assert set(last_line(capsys)["orders"]) == set(ablations.ORDERS)  # type: ignore[call-overload]
    more = {path.name for path in tmp_path.glob("seed*")} - before
    assert len(more) == len(ablations.METHODS) - 1  # one worker was there


def test_an_order_holds_only_where_it_does_in_every_seed() -> None:
    losses = {"a": [1.0, 1.0], "b": [1.25, 1.5]}
    assert Order(better="a", worse="b", threshold=0.25).judge(losses) == {
        "threshold": 0.25,
        "per_seed": [0.25, 0.5],
        "holds": True,
    }
    assert Order(better="a", worse="b", threshold=0.3).judge(losses)["holds"] is False
    assert Order(better="b", worse="a", threshold=-0.5).judge(losses)["holds"] is True
