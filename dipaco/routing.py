"""Which path each document of a corpus belongs to: decided once, and kept beside the prepared corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

from diloco.data import make_once
from diloco.tokens import TokenFolder
from dipaco import features as feature_files
from dipaco import router as router_files
from dipaco import saved
from dipaco.features import Document, Features, HiddenFeatures, TextFeatures, check_base
from dipaco.router import KMeansRouter, LinearRouter, ProductRouter, Router, check_enough
from dipaco.saved import Floats, Integers
from dipaco.shards import balanced, deal_replicas, overlapping

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

FIT_DOCUMENTS = 20_000  # at most so many, at random, fit features and router
READ_DOCUMENTS = 5_000  # instead, where a base model reads them: on a CPU that takes minutes
AT_ONCE = 8_192  # documents whose features are computed together
FORMAT = 2  # of cached routings


class RouterKind(Enum):
    """How documents come to paths."""

    kmeans = "kmeans"
    product = "product"  # product k-means, for a square number of paths
    file = "file"  # a router that was saved: workload.router_file
    domains = "domains"  # by the true domains, whole ones: what a perfect router would do
    iid = "iid"  # at random: what no router would do


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a routing depends on besides the corpus; the fields of RoutedLM with the same names explain them."""

    router: RouterKind
    paths: int
    base: str
    prefix_tokens: int
    document_tokens: int
    overlap: int
    balance: float
    router_fraction: float
    stop_fraction: float
    router_file: str
    seed: int

    def fingerprint(self) -> dict[str, object]:
        """JSON values that change when the routing would."""
        folders = [Path(folder) for folder in (self.base, self.router_file) if folder]
        files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())
        return {
            **asdict(self),
            "router": self.router.value,
            "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "formats": [FORMAT, feature_files.FORMAT, router_files.FORMAT],
            "scikit-learn": metadata.version("scikit-learn"),
        }


@final
class Routing:
    """Features and a router that fit each other: documents -> paths."""

    def __init__(self, features: Features, router: Router, *, prefix_tokens: int) -> None:
        """`prefix_tokens`: how much of a document it looks at."""
        self.features, self.router, self.prefix_tokens = features, router, prefix_tokens

    def scores(self, documents: Sequence[Document]) -> Floats:
        """float32[documents, paths]; higher is better. `documents` are token ids without end-of-text."""
        found = [
            self.router.scores(self.features.vectors(documents[first : first + AT_ONCE], tokens=self.prefix_tokens))
            for first in range(0, len(documents), AT_ONCE)
        ]
        return np.concatenate(found) if found else np.zeros((0, self.router.paths), dtype=np.float32)

    def paths(self, documents: Sequence[Document]) -> Integers:
        """int64[documents]: the path of each."""
        return router_files.best(self.scores(documents), 1)[:, 0]

    def save(self, folder: Path) -> None:
        """Write everything into `folder`, for `load` and for workload.router_file."""
        self.features.save(folder)
        self.router.save(folder)
        saved.write(folder, "routing", {}, {"prefix_tokens": self.prefix_tokens})

    @classmethod
    def load(cls, folder: Path) -> Routing:
        """What `save` wrote. Raises ValueError where it is not there, damaged, or its parts do not fit."""
        _, meta = saved.read(folder, "routing")
        routing = cls(feature_files.load(folder), router_files.load(folder), prefix_tokens=meta["prefix_tokens"])
        routing.router.scores(np.zeros((1, routing.features.width), dtype=np.float32))  # raises if they do not fit
        return routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The paths of a corpus's documents, and which of them train whom."""

    path: Integers  # int64[documents]: where each is evaluated
    trains: Integers  # int64[documents, overlap]: the paths that train on it; -1 for those held out
    for_router: Array  # bool[documents]: held out of training to score paths with
    for_stop: Array  # bool[documents]: held out of training to tell each path's best round
    routing: Routing | None  # none for the true domains and at random
    sha256: str


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


def fit_features(folder: TokenFolder, settings: Settings) -> tuple[Features, list[Document]]:
    """Features fitted on training documents, and those documents."""
    training = np.flatnonzero(~folder.held_out)
    check_enough(len(training), settings.paths)
    random = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(3,)))
    chosen = np.sort(random.permutation(training)[: READ_DOCUMENTS if settings.base else FIT_DOCUMENTS])
    documents = texts(folder, chosen)
    tokens = max(settings.prefix_tokens, settings.document_tokens)
    if settings.base:
        check_base(settings.base, folder.tokenizer)
        return HiddenFeatures.fit(documents, tokens=tokens, base=settings.base), documents
    vocabulary = int(folder.meta["vocab_size"])
    return TextFeatures.fit(documents, tokens=tokens, vocabulary=vocabulary, seed=settings.seed), documents


def texts(folder: TokenFolder, documents: Array) -> list[Document]:
    """The token ids of documents, without end-of-text."""
    return [folder.document(int(index))[:-1] for index in documents]


def _make(folder: TokenFolder, settings: Settings, made: Path) -> None:
    documents = len(folder.held_out)
    random = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(2,)))
    training = random.permutation(np.flatnonzero(~folder.held_out))
    asides = [round(share * len(training)) for share in (settings.router_fraction, settings.stop_fraction)]
    to_router, to_stop, training = np.split(training, np.cumsum(asides))
    for_router, for_stop = (np.isin(np.arange(documents), aside) for aside in (to_router, to_stop))
    training = np.sort(training)
    check_enough(len(training), settings.paths)
    trains = np.full((documents, settings.overlap), -1, dtype=np.int64)
    if settings.router in (RouterKind.domains, RouterKind.iid):
        path = _given(folder, settings)
        trains[training, 0] = path[training]
    else:
        routing = _routing(folder, settings)
        scores = routing.scores(texts(folder, np.arange(documents)))
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


def _routing(folder: TokenFolder, settings: Settings) -> Routing:
    """A router from a file, or fitted on this corpus."""
    if settings.router is RouterKind.file:
        routing = Routing.load(Path(settings.router_file))
        for name, own, wanted in (
            ("paths", routing.router.paths, settings.paths),
            ("prefix_tokens", routing.prefix_tokens, settings.prefix_tokens),
        ):
            if own != wanted:
                raise ValueError(
                    f"workload.router_file={settings.router_file} was fitted with {name}={own}, and "
                    f"workload.{name}={wanted}: set workload.{name}={own}, or give another router"
                )
        return routing
    features, documents = fit_features(folder, settings)
    kind = KMeansRouter if settings.router is RouterKind.kmeans else ProductRouter
    prefixes = features.vectors(documents, tokens=settings.prefix_tokens)
    if settings.document_tokens <= settings.prefix_tokens:
        router: Router = kind.fit(prefixes, paths=settings.paths, seed=settings.seed)
    else:  # clusters of whole documents are purer than those of prefixes, and a prefix tells which it is
        whole = features.vectors(documents, tokens=settings.document_tokens)
        labels = kind.fit(whole, paths=settings.paths, seed=settings.seed).assign(whole)[:, 0]
        router = LinearRouter.fit(prefixes, labels, paths=settings.paths, match=prefixes)
    return Routing(features, router, prefix_tokens=settings.prefix_tokens)


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
