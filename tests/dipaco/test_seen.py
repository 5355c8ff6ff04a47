"""A small routed run beside a dense one, as its records, its summary and its report tell of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diloco import Result
from diloco.config import load
from diloco.metrics import Metrics
from diloco.report import write_report
from diloco.report.runs import read_runs
from diloco.schedule import Barrier
from diloco.train import train
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from tests.dipaco import planted
from tests.toy import launch, logged, records

LM = RoutedLM(model="micro", prefix_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen")
    planted.write(folder)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path) -> Result:
    """Four rounds of two steps."""
    given: dict[str, Any] = {"islands": 1, "rounds": 4, "inner_steps": 2, "workload": LM, "schedule": Barrier()}
    return launch(folder / "dense", name="dense", data=planted.data(folder), **given)


@pytest.fixture(scope="module")
def run(folder: Path, dense: Result) -> Result:
    """Two rounds of three steps, on two islands that take turns."""
    given: dict[str, Any] = {"islands": 2, "rounds": 2, "inner_steps": 3, "workload": LM, "schedule": PathRounds()}
    metrics = Metrics(live=False, beside=[str(dense.directory)])
    layout = Paths(levels=[2, 2])
    return launch(folder / "run", name="run", data=planted.data(folder), layout=layout, metrics=metrics, **given)


def test_evaluations_tell_of_the_dense_run_after_as_many_steps(run: Result, dense: Result) -> None:
    theirs = [record["eval/loss"] for record in records(dense.directory, "evaluation")]  # after 0, 2, 4, 6, 8 steps
    found = [record["beside/dense"] for record in records(run.directory, "evaluation")]  # after 0, 3, 6
    assert found == [theirs[0], theirs[1], theirs[3]]
    lines = logged(run.directory)
    assert sum(f"(dense {loss:.3f})" in line for loss in found for line in lines) == 3


def test_the_summary_compares_them(run: Result, dense: Result) -> None:
    found = json.loads((run.directory / "summary.json").read_text())
    assert found["paths"] == 4 and found["routed_val_loss"] == found["val_loss"]
    assert found["dense_val_loss"] == dense.summary["val_loss"] is not None
    assert not {"paths", "routed_val_loss", "dense_val_loss"} & dense.summary.keys()
    assert not {"paths", "routing"} & records(dense.directory, "start")[0].keys()


def test_the_start_tells_what_the_summary_and_the_export_tell(run: Result) -> None:
    (start,) = records(run.directory, "start")
    assert {"paths": start["paths"]} == json.loads((run.directory / "export" / "paths.json").read_text())
    assert start["routing"] == run.summary["data"]["routing"] and len(start["routing"]["by_path"]) == 4


def test_the_report_shows_its_paths(run: Result, tmp_path: Path) -> None:
    page = write_report([run.directory], tmp_path).read_text(encoding="utf-8")
    assert "<h2>Paths" in page and "beside: dense" in page and "<h2>Staleness" not in page
    for path in run.summary["data"]["routing"]["by_path"]:
        assert all(document["text"] in page for document in path["typical"])
    (read,) = read_runs([run.directory])
    assert read.history.by_module and not read.history.free


def test_a_resumed_run_may_have_others_beside_it(run: Result) -> None:
    """Last: it goes on with the run."""
    config = load(run.directory / "config.yaml")
    result = train(replace(config, rounds=3, resume=str(run.directory), metrics=Metrics(live=False)))
    assert result.summary["dense_val_loss"] is None and result.summary["paths"] == 4
    assert "beside/dense" not in records(run.directory, "evaluation")[-1]
    (read,) = read_runs([run.directory])
    assert [bool(evaluation.beside) for evaluation in read.history.evaluations] == [True, True, True, False]
