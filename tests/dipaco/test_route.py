"""`diloco route` on a small run, and texts that change path as they go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dipaco
from diloco import Result, train
from diloco.config import load
from diloco.merge import Mean, MeanBy
from dipaco.evaluate import frequencies
from dipaco.finished import Finished, token_router
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from dipaco.token_router import Fitting, Scored, TokenRouter
from dipaco.workload import RoutedLM
from experiments.cli import main
from tests.dipaco import planted
from tests.toy import launch

TEXT = "owl heron jay the crow and finch of wren robin for iron copper zinc on nickel tin is lead"
PREFIX = 24
FEW = ["--steps", "5", "--look-ahead", "16", "--documents", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("routed")
    planted.write(folder, documents=30)
    result = launch(
        folder / "run",
        islands=4,
        rounds=2,
        inner_steps=4,
        workload=RoutedLM(model="micro", prefix_tokens=PREFIX, router_fraction=0.1),
        data=planted.data(folder),
        layout=Paths(levels=[2, 2]),
        schedule=PathRounds(),
        merge=Mean(by=MeanBy.examples),
    )
    assert main(["route", str(result.directory), "--every", "48,16,1000", *FEW]) == 0
    return result


def evaluation(run: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.directory / "routing" / "evaluation.json").read_text())
    return found


def counted_fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each token router that is fitted from now on learns from."""
    fits: list[int] = []
    fit = TokenRouter.fit

    def counted(base: str, documents: list[Scored], fitting: Fitting) -> TokenRouter:
        fits.append(len(documents))
        return fit(base, documents, fitting)

    monkeypatch.setattr(TokenRouter, "fit", counted)
    return fits


def test_once_is_the_runs_own_loss(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluation(run)
    figures = found["figures"]
    assert list(figures) == ["once", "48", "16", "1000"]
    assert figures["once"]["loss"] == pytest.approx(run.summary["val_loss"], rel=1e-6)
    assert figures["1000"] == figures["once"]  # no document is so long
    for row in figures.values():
        assert row["oracle"] <= row["loss"] and sum(row["loads"]) == pytest.approx(1) and len(row["loads"]) == 4
        assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))
    assert figures["16"]["oracle"] < figures["48"]["oracle"] < figures["once"]["oracle"]
    documents = run.summary["data"]["router_documents"]
    assert (found["router"]["held_out_documents"], found["router"]["training_documents"]) == (documents, 0)
    assert (found["router"]["look_ahead"], found["router"]["steps"]) == (16, 5)


def test_the_saved_router_is_used_again(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = counted_fits(monkeypatch)
    before = evaluation(run)["figures"]
    assert frequencies(run.directory, [16, 48]) == {name: before[name]["loss"] for name in ("once", "16", "48")}
    assert main(["route", str(run.directory), "--every", "16", "--to", str(tmp_path / "to")]) == 0 and not fits
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ["routed", "once", "every"]
    assert out[-2] == str(tmp_path / "to" / "evaluation.json")
    assert json.loads(out[-1]) == json.loads((tmp_path / "to" / "evaluation.json").read_text())


def test_another_is_fitted_for_other_settings_or_weights(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = counted_fits(monkeypatch)
    copied = shutil.copytree(run.directory, tmp_path / "run")
    token_router(Finished(copied), steps=5, look_ahead=16, documents=0)
    assert not fits
    token_router(Finished(copied), documents=3, steps=2)
    token_router(Finished(copied), documents=3)
    assert fits == [3]
    token_router(Finished(copied), documents=4, steps=1)
    token_router(Finished(copied), documents=4, steps=1, refit=True)
    assert fits == [3, 4, 4]
    train(replace(load(copied / "config.yaml"), rounds=3, resume=str(copied)))
    token_router(Finished(copied), documents=4, steps=1)
    assert fits == [3, 4, 4, 4]  # the paths have other weights now
    assert not list((copied / "export").glob(".making*"))


def test_training_documents_make_up_for_few(run: Result) -> None:
    finished = Finished(run.directory)
    held_out, table = finished.corpus.router_documents, finished.corpus.table
    assert table is not None
    assert finished.router_documents(0).tolist() == held_out.tolist()
    assert set(finished.router_documents(5)) < set(held_out)
    more = set(finished.router_documents(len(held_out) + 5))
    assert more > set(held_out) and all(table.trains[index, 0] >= 0 for index in more - set(held_out))
    assert not finished.corpus.tokens.folder.held_out[list(more)].any()  # what is validated on teaches nothing


def test_a_text_changes_path(run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = np.arange(len(TEXT) + 1) // 32 % 4  # by characters read, which are the tokens
    monkeypatch.setattr(TokenRouter, "choices", lambda self, tokens: chosen[: len(tokens) + 1])
    monkeypatch.setattr(TokenRouter, "choice", lambda self, tokens: int(chosen[len(tokens)]))
    loaded = dipaco.load(run.directory)
    first = loaded.route(TEXT)
    ids = torch.tensor([list(TEXT.encode())])
    table = {}
    for path in range(4):
        model: Any = AutoModelForCausalLM.from_pretrained(run.directory / f"export/path{path}")
        with torch.no_grad():
            table[path] = model(ids[:, :-1]).logits[0].log_softmax(dim=1).gather(1, ids[0, 1:, None])[:, 0]
    for every in (10, 30):
        path = [chosen[PREFIX + (at - PREFIX) // every * every] if at >= PREFIX + every else first for at in range(89)]
        expected = torch.stack([table[int(path[at])][at - 1] for at in range(1, len(TEXT))])
        assert torch.allclose(loaded.logprobs(TEXT, every=every), expected, atol=1e-5)
    assert not torch.equal(loaded.logprobs(TEXT, every=10), loaded.logprobs(TEXT))


def test_it_goes_on_in_windows(run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []  # what the router had read, and what it chose

    def choice(self: TokenRouter, tokens: Any) -> int:
        asked.append((len(tokens), len(asked) % 2))
        return asked[-1][1]

    monkeypatch.setattr(TokenRouter, "choice", choice)
    loaded = dipaco.load(run.directory)
    plain = loaded.generate(TEXT[:30], tokens=40, seed=3)
    assert set(loaded._models) == {loaded.route(TEXT[:30])}
    assert loaded.generate(TEXT[:30], tokens=40, seed=3, every=1000) == plain and not asked
    text = loaded.generate(TEXT[:30], tokens=40, seed=3, every=10)
    assert [read for read, _ in asked] == [34, 44, 54, 64][: len(asked)] and len(asked) >= 1
    assert text[:34] == plain[:34] and text == dipaco.load(run.directory).generate(
        TEXT[:30], tokens=40, seed=3, every=10
    )
    assert set(loaded._models) <= {loaded.route(TEXT[:30]), 0, 1}
    assert loaded.generate("", tokens=3, every=1) and loaded.logprobs("owl", every=1).shape == (2,)


def test_the_command_reroutes(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["sample", str(run.directory), "--prompt", TEXT, "--tokens", "20", "--reroute-every", "5"]
    assert main(sample) == 0
    assert capsys.readouterr().out == dipaco.load(run.directory).generate(TEXT, tokens=20, every=5) + "\n"


def test_mistakes(run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(run.directory, tmp_path / "run")
    shutil.rmtree(copied / "export" / "token_router")

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        *_, error = capsys.readouterr().err.splitlines()  # before it, what took long
        return error

    assert "every=0: a path is chosen for at least 1 token" in refused("route", str(copied), "--every", "16,0")
    assert "steps=0 of the token router" in refused("route", str(copied), "--steps", "0")
    assert "look_ahead=-1 of the token" in refused("route", str(copied), "--look-ahead", "-1")
    assert "documents=-1 of the token" in refused("route", str(copied), "--documents", "-1")
    assert "is not the directory of a run" in refused("route", str(tmp_path))
    sample = ["sample", str(copied), "--prompt", TEXT, "--reroute-every"]
    assert "has no token router to choose paths within a text: diloco route RUN fits one" in refused(*sample, "5")
    assert "every=0: a path is chosen" in refused(*sample, "0")
    (tmp_path / "file").touch()
    token_router(Finished(copied), documents=2, steps=1)
    assert "cannot be written to" in refused("route", str(copied), "--to", str(tmp_path / "file"), "--every", "99")
    (copied / "export" / "paths.json").unlink()
    assert "has one path, and there is nothing to route" in refused("route", str(copied))
    assert "has no export of several paths: leave out --reroute-every" in refused(*sample, "5")
    shutil.rmtree(copied / "export")
    assert "has no export: give a finished run" in refused("route", str(copied))


def test_runs_without_documents_for_the_router(run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = launch(
        tmp_path / "run", islands=4, rounds=1, inner_steps=1, segment_steps=1, data=planted.data(run.directory.parent),
        workload=RoutedLM(model="micro", prefix_tokens=PREFIX, router_fraction=0), layout=Paths(levels=[4]),
        schedule=PathRounds(),
    )  # fmt: skip
    assert main(["route", str(result.directory), "--documents", "0"]) == 2
    assert "held no documents out for a router: give --documents N" in capsys.readouterr().err
    assert main(["route", str(result.directory), "--documents", "2", "--steps", "1", "--every", "9"]) == 0
