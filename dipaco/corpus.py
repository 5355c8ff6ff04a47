"""The prepared corpus of a routed run: each path's own documents, and held-out ones by path."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np

from diloco.data import TokenCorpus
from dipaco import shards as sharding
from dipaco.dealing import routed
from dipaco.documents import Pieces
from dipaco.routing import RouterKind, Settings, Table
from dipaco.saved import Integers
from dipaco.specialities import specialities


@final
class RoutedCorpus:
    """A TokenCorpus whose shards are given by a router, and the paths of its documents."""

    def __init__(
        self, whole: TokenCorpus, settings: Settings, *, shards: int, parameters: int, trust_remote_code: bool = False
    ) -> None:
        """Route the documents of `whole` (once; then from the cache). Source s reads path s % paths.

        `parameters`: of one path's model, for a warning; 0 = unknown. `trust_remote_code`: of the tokenizer. Raises
        ValueError where a shard is empty, smaller than a sequence, the paths do not divide `shards`, or validation
        documents are all prefix.
        """
        self.settings = settings
        self.warnings: list[str] = []  # what is doubtful about the shards, and what to do
        self.table: Table | None = None  # none with one path, which all documents belong to
        self.tokens = whole  # what the sources read
        self._trust_remote_code = trust_remote_code
        self._own: list[Integers] = []  # by path: the documents that it trains on
        sharding.check_divides(settings.paths, shards)
        folder, length = whole.folder, whole.data.sequence_length
        sizes = np.diff(folder.offsets)
        prefixes = sharding.check_prefixes(sizes[folder.held_out], prefix_tokens=settings.prefix_tokens)
        if settings.paths == 1:
            self.warnings = prefixes
            return
        self.table = routed(folder, settings)
        trains = self.table.trains
        self._own = [np.flatnonzero((trains == path).any(axis=1)) for path in range(settings.paths)]
        tokens = [int(sizes[documents].sum()) for documents in self._own]
        self.warnings = prefixes + sharding.check_shards(tokens, needed=length + 1, balance=settings.balance)
        self.warnings += sharding.few_tokens(tokens, parameters=parameters)
        if settings.router is RouterKind.discriminative:
            self.warnings += sharding.few_for_router(len(self.router_documents), settings.paths)
        assignment = sharding.deal_replicas(self._own, sizes, shards)
        _ = self.stop_pieces  # raises where a path has none
        self.tokens = TokenCorpus(whole.data, seed=settings.seed, shards=shards, assignment=assignment)

    @property
    def sha256(self) -> str:
        """Digest of all that is trained and evaluated on, and of the paths that documents belong to."""
        if self.table is None:
            return self.tokens.sha256
        return hashlib.sha256(f"{self.tokens.sha256} {self.table.sha256}".encode()).hexdigest()

    @property
    def tokenizer_folder(self) -> Path:
        """What AutoTokenizer.from_pretrained loads."""
        return self.tokens.tokenizer_folder

    @property
    def vocab_size(self) -> int:
        """All token ids are below it."""
        return self.tokens.vocab_size

    def shard_examples(self) -> list[int]:
        """How many sequences an epoch of each shard has, by shard id."""
        return self.tokens.shard_examples()

    def prompt(self) -> str:
        """How the first validation document begins."""
        return self.tokens.prompt()

    def paths_of(self, documents: Integers) -> Integers:
        """int64[documents]: the path that evaluates each."""
        if self.table is None:
            return np.zeros(len(documents), dtype=np.int64)
        return self.table.path[documents]

    @cached_property
    def router_documents(self) -> Integers:
        """int64[documents]: training documents held out to score paths with, none with one path."""
        return np.flatnonzero(self.table.for_router) if self.table is not None else np.empty(0, dtype=np.int64)

    @cached_property
    def validation(self) -> Pieces:
        """At most data.eval_sequences pieces of validation documents: the same for every number of paths."""
        pieces = self.pieces(np.flatnonzero(self.tokens.folder.held_out))
        pieces.thin(self.tokens.data.eval_sequences)
        return pieces

    @cached_property
    def stop_pieces(self) -> list[Pieces]:
        """For early stopping: of each path, at most data.eval_sequences pieces that it does not train on.

        Raises ValueError where a path has none.
        """
        if self.table is None or not self.settings.stop_fraction:
            return []
        found = []
        for path in range(self.settings.paths):
            pieces = self.pieces(np.flatnonzero(self.table.for_stop & (self.table.path == path)))
            if len(pieces) == 0:
                raise ValueError(
                    f"workload.stop_fraction={self.settings.stop_fraction}, {int(self.table.for_stop.sum())} documents,"
                    f" leaves path {path} no document to stop early by: raise it, or give more data"
                )
            pieces.thin(self.tokens.data.eval_sequences)
            found.append(pieces)
        return found

    def pieces(self, documents: Integers) -> Pieces:
        """Documents cut into sequences, their prefixes not counted."""
        length = self.tokens.data.sequence_length
        return Pieces(self.tokens.folder, documents, length=length, prefix=self.settings.prefix_tokens)

    def describe(self) -> dict[str, object]:
        """JSON values for the run's record: those of the tokens, and what the router sends where.

        `training` and `validation` have documents and loads (shares of the tokens) by path, purity and concentration
        of the router; in training a document counts for each path that trains on it. `by_path`: see `specialities`.
        """
        found = self.tokens.describe()
        if self.table is None:
            return found
        folder = self.tokens.folder
        training, validation = np.flatnonzero(self.table.trains[:, 0] >= 0), np.flatnonzero(folder.held_out)
        routing = {
            "router": self.settings.router.value,
            "warnings": self.warnings,
            "training": self._described(training, self.table.trains[training]),
            "validation": self._described(validation, self.table.path[validation]),
            "by_path": self._specialities,
        }
        return {**found, "split": "routed", "router_documents": len(self.router_documents), "routing": routing}

    def _described(self, documents: Integers, assignment: Integers) -> dict[str, object]:
        """`assignment`: int64[documents(, n)]."""
        assert self.table is not None
        folder, paths = self.tokens.folder, self.settings.paths
        path, domains = self.table.path[documents], folder.domains[documents]
        loads = sharding.loads(assignment, paths, np.diff(folder.offsets)[documents])
        return {
            "documents": np.bincount(assignment.ravel(), minlength=paths).tolist(),
            "load": loads.round(4).tolist(),
            "purity": round(sharding.purity(path, domains), 4),
            "concentration": round(sharding.concentration(path, domains), 4),
        }

    @cached_property
    def _specialities(self) -> list[dict[str, object]]:
        assert self.table is not None
        return specialities(
            self.tokens.folder,
            self.table,
            self._own,
            seed=self.settings.seed,
            trust_remote_code=self._trust_remote_code,
        )
