"""The benchmarks of learning in their quick form: that they run, and what their last line has. No figure is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import ablations, compression, lab, learning
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


def test_compression_counts_bytes_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compression.main(["--quick", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    methods: dict[str, Any] = result["methods"]  # type: ignore[assignment]
    assert set(methods) == {*compression.METHODS, *compression.FAR_METHODS}
    for found in methods.values():
        assert found["difference"] == pytest.approx([found["loss"][0] - methods[found["against"]]["loss"][0]], abs=2e-5)
        assert found["bytes_ratio_without_first"] > found["bytes_ratio"] > 1
    base, both = methods["float32"], methods["int4 both ways"]
    assert base["bytes_down"] == 8 * base["bytes_first"]
    sent = both["bytes_up"] + both["bytes_down"] - both["bytes_first"]  # of one first download and 7 coded ones
    assert sent == pytest.approx((8 + 7) * base["bytes_first"] * 4.125 / 32, rel=0.02)
    assert len(result["wanted"]) == 6  # type: ignore[arg-type]


def test_an_order_holds_only_where_it_does_in_every_seed() -> None:
    losses = {"a": [1.0, 1.0], "b": [1.25, 1.5]}
    assert Order(better="a", worse="b", threshold=0.25).judge(losses) == {
        "threshold": 0.25,
        "per_seed": [0.25, 0.5],
        "holds": True,
    }
    assert Order(better="a", worse="b", threshold=0.3).judge(losses)["holds"] is False
    assert Order(better="b", worse="a", threshold=-0.5).judge(losses)["holds"] is True
