"""Which runs a report is about, and how far they came."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from diloco.report import default_folder
from diloco.report.runs import best_of, differing, read_runs
from tests.report.made import commit, evaluation, records, start, summary, write_run, write_sweep


def test_a_finished_run(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "2026-11-21_12-55-37_made")])
    assert (run.label, run.status, run.val_loss) == ("made", "finished", 6.0)
    assert run.config["inner"] == "adamw" and run.config["inner.lr"] == 0.001
    assert run.defaults == {"inner.lr": 0.0004, "rounds": 10}


def test_an_unfinished_run_has_the_figures_so_far(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "2026-11-21_12-55-37_made", records()[:6])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time_s": 9, "event": "comm')
    (run,) = read_runs([folder])
    assert (run.label, run.status) == ("made", "unfinished")
    assert run.summary["tokens"] == 200 and run.summary["bytes_up"] == 1000 and run.summary["rounds"] == 1
    assert (run.summary["initial_val_loss"], run.val_loss, run.summary["wall_s"]) == (8.0, 7.0, 4.0)
    (nothing,) = read_runs([write_run(tmp_path / "2026-11-21_12-55-38_made", [start()])])
    assert nothing.val_loss is None and nothing.summary["rounds"] == 0


def test_a_summary_from_before_a_resume_does_not_count(tmp_path: Path) -> None:
    told = [*records()[:6], start(time_s=5.0)]
    folder = write_run(tmp_path / "made", told, summed=summary("made", status="interrupted"))
    os.utime(folder / "summary.json", ns=(0, 0))
    assert read_runs([folder])[0].status == "unfinished"
    failed = write_run(tmp_path / "failed", told, summed=summary("made", status="failed", reason="RuntimeError: no"))
    os.utime(failed / "metrics.jsonl", ns=(0, 0))
    assert (read_runs([failed])[0].status, read_runs([failed])[0].reason) == ("failed", "RuntimeError: no")


def test_a_sweep_has_all_its_members(tmp_path: Path) -> None:
    runs = read_runs([write_sweep(tmp_path)])
    assert [run.label for run in runs] == ["inner.lr=0.001", "inner.lr=0.002", "inner.lr=-1"]
    assert [run.status for run in runs] == ["finished", "finished", "failed"]
    assert runs[2].reason == "inner.lr=-1: too small" and runs[2].config == {"inner.lr": -1}
    assert best_of(runs) is runs[1] and differing(runs) == ["inner.lr"]


def test_a_sweep_that_is_under_way(tmp_path: Path) -> None:
    write_run(tmp_path / "0_seed=1", records()[:6])
    assert [run.label for run in read_runs([tmp_path])] == ["seed=1"]
    write_sweep(tmp_path)
    write_run(tmp_path / "10_seed=7", records()[:3])
    assert [run.status for run in read_runs([tmp_path])] == ["finished", "finished", "failed", *["unfinished"] * 2]


def test_each_run_counts_once(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    alone = write_run(tmp_path / "alone", name="alone")
    runs = read_runs([sweep, alone, sweep / "latest", alone])
    assert len(runs) == 4 and len({run.label for run in runs}) == 4


@pytest.mark.parametrize(
    ("rates", "names", "labels"),
    [
        ((1, 2), ("a", "b"), ["a", "b"]),
        ((1, 2), ("a", "a"), ["inner.lr=1", "inner.lr=2"]),
        ((1, 1), ("a", "a"), ["2026-01-01_00-00-00_a", "2026-01-01_00-00-01_a"]),
    ],
)
def test_labels_tell_runs_apart(
    tmp_path: Path, rates: tuple[int, int], names: tuple[str, str], labels: list[str]
) -> None:
    told = list(enumerate(zip(names, rates, strict=True)))
    folders = [write_run(tmp_path / f"2026-01-01_00-00-0{i}_{name}", name=name, lr=lr) for i, (name, lr) in told]
    assert [run.label for run in read_runs(folders)] == labels


def test_labels_of_like_names_in_other_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "made") for name in "ab"]
    assert len({run.label for run in read_runs(folders)}) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "nowhere", "nowhere is not a directory; give that of a run or a sweep"),
        (lambda path: path, "is not the directory of a run or a sweep: it has neither metrics.jsonl nor sweep.csv"),
        (lambda path: empty_sweep(path), "is a sweep without any run"),
        (lambda path: broken(path, "config.yaml"), "config.yaml is not YAML"),
        (lambda path: broken(path, "summary.json"), "summary.json is not JSON"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(words)):
        read_runs([make(tmp_path)])
    with pytest.raises(ValueError, match="no run was given"):
        read_runs([])


def empty_sweep(path: Path) -> Path:
    (path / "sweep.csv").write_text("inner.lr,directory,status,reason\n")
    return path


def broken(path: Path, name: str) -> Path:
    write_run(path)
    (path / name).write_text("{[")
    return path


def test_where_a_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder([Path("runs/latest")]) == Path("runs/latest/report")
    several = default_folder([Path("a"), Path("b")])
    assert several.parent == tmp_path / "runs" and several.name.endswith("_report") and not several.exists()


def test_evaluations_that_are_not_numbers(tmp_path: Path) -> None:
    told = [start(), evaluation(1.0, 0, 8.0), commit(2.0, 1), evaluation(3.0, 1, None)]
    (run,) = read_runs([write_run(tmp_path, told)])
    assert run.val_loss == 8.0
