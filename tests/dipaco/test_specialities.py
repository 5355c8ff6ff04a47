"""What is said of each path: its domains by counting, its typical documents by the router's own scores."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipaco import specialities
from dipaco.corpus import RoutedCorpus
from dipaco.routing import RouterKind, texts
from dipaco.workload import RoutedLM
from tests.dipaco import planted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted.write(folder)
    return folder


def corpus_of(folder: Path, **settings: Any) -> RoutedCorpus:
    given: dict[str, Any] = {"model": "micro", "paths": 4, "prefix_tokens": 24, "router_fraction": 0.1}
    return RoutedLM(**{**given, **settings}).corpus(planted.data(folder), seed=0, shards=4)


def told(corpus: RoutedCorpus) -> dict[str, Any]:
    return dict(json.loads(json.dumps(corpus.describe()))["routing"])


@pytest.mark.parametrize(("balance", "overlap"), [(0.0, 1), (1.1, 2)])
def test_domains_are_counted(folder: Path, balance: float, overlap: int) -> None:
    corpus = corpus_of(folder, balance=balance, overlap=overlap)
    found, names = told(corpus), corpus.tokens.folder.meta["domains"]
    trained = {int(document) for own in corpus.tokens.assignment for document in own}
    totals = Counter(names[corpus.tokens.folder.domains[document]] for document in trained)
    assert found["training"]["documents"] == [len(own) for own in corpus.tokens.assignment]
    for by_path, own in zip(found["by_path"], corpus.tokens.assignment, strict=True):
        counts = Counter(names[corpus.tokens.folder.domains[document]] for document in own)
        assert [domain["documents"] for domain in by_path["domains"]] == sorted(counts.values(), reverse=True)[:3]
        for domain in by_path["domains"]:
            assert domain["documents"] == counts[domain["name"]]
            assert domain["share"] == pytest.approx(counts[domain["name"]] / len(own), abs=1e-4)
            assert domain["of_domain"] == pytest.approx(counts[domain["name"]] / totals[domain["name"]], abs=1e-4)


def test_what_a_path_trains_on_is_its_load(folder: Path) -> None:
    """Also where balance moves documents to other paths than the router's."""
    corpus = corpus_of(folder, balance=1.01)
    sizes = np.diff(corpus.tokens.folder.offsets)
    tokens = np.array([sizes[own].sum() for own in corpus.tokens.assignment])
    assert told(corpus)["training"]["load"] == pytest.approx(list(tokens / tokens.sum()), abs=1e-4)


def test_typical_documents_are_those_with_the_largest_margin(folder: Path) -> None:
    corpus = corpus_of(folder)
    assert corpus.table is not None and corpus.table.routing is not None
    whole = corpus.tokens.folder
    scores = corpus.table.routing.scores(texts(whole, np.arange(len(whole.held_out))))
    margins = {}
    for document, row in enumerate(scores):
        first, second, *_ = sorted(row.tolist(), reverse=True)
        margins[document] = first - second
    rows = [json.loads(line) for line in (folder / "planted.jsonl").read_text().splitlines()]
    domain_of = {" ".join(row["text"].split())[:200]: row["domain"] for row in rows}
    found = specialities.typical(whole, corpus.table, corpus.tokens.assignment, seed=0)
    for path, (documents, by_path) in enumerate(zip(found, told(corpus)["by_path"], strict=True)):
        own = corpus.tokens.assignment[path].tolist()
        assert documents.tolist() == sorted(own, key=margins.__getitem__, reverse=True)[:2]
        assert len(by_path["typical"]) == 2
        for shown in by_path["typical"]:
            assert domain_of[shown["text"]] == shown["domain"]  # how a document of this domain begins


def test_only_a_sample_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(folder)
    monkeypatch.setattr(specialities, "SAMPLE", 20)
    monkeypatch.setattr(specialities, "texts", lambda of, documents: scored.extend(documents) or texts(of, documents))
    scored: list[int] = []
    assert corpus.table is not None
    found = specialities.typical(corpus.tokens.folder, corpus.table, corpus.tokens.assignment, seed=0)
    assert len(scored) == 20 and all({*documents.tolist()} <= {*scored} for documents in found)
    assert all(len(documents) == 2 for documents in found)


@pytest.mark.parametrize("router", [RouterKind.domains, RouterKind.iid])
def test_without_a_router_they_are_of_the_largest_domain(folder: Path, router: RouterKind) -> None:
    for by_path in told(corpus_of(folder, router=router))["by_path"]:
        assert [shown["domain"] for shown in by_path["typical"]] == [by_path["domains"][0]["name"]] * 2
        assert by_path["domains"][0]["of_domain"] == 1 or router is RouterKind.iid


def test_one_path_has_none(folder: Path) -> None:
    corpus = RoutedLM(model="micro", paths=1).corpus(planted.data(folder), seed=0, shards=2)
    assert "routing" not in corpus.describe()
