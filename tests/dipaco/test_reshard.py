"""Discriminative re-sharding: what it finds, what stays held out, and runs that cannot score documents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dipaco
from diloco import Result
from diloco.config import load
from diloco.inner import AdamW, RateSchedule
from diloco.layout import Whole
from diloco.merge import Mean, MeanBy
from diloco.schedule import Barrier
from dipaco import dealing
from dipaco.corpus import RoutedCorpus
from dipaco.paths import Paths
from dipaco.reshard import Scorer, reshard
from dipaco.routing import RouterKind, Settings, fit_features
from dipaco.schedule import PathRounds
from dipaco.shards import concentration, loads, purity
from dipaco.workload import RoutedLM
from tests.dipaco import planted
from tests.toy import launch

HELD_OUT = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted.write(folder)
    return folder


def lm(**settings: Any) -> RoutedLM:
    return RoutedLM(**{"model": "micro", "prefix_tokens": 24, "router_fraction": HELD_OUT, **settings})


def after(run: Result | Path, **settings: Any) -> RoutedLM:
    """Documents go to the paths that this run's paths predict best."""
    directory = run if isinstance(run, Path) else run.directory
    return lm(router=RouterKind.discriminative, scorer=str(directory), **settings)


def trained(directory: Path, folder: Path, workload: RoutedLM, **settings: Any) -> Result:
    usual: dict[str, Any] = {
        "islands": 4,
        "rounds": 1,
        "inner_steps": 2,
        "workload": workload,
        "data": planted.data(folder),
        "layout": Paths(levels=[2, 2]),
        "schedule": PathRounds(),
        "merge": Mean(by=MeanBy.examples),
    }
    return launch(directory, **{**usual, **settings})


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trained(tmp_path_factory.mktemp("runs") / "first", folder, lm(overlap=2))


def corpus_of(folder: Path, workload: RoutedLM, *, seed: int = 0, **data: Any) -> RoutedCorpus:
    return workload.for_paths(4).corpus(planted.data(folder, **data), seed=seed, shards=4)


# what it finds


@pytest.mark.parametrize(
    ("target", "better"),
    [([0.25, 0.25, 0.25, 0.25], False), ([0.4, 0.3, 0.2, 0.1], False), ([0.25, 0.25, 0.25, 0.25], True)],
)
def test_paths_that_know_a_domain_get_it_back_with_the_target_loads(
    tmp_path: Path, target: list[float], better: bool
) -> None:
    """Scores as of paths that each know a domain, after random paths: domains are recovered, loads are met."""
    planted.write(tmp_path, documents=500)
    corpus = corpus_of(tmp_path, lm(router=RouterKind.iid))
    source, aside = corpus.tokens.folder, corpus.router_documents
    assert corpus.table is not None
    training = np.flatnonzero(corpus.table.trains[:, 0] >= 0)
    assert purity(corpus.table.path[training], source.domains[training]) < 0.35
    noise = np.random.default_rng(0).normal(size=(len(aside), 4))
    scores = np.where(np.eye(4, dtype=bool)[source.domains[aside]], -1.0, -1.1) + 0.03 * noise
    scores[:, :2] += 1.0 if better else 0.0  # two paths that are better at everything
    features = fit_features(source, corpus.settings)[0]
    wanted = np.array(target)
    made = reshard(source, corpus.settings, features, aside, scores, training=training, target=wanted)
    path = made.paths([source.document(int(index))[:-1] for index in training])
    assert np.abs(loads(path, 4) / wanted - 1).max() <= 0.01
    if target[0] == 0.25:  # what the domains have
        assert purity(path, source.domains[training]) > 0.9
        assert concentration(path, source.domains[training]) > 0.9
        agrees = [(path[source.domains[training] == domain] == domain).mean() for domain in range(4)]
        assert min(agrees) > 0.9  # the path that knows the domain, not another


def test_trained_paths_find_their_domains(folder: Path, tmp_path: Path) -> None:
    """Four models of a domain each, which share nothing: what they score best is their own."""
    knowing = {
        "layout": Paths(levels=[4], private=["."]),
        "rounds": 6,
        "inner_steps": 10,
        "inner": AdamW(lr=3e-3, rate=RateSchedule.constant, warmup_steps=5),
    }
    run = trained(tmp_path / "knowing", folder, lm(router=RouterKind.domains), **knowing)
    corpus = corpus_of(folder, after(run))
    source, aside = corpus.tokens.folder, corpus.router_documents
    before = corpus_of(folder, lm(router=RouterKind.domains))
    documents, scores = Scorer.open(run.directory).scores(source, aside, tokens=0)
    assert (scores.argmax(axis=1) == before.paths_of(documents)).mean() > 0.9
    assert corpus.table is not None
    training = np.flatnonzero(corpus.table.trains[:, 0] >= 0)
    assert (corpus.paths_of(training) == before.paths_of(training)).mean() > 0.8
    shares = loads(corpus.table.trains[training], 4)
    assert shares == pytest.approx(Scorer.open(run.directory).loads(), abs=0.01 + 1 / len(training))


def test_scores_are_of_the_exported_paths_on_whole_documents(first: Result, folder: Path) -> None:
    corpus = corpus_of(folder, lm(overlap=2))
    chosen = corpus.router_documents[:2]
    documents, scores = Scorer.open(first.directory).scores(corpus.tokens.folder, chosen, tokens=0)
    assert documents.tolist() == chosen.tolist() and scores.shape == (2, 4)
    for path in range(4):
        model: Any = AutoModelForCausalLM.from_pretrained(first.directory / "export" / f"path{path}")
        for row, document in enumerate(documents):
            tokens = torch.from_numpy(corpus.tokens.folder.document(int(document)).astype(np.int64))
            total = 0.0
            for start in range(0, len(tokens) - 1, 32):
                piece = tokens[start : start + 33]
                with torch.no_grad():
                    nats = model(input_ids=piece[None, :-1]).logits[0].double().log_softmax(dim=1)
                total += sum(nats[i - 1, piece[i]].item() for i in range(1, len(piece)) if start + i >= 24)
            assert scores[row, path] == pytest.approx(total / (len(tokens) - 24), rel=1e-5)
    scorer = Scorer.open(first.directory)
    few = scorer.scores(corpus.tokens.folder, chosen, tokens=33)[1]  # two pieces of each
    assert (few != scores).all()
    assert np.array_equal(few, scorer.scores(corpus.tokens.folder, chosen, tokens=64)[1])
    assert np.array_equal(scores, scorer.scores(corpus.tokens.folder, chosen, tokens=10_000)[1])


# two alternations


def test_what_scores_paths_is_never_trained_on(first: Result, folder: Path, tmp_path: Path) -> None:
    """Two alternations, with another seed each."""
    second = trained(tmp_path / "second", folder, after(first, overlap=2), init_from=str(first.directory), seed=1)
    third = trained(tmp_path / "third", folder, after(second), init_from=str(second.directory), seed=2)
    held, corpora = [], []
    for run in (first, second, third):
        config = load(run.directory / "config.yaml")
        assert isinstance(config.workload, RoutedLM)
        corpus = config.workload.corpus(config.data, seed=config.seed, shards=4)
        assert corpus.sha256 == run.summary["data_sha256"]
        held.append(corpus.router_documents.tolist())
        corpora.append(corpus)
        never = set(held[0]) | set(np.flatnonzero(corpus.tokens.folder.held_out).tolist())
        assert not never & set(np.concatenate(corpus.tokens.assignment).tolist())
    documents = int((~corpora[0].tokens.folder.held_out).sum())
    assert held[0] == held[1] == held[2] and len(held[0]) == round(HELD_OUT * documents)
    shares = [Scorer.open(run.directory).loads() for run in (first, second, third)]
    assert shares[0].sum() == pytest.approx(1)
    assert np.bincount(corpora[1].table.path, minlength=4).min() > 0  # type: ignore[union-attr]
    for run in (second, third):  # what a user does with it
        loaded = dipaco.load(run.directory)
        assert loaded.route("owl heron jay the crow and finch of wren robin") in range(4)
        assert run.summary["data"]["routing"]["router"] == "discriminative"
        assert any("38 router documents for 4 paths are fewer than 10 each" in note for note in run.summary["notes"])
    features = [(run.directory / "export/router/features.npz").read_bytes() for run in (first, second, third)]
    assert features[0] == features[1] == features[2]


def test_it_is_made_once_and_again_where_the_export_is_another(
    first: Result, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first.directory, run)
    made = corpus_of(folder, after(run))

    def never(*_: object) -> None:
        raise AssertionError("it was made before")

    monkeypatch.setattr(dealing, "_make", never)
    assert corpus_of(folder, after(run)).sha256 == made.sha256
    weights = run / "export" / "path2" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(AssertionError, match="made before"):
        corpus_of(folder, after(run))


def test_the_newest_run_is_known_by_its_own_name(first: Result, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(first.directory)
    assert after(tmp_path / "latest").scorer == str(first.directory.resolve())


def test_after_true_domains_features_are_new_and_shards_are_limited(folder: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "domains", folder, lm(router=RouterKind.domains))
    corpus = corpus_of(folder, after(run, balance=1.5))
    assert corpus.table is not None and corpus.table.routing is not None
    sizes = np.array(corpus.describe()["shard_tokens"])
    assert sizes.max() <= 1.5 * sizes.mean()


# runs that cannot score


def refused(folder: Path, workload: RoutedLM, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        corpus_of(folder, workload, **settings)


def test_what_is_no_finished_run_of_paths(first: Result, folder: Path, tmp_path: Path) -> None:
    refused(folder, after(tmp_path / "none"), "is not the directory of a run: it has no config.yaml")
    (tmp_path / "sweep.csv").write_text("")
    refused(folder, after(tmp_path), "is several runs: give the directory of one of them")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(first.directory / "config.yaml", broken)
    refused(folder, after(broken), "has no export of several paths: give a run with layout=paths that finished")
    one = trained(tmp_path / "one", folder, lm(paths=4, router=RouterKind.iid), layout=Whole(), schedule=Barrier())
    refused(folder, after(one), "has no export of several paths")


def test_runs_of_other_paths_or_data(first: Result, folder: Path, tmp_path: Path) -> None:
    eight = after(first).for_paths(8)
    with pytest.raises(ValueError, match="has 4 paths, and this run 8: use a layout with 4 paths"):
        eight.corpus(planted.data(folder), seed=0, shards=8)
    refused(folder, after(first), r"other tokens \(validation_fraction=0.3 was 0.2\)", validation_fraction=0.3)
    larger = after(first, model="tiny")
    refused(folder, larger, r"other tokens \(tokenizer=bpe was bytes", tokenizer="bpe", vocab_size=300)
    planted.write(tmp_path, words=41)
    refused(tmp_path, after(first), r"other tokens \(of other documents\): use the data\.\* of that run")
    refused(folder, after(first, router_fraction=0.3), "workload.router_fraction=0.3, and 0.2 in workload.scorer=")
    refused(folder, after(first, prefix_tokens=16), "workload.prefix_tokens=16, and 24 in workload.scorer=")
    base = str(first.directory / "export/path0")
    refused(folder, after(first, base=base), "the features are those of workload.scorer=.*: leave workload.base out")


def test_too_few_to_tell_paths_apart(folder: Path, tmp_path: Path) -> None:
    few = trained(tmp_path / "few", folder, lm(router_fraction=0.01))
    refused(folder, after(few, router_fraction=0.01), "2 router documents with more than 24 tokens cannot tell 4 paths")


def test_the_settings_of_a_routing_name_the_scorer() -> None:
    usual = {"router": RouterKind.kmeans, "paths": 4, "base": "", "prefix_tokens": 1, "document_tokens": 0}
    more: dict[str, Any] = {
        "overlap": 1,
        "balance": 0.0,
        "router_fraction": 0.1,
        "stop_fraction": 0.0,
        "router_file": "",
    }
    found = [Settings(**usual, **more, seed=0, scorer=scorer).fingerprint() for scorer in ("", "/a", "/b")]  # type: ignore[arg-type]
    assert found[0] != found[1] != found[2]
