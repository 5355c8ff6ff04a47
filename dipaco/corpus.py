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


@final
class RoutedCorpus:
    """A TokenCorpus whose shards are given by a router, and the paths of its documents."""

    def __init__(self, whole: TokenCorpus, settings: Settings, *, shards: int, parameters: int) -> None:
        """Route the documents of `whole` (once; then from the cache). Source s reads path s % paths.

        `parameters`: of one path's model, for a warning; 0 = unknown. Raises ValueError where a shard is empty,
        smaller than a sequence, or the paths do not divide `shards`.
        """
        self.settings = settings
        self.warnings: list[str] = []  # what is doubtful about the shards, and what to do
        self.table: Table | None = None  # none with one path, which all documents belong to
        self.tokens = whole  # what the sources read
        self._whole = whole
        sharding.check_divides(settings.paths, shards)
        if settings.paths == 1:
            return
        folder, length = whole.folder, whole.data.sequence_length
        self.table = routed(folder, settings)
        sizes = np.diff(folder.offsets)
        own = [np.flatnonzero((self.table.trains == path).any(axis=1)) for path in range(settings.paths)]
        tokens = [int(sizes[documents].sum()) for documents in own]
        self.warnings = sharding.check_shards(tokens, needed=length + 1)
        self.warnings += sharding.few_tokens(tokens, parameters=parameters)
        if settings.router is RouterKind.discriminative:
            self.warnings += sharding.few_for_router(len(self.router_documents), settings.paths)
        assignment = sharding.deal_replicas(own, sizes, shards)
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
        if len(pieces) == 0:
            raise ValueError(
                f"no validation document has more than workload.prefix_tokens={self.settings.prefix_tokens} tokens, "
                "which are not evaluated: use a shorter prefix, longer documents, or a larger data.validation_fraction"
            )
        pieces.thin(self.tokens.data.eval_sequences)
        return pieces

    def pieces(self, documents: Integers) -> Pieces:
        """Documents cut into sequences, their prefixes not counted."""
        length = self.tokens.data.sequence_length
        return Pieces(self.tokens.folder, documents, length=length, prefix=self.settings.prefix_tokens)

    def describe(self) -> dict[str, object]:
        """JSON values for the run's record: those of the tokens, and loads, purity and warnings of the routing."""
        found = self.tokens.describe()
        if self.table is None:
            return found
        folder, paths = self.tokens.folder, self.settings.paths
        sizes = np.diff(folder.offsets)
        routing: dict[str, object] = {"router": self.settings.router.value, "warnings": self.warnings}
        for name, documents in (
            ("training", np.flatnonzero(self.table.trains[:, 0] >= 0)),
            ("validation", np.flatnonzero(folder.held_out)),
        ):
            path, domains = self.table.path[documents], folder.domains[documents]
            routing[name] = {
                "documents": np.bincount(path, minlength=paths).tolist(),
                "load": sharding.loads(path, paths, sizes[documents]).round(4).tolist(),  # shares of the tokens
                "purity": round(sharding.purity(path, domains), 4),
                "concentration": round(sharding.concentration(path, domains), 4),
            }
        return {**found, "split": "routed", "router_documents": len(self.router_documents), "routing": routing}
