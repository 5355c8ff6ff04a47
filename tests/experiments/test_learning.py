"""The benchmarks of learning in their quick form: that they run, and what their last line has. No figure is judged."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diloco.runtime.local import Local
from experiments.benchmarks import (
    ablations,
    async_table,
    async_time,
    compression,
    dipaco_overfit,
    dipaco_routing,
    dipaco_table,
    kinds,
    lab,
    learning,
    poisoned,
)
from experiments.benchmarks.lab import Order
from tests.dipaco import planted


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


def test_poison_is_sent_merged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert poisoned.main(["--quick", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    names = set(poisoned.rows())
    assert set(result["losses"]) == set(result["rejected"]) == names  # type: ignore[call-overload]
    losses: dict[str, list[float]] = result["losses"]  # type: ignore[assignment]
    assert losses["mean, flipped"] != losses["mean"] != losses["mean, constant"]
    rejected: dict[str, Any] = result["rejected"]  # type: ignore[assignment]
    assert {name for name, found in rejected.items() if found != [{}]} >= {"mean, nan", "trimmed mean, nan"}
    assert rejected["mean, nan"] == [{"not_finite": 1}]  # one round
    trimmed = {name for name in names if "trimmed mean" in name}
    assert set(result["above_clean"]) == set(result["within"]) == trimmed  # type: ignore[call-overload]
    assert set(result["diverged"]) == {"mean, flipped", "mean, constant"}  # type: ignore[call-overload]


def test_what_is_wanted_of_trimmed_means() -> None:
    names = ("mean, flipped", "mean, constant", "trimmed mean, nan", "H=10: trimmed mean, flipped")
    losses = {"mean": [2.0, 2.0], "H=10: mean": [1.0, 1.0], names[0]: [9.0, 3.0], names[1]: [3.5, 9.0]}
    found = poisoned.judged({**losses, names[2]: [2.04, 2.0], names[3]: [1.0, 1.5]}, [3.0, 4.0])
    assert found["above_clean"] == {names[2]: [0.02, 0.0], names[3]: [0.0, 0.5]}
    assert found["within"] == {names[2]: True, names[3]: False}
    assert found["lost_of_learned"] == {names[2]: [0.04, 0.0], names[3]: [0.0, 0.167]}
    assert found["diverged"] == {names[0]: [True, False], names[1]: [True, True]}


def test_an_order_holds_only_where_it_does_in_every_seed() -> None:
    losses = {"a": [1.0, 1.0], "b": [1.25, 1.5]}
    assert Order(better="a", worse="b", threshold=0.25).judge(losses) == {
        "threshold": 0.25,
        "per_seed": [0.25, 0.5],
        "holds": True,
    }
    assert Order(better="a", worse="b", threshold=0.3).judge(losses)["holds"] is False
    assert Order(better="b", worse="a", threshold=-0.5).judge(losses)["holds"] is True


def test_schedules_without_a_barrier_are_compared_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert async_table.main(["--quick", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    cells: dict[str, Any] = result["cells"]  # type: ignore[assignment]
    assert set(cells) == set(async_table.cells(async_table.FREE, async_table.SPEEDS))
    assert set(result["orders"]) == set(async_table.ORDERS)  # type: ignore[call-overload]
    for found in cells.values():
        assert found["difference"] == pytest.approx([found["loss"][0] - cells["sync"]["loss"][0]], abs=2e-5)
    clocks = {name: found["clock_s"][0] for name, found in cells.items()}
    assert clocks["sync"] == clocks["naive async, equal"] == 8  # steps, of a second
    assert result["sync_clock_s"] == pytest.approx({"equal": 8, "slight": 10, "moderate": 16, "very strong": 40})
    assert (tmp_path / "async_table" / "table.md").is_file()

    before = len(list(tmp_path.glob("seed*")))
    assert async_time.main(["--quick", "--to", str(tmp_path)]) == 0
    race: dict[str, float] = last_line(capsys)["races"][0]  # type: ignore[index]
    assert race["sync_s"] == 40
    assert race["target"] == pytest.approx(cells["sync"]["loss"][0], abs=1e-4)  # it does not depend on speeds
    assert race["bound"] == 3.25
    assert len(list(tmp_path.glob("seed*"))) == before + 2  # the common start was there


def test_with_equal_speeds_dynamic_steps_are_all_of_them(tmp_path: Path) -> None:
    found = lab.Lab(tmp_path, async_table.QUICK_ROUNDS)
    for schedule in (async_table.DN, async_table.DYLU):
        found.loss(schedule, async_table.method(schedule, async_table.EQUAL, (0.7, 0.8)), 0)
    assert found.rows[0]["weights_sha256"] == found.rows[1]["weights_sha256"]
    assert found.rows[0]["free"] != found.rows[1]["free"]


def test_the_grid_of_outer_rates_is_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(async_table.RATES[name] in grid for name, grid in async_table.GRID.items())
    few = {async_table.SYNC: async_table.GRID[async_table.SYNC], async_table.DN: async_table.GRID[async_table.DN]}
    monkeypatch.setattr(async_table, "GRID", few)
    assert async_table.main(["--quick", "--tune", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    tried: dict[str, Any] = result["search"]  # type: ignore[assignment]
    assert {name: len(found) for name, found in tried.items()} == {n: len(g) for n, g in few.items()}


def test_a_race_ends_when_the_loss_was_first_reached() -> None:
    records = [
        {"event": "evaluation", "time_s": 3.0, "eval/loss": 5.0},
        {"event": "commit", "time_s": 3.5},
        {"event": "evaluation", "time_s": 4.0, "eval/loss": 2.0},
        {"event": "evaluation", "time_s": 6.0, "eval/loss": 1.0},
    ]
    curve = async_time.curve(records, "time_s")
    assert curve == [(0.0, 5.0), (1.0, 2.0), (3.0, 1.0)]
    assert [async_time.until(curve, target) for target in (2.5, 2.0, 1.5, 0.5)] == [1.0, 1.0, 3.0, math.inf]
    assert async_time.bound([1.0, 1.0]) == 1
    found = async_time.compared([(0.0, 5.0), (4.0, 1.9), (8.0, 2.0)], curve, [1.0, 1.0])
    assert (found.sync_s, found.async_s, found.target, found.ratio) == (4.0, 1.0, 2.0, 4.0)  # not its 8 s
    never = async_time.Race(sync_s=4.0, async_s=math.inf, target=1.0, final=2.0, bound=3.0)
    assert never.ratio == 0 and never.figures()["async_s"] is None


def test_the_race_by_the_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray each island sleeps after its steps; what else a run on Ray is, other tests have."""
    made: list[list[float]] = []

    def local(*, slowdown: list[float]) -> Local:
        made.append(slowdown)
        return Local(seconds_per_step=[1.0, 1.0, 1.0, 1.0])

    monkeypatch.setattr(async_time, "RayCluster", local)
    assert async_time.main(["--quick", "--ray", "--to", str(tmp_path)]) == 0
    assert made == [pytest.approx([0.2, 0.2 / 0.9, 0.4, 1.0])] * len(async_time.METHODS)
    race: dict[str, float] = last_line(capsys)["races"][0]  # type: ignore[index]
    assert race["sync_s"] > 0 and race["bound"] > 0  # of the clock, by which all islands are one process


@pytest.fixture
def plain_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kinds of text of a letter each."""

    def made(kind: int) -> list[str]:
        return [f"{kind} " + "abcdefgh"[kind] * (300 + i) for i in range(40)]

    monkeypatch.setattr(kinds, "KINDS", {f"kind{i}": partial(made, i) for i in range(4)})


def test_dipacos_table_has_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plain_kinds: None
) -> None:
    monkeypatch.setattr(dipaco_table, "QUICK_SCALE", lab.QUICK)
    assert dipaco_table.main(["--quick", "--to", str(tmp_path)]) == 0
    result = last_line(capsys)
    assert {"dipaco", "diloco", "dense", "flat", "purity"} <= set(result)
    assert set(result["orders"]) == set(dipaco_table.ORDERS)  # type: ignore[call-overload]
    assert result["purity"] == 1
    with pytest.raises(SystemExit, match="2"):
        dipaco_table.main(["--paths", "3"])
    with pytest.raises(ValueError, match="1 to 4"):
        kinds.files(tmp_path, 5)
    assert [dipaco_table.levels(paths) for paths in (4, 8, 16)] == [[2, 2], [2, 4], [4, 4]]
    assert dipaco_table.rows(16, quick=False) == [
        dipaco_table.DENSE,
        dipaco_table.DILOCO,
        dipaco_table.SHIPPED,
        dipaco_table.LONG,
    ]


def test_little_text_is_overfitted(tmp_path: Path, capsys: pytest.CaptureFixture[str], plain_kinds: None) -> None:
    assert dipaco_overfit.main(["--quick", "--to", str(tmp_path), "--bytes-per-path", "5000"]) == 0
    result: dict[str, Any] = last_line(capsys)
    assert set(result["losses"]) == set(result["rise"]) == set(dipaco_overfit.ROWS)
    assert all(rise[0] >= 0 for rise in result["rise"].values())
    assert set(result["best_rounds"]) == {dipaco_overfit.FLAT_STOPS, dipaco_overfit.DIPACO_STOPS}
    assert all(set(found[0]) == {"0", "1", "2", "3"} for found in result["best_rounds"].values())
    assert 4000 < result["tokens_a_path"] < 5500  # as many again are for validation
    with pytest.raises(SystemExit, match="2"):
        dipaco_overfit.main(["--paths", "16"])


def test_routings_share_the_phases_in_which_they_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(domain: str) -> list[str]:
        return [planted.text(domain, random.Random(i), 80) for i in range(40)]

    monkeypatch.setattr(kinds, "KINDS", {domain: partial(made, domain) for domain in planted.WORDS})
    assert dipaco_routing.main(["--quick", "--to", str(tmp_path), "--router-fraction", "0.2"]) == 0
    result = last_line(capsys)
    rows = {dipaco_routing.KMEANS, dipaco_routing.PRODUCT, dipaco_routing.ONCE, dipaco_routing.TWICE}
    assert set(result["purity"]) == rows  # type: ignore[call-overload]
    assert set(result["losses"]) == rows | set(dipaco_routing.OFTEN.values())  # type: ignore[call-overload]
    assert set(result["orders"]) == set(dipaco_routing.ORDERS)  # type: ignore[call-overload]
    trained = [path for path in tmp_path.glob("seed*") if "_k4_" in path.name]
    assert len(trained) == 3 + 3 + 2 + 1  # k-means, product, once, twice
    assert all((path / "export" / "router").is_dir() and (path / "checkpoints").is_dir() for path in trained)
    steps = {json.loads((path / "summary.json").read_text())["tokens"] for path in trained}
    assert len(steps) == 1
    with pytest.raises(SystemExit):
        dipaco_routing.main(["--paths", "6"])
    with pytest.raises(SystemExit):
        dipaco_routing.main(["--phase-steps", "45"])


def test_what_is_built_on_is_trained_again_where_it_was_not_kept(tmp_path: Path) -> None:
    found = lab.Lab(tmp_path, lab.QUICK)
    chosen = found.config(lab.Method(), 0, init_from="")
    first = found.summary(chosen)
    (directory,) = tmp_path.glob("seed*")
    assert not (directory / "export").exists() and not (directory / "checkpoints").exists()
    assert found.kept(chosen) == directory and (directory / "export").is_dir()
    assert found.summary(chosen)["weights_sha256"] == first["weights_sha256"] and (directory / "export").is_dir()
