"""`diloco train -m`: members, sweep.csv, the table, and what an interruption leaves."""

from __future__ import annotations

import csv
import json
import signal
import sys
from pathlib import Path

import pytest

from experiments.entry import main

TOY = ["-m", "--import", "tests.toy", "runtime=local", "metrics.live=false", "inner_steps=4", "rounds=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def rows() -> list[dict[str, str]]:
    with Path("runs/latest/sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def folders() -> list[str]:
    return sorted(path.name for path in Path("runs/latest/").iterdir() if path.is_dir() and not path.is_symlink())


def test_each_combination_is_a_run_and_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "workload=line", "islands=1,2", "outer.lr=0.1,0.7", "name=lines"]) == 0
    names = [
        "0_islands=1,outer.lr=0.1",
        "1_islands=1,outer.lr=0.7",
        "2_islands=2,outer.lr=0.1",
        "3_islands=2,outer.lr=0.7",
    ]
    found = rows()
    assert folders() == names and [row["directory"] for row in found] == names
    assert [(row["islands"], row["outer.lr"]) for row in found] == [
        ("1", "0.1"),
        ("1", "0.7"),
        ("2", "0.1"),
        ("2", "0.7"),
    ]
    assert Path("runs/latest").resolve().name.endswith("_lines") and len(list(Path("runs").iterdir())) == 2
    for row in found:
        saved = json.loads(Path("runs/latest", row["directory"], "summary.json").read_text())
        assert row["status"] == saved["status"] == "finished" and row["weights_sha256"] == saved["weights_sha256"]
        assert float(row["val_loss"]) == saved["val_loss"]
    best = min(range(4), key=lambda number: float(found[number]["val_loss"]))
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "* best" in line]
    assert marked == [str(best)]


def test_a_member_that_fails_is_a_row_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    poison = ["workload.poisoned_steps=[0]", "workload.poisoned_shards=[0],[5],[0]", "islands=1"]
    assert main([*TOY, "workload=constant", "workload.fails_after_step=5,-1", *poison[1:], poison[0]]) == 1
    found = rows()
    assert [row["status"] for row in found] == ["stopped", "failed", "stopped", "stopped", "finished", "stopped"]
    assert "rejected" in found[0]["reason"]
    assert found[1]["reason"] == "RuntimeError: the batch cannot be made"
    shown = capsys.readouterr()
    assert "the batch cannot be made" in shown.out and "Traceback" in shown.err


def test_a_member_that_refuses_to_begin_is_a_row() -> None:
    assert main([*TOY, "workload=line", "runtime.seconds_per_step=[1,2]", "islands=3,2"]) == 1
    assert [row["status"] for row in rows()] == ["failed", "finished"]
    assert "seconds_per_step" in rows()[0]["reason"]
    assert folders() == ["1_islands=2"]


def test_ctrl_c_stops_the_whole_sweep(here: Path) -> None:
    (here / "now").touch()  # the first run that comes to step 5 interrupts
    signalling = [f"workload.file={here}/now", "workload.at_step=5", f"workload.number={signal.SIGINT.value}"]
    assert main([*TOY, "workload=signalling", *signalling, "rounds=50", "seed=1,2,3"]) == 130
    assert [row["status"] for row in rows()] == ["interrupted"] and folders() == ["0_seed=1"]
    assert list(Path("runs/latest/0_seed=1/checkpoints").iterdir())


def test_a_sweep_over_experiments_and_parts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "conf" / "experiment"
    folder.mkdir(parents=True)
    for number, name in enumerate("ab"):
        (folder / f"{name}.yaml").write_text(f"# @package _global_\nseed: {number}\n")
    line = ["--config-dir", "conf", "workload=line", "+experiment=a,b", "outer=glob(*)", "--cfg", "job"]
    assert main([*TOY, *line]) == 0
    shown = capsys.readouterr().out.split("---\n")
    assert (
        len(shown) >= 4 and sum("experiment: a\n" in text and "seed: 0\n" in text for text in shown) == len(shown) // 2
    )
