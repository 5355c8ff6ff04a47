"""Runs beside a run: their losses at equal steps, how they are called, and what is no run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from diloco import summary
from diloco.beside import Beside, check, dense_val_loss
from diloco.counters import Counters
from diloco.display import Display
from diloco.metrics import Metrics, open_metrics
from diloco.outcome import summary_table


def config(name: str = "own", inner_steps: int = 10, **more: Any) -> dict[str, Any]:
    data = {"files": [], "max_tokens": 0, "batch": 4, "split": "iid"}
    return {"choices": {"workload": "routed_lm"}, "name": name, "inner_steps": inner_steps, "data": data, **more}


def run(folder: Path, losses: dict[int, float | None], **settings: Any) -> str:
    """A run with these losses by round."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**settings)))
    told = [{"event": "evaluation", "round": done, "eval/loss": loss} for done, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    return str(folder)


def evaluated(done: int) -> dict[str, Any]:
    return {"event": "evaluation", "round": done, "eval/loss": 2.0}


def test_losses_are_those_after_as_many_inner_steps(tmp_path: Path) -> None:
    """Rounds of 25 steps beside rounds of 10: the newest evaluation at or before."""
    dense = run(tmp_path / "a", {0: 8.0, 1: 6.0, 2: None, 4: 4.0}, name="dense", inner_steps=25)
    beside = Beside([dense], config())
    found = [beside.losses(evaluated(done))["beside/dense"] for done in (0, 2, 3, 4, 5, 9, 10, 99)]
    assert found == [8.0, 8.0, 6.0, 6.0, None, None, 4.0, 4.0]  # after 0, 20, 30, 40, 50, 90, 100 and 990 steps


def test_a_run_that_is_still_trained_or_is_gone_by_now(tmp_path: Path) -> None:
    dense = run(tmp_path / "a", {0: 8.0}, name="dense")
    beside = Beside([dense], config())
    assert beside.losses(evaluated(1)) == {"beside/dense": 8.0}
    path = tmp_path / "a" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"event": "warning", "message": '"evaluation"'}) + "\n")
        file.write(json.dumps({"event": "evaluation", "round": 1, "eval/loss": 7.0}) + '\n{"event": "evaluation", "rou')
    assert beside.losses(evaluated(1)) == {"beside/dense": 7.0}
    path.unlink()
    assert beside.losses(evaluated(2)) == {"beside/dense": 7.0}


def test_names_tell_them_apart(tmp_path: Path) -> None:
    def labels(*folders: str) -> list[str]:
        return list(Beside(folders, config()).losses(evaluated(0)))

    a, b = (run(tmp_path / name, {0: 8.0}, name=name) for name in "ab")
    again, own = run(tmp_path / "c", {0: 8.0}, name="a"), run(tmp_path / "d", {0: 8.0}, name="own")
    elsewhere = run(tmp_path / "e" / "a", {0: 8.0}, name="a")
    assert labels(a, b, a) == ["beside/a", "beside/b"]
    assert labels(a, again) == ["beside/a", "beside/c"]  # directories
    assert labels(b, own) == ["beside/b", "beside/d"]  # for this run has that name
    assert labels(a, elsewhere) == [f"beside/{a}", f"beside/{elsewhere}"]
    assert labels() == []


@pytest.mark.parametrize("lacks", ["folder", "config.yaml", "metrics.jsonl", "name", "YAML"])
def test_what_is_no_run_is_refused(tmp_path: Path, lacks: str) -> None:
    folder = tmp_path / "a"
    if lacks != "folder":
        run(folder, {0: 8.0}, name="dense")
    if lacks in ("config.yaml", "metrics.jsonl"):
        (folder / lacks).unlink()
    if lacks in ("name", "YAML"):
        (folder / "config.yaml").write_text("rounds: 3" if lacks == "name" else "a: [")
    with pytest.raises(ValueError, match="give directories of runs, such as runs/latest, or leave metrics.beside out"):
        check([str(folder)])
    with pytest.raises(ValueError, match=str(folder)):
        Metrics(beside=[str(folder)]).check()


def test_latest_is_the_run_that_it_was(tmp_path: Path) -> None:
    first = run(tmp_path / "first", {0: 8.0})
    (tmp_path / "latest").symlink_to("first")
    settings = Metrics(beside=[str(tmp_path / "latest")])
    assert settings.beside == [first]
    settings.check()


def test_what_is_evaluated_differently_is_said(tmp_path: Path) -> None:
    other = {"files": [], "max_tokens": 5, "batch": 8, "split": "domain"}  # batch and split: training alone
    folders = [run(tmp_path / "a", {}, name="a", data=other, choices={"workload": "causal_lm"})]
    folders.append(run(tmp_path / "b", {}, name="b", inner_steps=3))
    assert Beside(folders, config()).doubts == [
        "metrics.beside: a is evaluated differently: choices.workload=causal_lm, here routed_lm, "
        "data.max_tokens=5, here 0"
    ]


def test_an_evaluation_tells_of_those_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In metrics.jsonl, log.txt and on standard output; other records do not."""
    folders = [
        run(tmp_path / name, {0: 9.0, 2: loss}, name=name) for name, loss in (("dense", 1.901), ("diloco", 1.8734))
    ]
    (tmp_path / "own").mkdir()
    settings = Metrics(beside=folders)
    writer, _ = open_metrics(tmp_path / "own", settings, name="own", rounds=9, config=config())
    writer.write({"event": "start", "round": 0})
    writer.write({**evaluated(2), "eval/loss": 1.842})
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [[key for key in record if key.startswith("beside/")] for record in records] == [
        [],
        ["beside/dense", "beside/diloco"],
    ]
    assert records[1]["beside/dense"] == 1.901 and records[1]["beside/diloco"] == 1.8734
    line = "round 2/9  validation loss 1.842 (dense 1.901, diloco 1.873)  best 1.842"
    assert line in (tmp_path / "own" / "log.txt").read_text() and line in capsys.readouterr().out


def test_the_drawing_has_a_line_for_them_and_one_for_the_paths(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, color_system=None)
    display = Display(tmp_path, rounds=20, console=console)
    by_path = {"eval/loss/0": 1.5, "eval/loss/1": 2.25, "eval/load/0": 0.4}
    for island in range(100):
        display.write({"time_s": 1.0, "event": "segment", "round": 0, "island": island})
    for told in ({}, {"beside/dense": 1.901, "beside/[b]": None, **by_path}):
        display.write({"time_s": 1.0, **evaluated(3), **told})
        with console.capture() as capture:
            console.print(display)
        drawn = [line.rstrip() for line in capture.get().splitlines()]
        assert len(drawn) <= 20 and "more" in drawn[-1]
        assert ("paths  1.500 to 2.250" in drawn) == bool(told)
        assert ("beside, after as many steps  dense 1.901, [b] -" in drawn) == bool(told)
    display.close()


def test_the_summary_of_several_paths(tmp_path: Path) -> None:
    counters = Counters(val_loss=1.8)
    assert summary.routed(counters, paths=1, beside=()) == {}
    alone = summary.routed(counters, paths=4, beside=())
    assert alone == {"paths": 4, "routed_val_loss": 1.8, "dense_val_loss": None}
    ends: list[dict[str, Any]] = [
        {"islands": 4, "val_loss": 1.1},  # DiLoCo
        {"islands": 1, "paths": 4, "val_loss": 1.2},  # all paths on one island
        {"islands": 1, "val_loss": None},  # broken off before it was evaluated
        {"islands": 1, "val_loss": 1.9},
        {"islands": 1, "val_loss": 1.7},
    ]
    folders = [run(tmp_path / str(number), {}) for number in range(len(ends) + 1)]  # the first still trains
    for folder, end in zip(folders[1:], ends, strict=True):
        (Path(folder) / "summary.json").write_text(json.dumps(end))
    found = summary.routed(counters, paths=4, beside=folders)
    assert found == {"paths": 4, "routed_val_loss": 1.8, "dense_val_loss": 1.9}
    assert dense_val_loss([*folders[:4], str(tmp_path / "nowhere")]) is None
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table({"name": "x", "status": "finished", **found}))
    console.print(summary_table({"name": "x", "status": "finished", **alone}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.800 routed, 1.900 dense" in shown and shown.count("4 paths") == 2 and shown.count("dense") == 1
