"""A small routed run as a user has it: evaluated path by path, exported, and loaded again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dipaco
from diloco import Result
from diloco.config import load
from diloco.merge import Mean, MeanBy
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from dipaco.workload import RoutedLM
from experiments.cli import main
from tests.dipaco import planted
from tests.toy import launch, records

ROUNDS = 2
TEXT = "owl heron jay the crow and finch of wren robin"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("routed")
    planted.write(folder)
    return launch(
        folder / "run",
        islands=3,
        rounds=ROUNDS,
        inner_steps=4,
        workload=RoutedLM(model="micro", prefix_tokens=24),
        data=planted.data(folder),
        layout=Paths(levels=[2, 2]),
        schedule=PathRounds(),
        merge=Mean(by=MeanBy.examples),
    )


def test_it_is_evaluated_as_one_model(run: Result) -> None:
    evaluations = records(run.directory, "evaluation")
    assert [record["round"] for record in evaluations] == list(range(ROUNDS + 1))
    for record in evaluations:
        loads = {path: record[f"eval/load/{path}"] for path in range(4)}
        assert sum(loads.values()) == pytest.approx(1)
        parts = sum(load * record[f"eval/loss/{path}"] for path, load in loads.items() if load)
        assert record["eval/loss"] == pytest.approx(parts)
    assert run.summary["val_loss"] < run.summary["initial_val_loss"] < 1.1 * math.log(256)
    assert run.summary["data"]["routing"]["validation"]["purity"] > 0.5


def test_each_path_is_a_model_that_transformers_loads(run: Result) -> None:
    export = run.directory / "export"
    table = json.loads((export / "paths.json").read_text())["paths"]
    assert len(table) == 4
    models = [
        dict(AutoModelForCausalLM.from_pretrained(export / f"path{path}").named_parameters()) for path in range(4)
    ]
    for a in range(4):
        for b in range(a):
            level0 = "model.layers.0.self_attn.q_proj.weight"
            assert torch.equal(models[a][level0], models[b][level0]) == (table[a]["level0"] == table[b]["level0"])
    assert all(torch.equal(model["model.norm.weight"], models[0]["model.norm.weight"]) for model in models)


def test_a_text_goes_through_one_path(run: Result) -> None:
    loaded = dipaco.load(run.directory)
    path = loaded.route(TEXT)
    assert 0 <= path < loaded.paths == 4
    model: Any = AutoModelForCausalLM.from_pretrained(run.directory / f"export/path{path}")
    ids = torch.tensor([list(TEXT.encode())])
    found = loaded.logprobs(TEXT)
    assert found.shape == (len(TEXT) - 1,)
    assert float(found.mean()) == pytest.approx(-float(model(ids, labels=ids).loss.detach()), abs=1e-4)
    text = loaded.generate(TEXT, tokens=8)
    assert text.startswith(TEXT) and text == dipaco.load(run.directory / "export").generate(TEXT, tokens=8)
    assert text != loaded.generate(TEXT, tokens=8, seed=1)
    workload = load(run.directory / "config.yaml").workload
    corpus = workload.corpus(planted.data(run.directory.parent), seed=0, shards=4)
    assert text == workload.sample(model, corpus, TEXT, tokens=8, seed=0)  # one function writes for both


def test_the_command_routes_the_prompt(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run.directory), "--prompt", TEXT, "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith(TEXT)


def test_a_run_without_paths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no export of several paths"):
        dipaco.load(tmp_path)


def test_as_many_paths_as_the_layout_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workload.paths=3, but the layout has 4 paths"):
        launch(tmp_path, workload=RoutedLM(paths=3), layout=Paths(levels=[2, 2]), schedule=PathRounds())
