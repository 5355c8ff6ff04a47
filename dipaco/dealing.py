"""Which path each document of a corpus belongs to: decided once, and kept beside the prepared corpus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from diloco.data import make_once
from diloco.tokens import TokenFolder
from dipaco import router as router_files
from dipaco.reshard import discriminative
from dipaco.router import check_enough
from dipaco.routing import RouterKind, Routing, Settings, Table, fit_routing, texts
from dipaco.saved import Integers
from dipaco.shards import balanced, deal_replicas, overlapping


def routed(folder: TokenFolder, settings: Settings) -> Table:
    """The routing of a corpus: from the cache, or made and put there. Several processes may call it at once."""
    key = json.dumps([folder.meta["sha256"], settings.fingerprint()], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:20]
    final = folder.folder.parents[1] / "routings" / name
    make_once(final, lambda made: _make(folder, settings, made))
    table = {key: np.load(final / f"{key}.npy") for key in ("path", "trains", "for_router", "for_stop")}
    digest = hashlib.sha256(b"".join(table[key].tobytes() for key in sorted(table))).hexdigest()
    routing = Routing.load(final) if (final / "routing.json").exists() else None
    return Table(**table, routing=routing, sha256=digest)


def _aside(folder: TokenFolder, *fractions: float) -> list[Integers]:
    """int64[documents] for each fraction of the training documents: held out of training, none of them twice.

    A function of corpus and fractions alone, whatever the seed: runs that build on each other hold out the same.
    """
    training = np.flatnonzero(~folder.held_out)
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(2,))).permutation(training)
    return np.split(order, np.cumsum([round(fraction * len(training)) for fraction in fractions]))[: len(fractions)]


def _make(folder: TokenFolder, settings: Settings, made: Path) -> None:
    documents = np.arange(len(folder.held_out))
    aside = _aside(folder, settings.router_fraction, settings.stop_fraction)
    for_router, for_stop = (np.isin(documents, part) for part in aside)
    training = np.flatnonzero(~folder.held_out & ~for_router & ~for_stop)
    check_enough(len(training), settings.paths)
    trains = np.full((len(documents), settings.overlap), -1, dtype=np.int64)
    if settings.router in (RouterKind.domains, RouterKind.iid):
        path = _given(folder, settings)
        trains[training, 0] = path[training]
    else:
        if settings.router is RouterKind.discriminative:
            routing = discriminative(folder, settings, aside=np.flatnonzero(for_router), training=training)
        else:
            routing = fit_routing(folder, settings)
        scores = routing.scores(texts(folder, documents))
        path = router_files.best(scores, 1)[:, 0]
        if settings.balance:
            sizes = np.diff(folder.offsets)[training]
            trains[training] = balanced(scores[training], slack=settings.balance, overlap=settings.overlap, sizes=sizes)
        else:
            trains[training] = overlapping(scores[training], settings.overlap)
        routing.save(made)
    table = {"path": path, "trains": trains, "for_router": for_router, "for_stop": for_stop}
    for name, values in table.items():
        np.save(made / f"{name}.npy", values)


def _given(folder: TokenFolder, settings: Settings) -> Integers:
    """int64[documents]: paths by true domains, the largest first to the smallest path; or at random, evenly."""
    documents, sizes = len(folder.held_out), np.diff(folder.offsets)
    path = np.zeros(documents, dtype=np.int64)
    if settings.router is RouterKind.iid:
        random = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(4,)))
        for part in (np.flatnonzero(~folder.held_out), np.flatnonzero(folder.held_out)):
            # One path with so many replicas is this dealing: evenly by tokens.
            dealt = deal_replicas([random.permutation(part)], sizes, settings.paths)
            for index, own in enumerate(dealt):
                path[own] = index
        return path
    totals = np.bincount(folder.domains, np.where(folder.held_out, 0, sizes), minlength=len(folder.meta["domains"]))
    if np.count_nonzero(totals) < settings.paths:
        raise ValueError(
            f"{np.count_nonzero(totals)} domains in the training documents cannot fill {settings.paths} paths: use "
            "fewer paths, set data.domain_field, or workload.router=kmeans"
        )
    tokens, owner = np.zeros(settings.paths), np.zeros(len(totals), dtype=np.int64)
    for domain in np.argsort(-totals, kind="stable"):
        owner[domain] = tokens.argmin()
        tokens[owner[domain]] += totals[domain]
    return owner[folder.domains]
