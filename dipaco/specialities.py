"""What each path reads: the domains that it specialises in, and documents that are typical of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from diloco import pretrained
from diloco.tokens import TokenFolder
from dipaco.features import HiddenFeatures
from dipaco.routing import Table, texts
from dipaco.saved import Integers

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

DOMAINS = 3  # of each path, the commonest
TYPICAL = 2  # documents of each path
EXCERPT = 200  # characters of each, from as many tokens
SAMPLE = 2_048  # documents that are scored to find the typical ones
READ_SAMPLE = 256  # instead, where a base model reads them


def specialities(
    folder: TokenFolder, table: Table, own: Sequence[Array], *, seed: int, trust_remote_code: bool
) -> list[dict[str, object]]:
    """JSON values for each path, `own` being the documents that it trains on: int64[documents of the path].

    `domains`: name, documents, `share` of the path's documents, and `of_domain`: of the domain's training documents,
    the share that this path has. `typical`: domain and text.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = pretrained.load(AutoTokenizer, folder.tokenizer, trust_remote_code=trust_remote_code)
    found: list[dict[str, object]] = []
    for path, documents in enumerate(typical(folder, table, own, seed=seed)):
        shown = [
            {
                "domain": folder.meta["domains"][folder.domains[index]],
                "text": _excerpt(tokenizer, folder.document(index)[:-1]),
            }
            for index in documents.tolist()
        ]
        found.append({"domains": _domains(folder, table, own[path]), "typical": shown})
    return found


def typical(folder: TokenFolder, table: Table, own: Sequence[Array], *, seed: int) -> list[Integers]:
    """Of each path at most TYPICAL training documents, int64[documents], the most typical first.

    Of a sample of those that the router sends to the path, the ones whose best score is the furthest above the second.
    Without a router: the first ones of the path's largest domain.
    """
    if table.routing is None:
        return [_of_largest_domain(folder, documents) for documents in own]
    most = READ_SAMPLE if isinstance(table.routing.features, HiddenFeatures) else SAMPLE
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5,)))
    sent = [documents[table.path[documents] == path] for path, documents in enumerate(own)]
    each = max(TYPICAL, most // len(own))
    sample = [np.sort(random.permutation(documents)[:each]) for documents in sent]
    scores = table.routing.scores(texts(folder, np.concatenate(sample)))  # float32[documents, paths]
    ordered = np.sort(scores, axis=1)
    margins = np.split(ordered[:, -1] - ordered[:, -2], np.cumsum([len(part) for part in sample])[:-1])
    return [
        part[np.argsort(-margin, kind="stable")[:TYPICAL]].astype(np.int64)
        for part, margin in zip(sample, margins, strict=True)
    ]


def _of_largest_domain(folder: TokenFolder, documents: Array) -> Integers:
    domains = folder.domains[documents]
    return np.asarray(documents[domains == np.bincount(domains).argmax()][:TYPICAL], dtype=np.int64)


def _domains(folder: TokenFolder, table: Table, documents: Array) -> list[dict[str, object]]:
    names = folder.meta["domains"]
    counts = np.bincount(folder.domains[documents], minlength=len(names))
    trained = np.flatnonzero(table.trains[:, 0] >= 0)
    totals = np.bincount(folder.domains[trained], minlength=len(names))
    return [
        {
            "name": names[domain],
            "documents": int(counts[domain]),
            "share": round(float(counts[domain] / len(documents)), 4),
            "of_domain": round(float(counts[domain] / totals[domain]), 4),
        }
        for domain in np.argsort(-counts, kind="stable")[:DOMAINS].tolist()
        if counts[domain]
    ]


def _excerpt(tokenizer: Any, tokens: Array) -> str:
    """How a document begins, in one line."""
    text = str(tokenizer.decode(tokens[:EXCERPT].tolist()))
    return " ".join(text.split())[:EXCERPT]
