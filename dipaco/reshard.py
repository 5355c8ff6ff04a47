"""Discriminative re-sharding: a new router from how well each path does on held-out documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dipaco.corpus import RoutedCorpus
from dipaco.router import LinearRouter
from dipaco.routing import FIT_DOCUMENTS, Routing, fit_features, texts
from dipaco.saved import Doubles


def reshard(corpus: RoutedCorpus, scores: Doubles, folder: Path, *, target: Doubles | None = None) -> Routing:
    """Fit a router to the best path of each router document, and save it for `workload.router=file`.

    `scores`: float64[router documents, paths], `document_scores` of `corpus.router_documents` under every path.
    `target`: the share of the training documents that each path shall get; by default as many as there are
    router documents which it scores best. One alternation of arXiv:2403.10616, section 2.4.2; for the next,
    train with the new router and score again. Raises ValueError for scores of another shape, or that are
    not finite, or fewer router documents than paths.
    """
    paths, documents = corpus.settings.paths, corpus.router_documents
    if paths < 2:
        raise ValueError("workload.paths=1: there is nothing to route")
    if len(documents) < paths:
        raise ValueError(
            f"{len(documents)} router documents for {paths} paths: raise "
            f"workload.router_fraction={corpus.settings.router_fraction}, or give more data"
        )
    if scores.shape != (len(documents), paths) or not np.isfinite(scores).all():
        raise ValueError(
            f"scores of shape {scores.shape}: give a finite log-likelihood for each of {len(documents)} router "
            f"documents under each of {paths} paths"
        )
    table, tokens = corpus.table, corpus.settings.prefix_tokens
    assert table is not None
    source = corpus.tokens.folder
    features = table.routing.features if table.routing is not None else fit_features(source, corpus.settings)[0]
    training = np.flatnonzero(table.trains[:, 0] >= 0)
    chosen = np.random.default_rng(corpus.settings.seed).permutation(training)[:FIT_DOCUMENTS]
    router = LinearRouter.fit(
        features.vectors(texts(source, documents), tokens=tokens),
        scores.argmax(axis=1),
        paths=paths,
        match=features.vectors(texts(source, chosen), tokens=tokens),
        target=target,
    )
    routing = Routing(features, router, prefix_tokens=tokens)
    routing.save(folder)
    return routing
