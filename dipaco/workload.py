"""Language modelling on routed documents: each path trains on its own, and is evaluated on its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads.causal_lm import CausalLM
from dipaco.corpus import RoutedCorpus
from dipaco.documents import Pieces
from dipaco.router import check_square
from dipaco.routing import RouterKind, Settings
from dipaco.saved import Integers


@dataclass(kw_only=True)
class RoutedLM(Workload):
    """A causal language model whose training documents a router deals to paths (arXiv:2403.10616, section 2.4)."""

    model: str = "tiny"  # as causal_lm's: a preset, or a folder or hub id
    trust_remote_code: bool = False
    paths: int = 0  # that documents are routed to; 0 = as many as the layout has
    router: RouterKind = RouterKind.kmeans  # kmeans, product, discriminative, file, domains (true ones) or iid (random)
    router_file: str = ""  # the folder of a saved router, for router=file
    scorer: str = ""  # a finished run of as many paths, which score documents for router=discriminative
    base: str = ""  # a folder with a model, such as RUN/export: features by its hidden states. "" = by words
    prefix_tokens: int = 32  # of each document: what the router sees, and no perplexity counts
    document_tokens: int = 1024  # of a document, that k-means sees and paths score; 0 = the prefix, and all of it
    overlap: int = 1  # every training document is in so many shards
    balance: float = 0.0  # shards hold at most this times their fair share of tokens, at least a 1/this of it; 0 = any
    router_fraction: float = 0.005  # of the training documents, held out to score paths with
    stop_fraction: float = 0.0  # of them, held out to tell each path's best round: early stopping; 0 = the last counts

    def __post_init__(self) -> None:
        for name in ("router_file", "base", "scorer"):
            if vars(self)[name]:  # workers may start in another folder, and runs/latest is soon another run
                setattr(self, name, os.path.realpath(os.path.expanduser(vars(self)[name])))
        for name, least in (("paths", 0), ("prefix_tokens", 1), ("document_tokens", 0), ("overlap", 1)):
            if vars(self)[name] < least:
                raise ValueError(f"workload.{name}={vars(self)[name]}: it must be at least {least}")
        if self.paths and self.overlap > self.paths:
            raise ValueError(f"workload.overlap={self.overlap} with {self.paths} paths: use at most {self.paths}")
        if self.router is RouterKind.product:
            check_square(self.paths)
        if self.balance and self.balance < 1:
            raise ValueError(f"workload.balance={self.balance}: a shard needs its fair share: at least 1, or 0 = off")
        for name in ("router_fraction", "stop_fraction"):
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"workload.{name}={vars(self)[name]}: it must be at least 0 and below 1")
        if self.router_fraction + self.stop_fraction >= 1:
            raise ValueError(
                f"workload.router_fraction={self.router_fraction} and workload.stop_fraction={self.stop_fraction} leave"
                " no documents to train on: use less"
            )
        if (self.router is RouterKind.file) != bool(self.router_file):
            raise ValueError(
                f"workload.router={self.router.value} with workload.router_file={self.router_file!r}: router=file "
                "takes the folder of a saved router, such as RUN/export/router, and the others take none"
            )
        if (self.router is RouterKind.discriminative) != bool(self.scorer):
            raise ValueError(
                f"workload.router={self.router.value} with workload.scorer={self.scorer!r}: router=discriminative "
                "takes the directory of a finished run, and the others take none"
            )
        by_score = {"overlap": (self.overlap, 1), "balance": (self.balance, 0)}
        for name, (given, off) in by_score.items():
            if self.router in (RouterKind.domains, RouterKind.iid) and given != off:
                raise ValueError(
                    f"workload.router={self.router.value} has no scores for workload.{name}={given}: set"
                    f" workload.{name}={off}, or use another router"
                )

    def build_model(self, seed: int) -> nn.Module:
        """The language model of a path; all paths begin with the same."""
        return self._language().build_model(seed)

    def num_parameters(self) -> int:
        """Those of one path's model."""
        return self._language().num_parameters()

    def num_blocks(self) -> int:
        """Those of one path's model."""
        return self._language().num_blocks()

    def corpus(self, data: Data, *, seed: int, shards: int) -> RoutedCorpus:
        """Prepare and route (once; later calls read the cache). One path has the shards of causal_lm.

        Raises ValueError also where the router cannot be fitted or loaded, or a shard is empty or too small.
        """
        settings = Settings(
            router=self.router,
            paths=self.paths,
            base=self.base,
            prefix_tokens=self.prefix_tokens,
            document_tokens=self.document_tokens,
            overlap=self.overlap,
            balance=self.balance,
            router_fraction=self.router_fraction,
            stop_fraction=self.stop_fraction,
            router_file=self.router_file,
            scorer=self.scorer,
            seed=seed,
        )
        whole = self._language().corpus(data, seed=seed, shards=shards if self.paths == 1 else 1)
        trust, parameters = self.trust_remote_code, self.num_parameters()
        return RoutedCorpus(whole, settings, shards=shards, parameters=parameters, trust_remote_code=trust)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """Token sequences of a shard, as causal_lm takes them."""
        return self._language().batch(_routed(corpus).tokens, shard, step)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean nats a token, as of causal_lm."""
        return self._language().loss(model, batch)

    def tokens(self, batch: Batch) -> int:
        """Tokens that the loss is a mean over."""
        return self._language().tokens(batch)

    def for_paths(self, paths: int) -> RoutedLM:
        """Documents go to as many paths. Raises ValueError where other ones were asked for, and there are several."""
        if paths > 1 and self.paths not in (0, paths):
            raise ValueError(
                f"workload.paths={self.paths}, but the layout has {paths} paths; leave workload.paths out, or, where a "
                "run is resumed, its layout as it was"
            )
        return replace(self, paths=self.paths or paths)

    def warnings(self, corpus: Corpus) -> list[str]:
        """Small shards, too few tokens for so many paths, and a single path, for which nothing is routed."""
        alone = [
            "one path, which reads all documents as with workload=causal_lm: for DiPaCo choose layout=paths, for "
            "DiLoCo on the shards of 4 paths workload.paths=4"
        ]
        return [*(alone if self.paths == 1 else []), *_routed(corpus).warnings]

    def splits(self) -> list[str]:
        """ "validation", or with several paths "validation/0" and so on: what the router sends to each."""
        return ["validation"] if self.paths == 1 else [f"validation/{path}" for path in range(self.paths)]

    def stops_early(self) -> bool:
        """Where a slice of each path's documents is kept for it, and there are several paths."""
        return self.stop_fraction > 0 and self.paths > 1

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """{"loss": mean nats a token, "tokens": how many it is a mean over}, on whole documents without prefixes.

        With early stopping also "stop_loss", of the slice of a path's training documents that is kept for it.
        `split`: "validation" for all validation documents, "validation/3" for those of path 3; likewise
        "router/3", of the documents held out of training to score paths with. No tokens give loss 0.
        """
        routed = _routed(corpus)
        kind, _, path = split.partition("/")
        own = path in [str(known) for known in range(self.paths)]
        if kind not in ("validation", "router") or (not own and split != kind):
            raise ValueError(
                f"split={split!r} is unknown: routed_lm has validation, router, and each with a path, as in "
                f"validation/{self.paths - 1}"
            )
        pieces = routed.validation if kind == "validation" else routed.pieces(routed.router_documents)
        indices = np.arange(len(pieces))
        if own:
            indices = np.flatnonzero(routed.paths_of(pieces.documents) == int(path))
        found = _mean_loss(model, pieces, indices)
        if self.stops_early() and own and kind == "validation":
            slice_ = routed.stop_pieces[int(path)]
            found["stop_loss"] = _mean_loss(model, slice_, np.arange(len(slice_)))["loss"]
        return found

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """The model of one path, with its tokenizer."""
        self._language().export(model, _routed(corpus).tokens, folder)

    def export_shared(self, corpus: Corpus, folder: Path) -> None:
        """The router, for `dipaco.load`; true and random shards have none. A token router of earlier weights goes."""
        shutil.rmtree(folder / "token_router", ignore_errors=True)
        table = _routed(corpus).table
        if table is not None and table.routing is not None:
            table.routing.save(folder / "router")

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """How the model of one path continues `prompt`."""
        return self._language().sample(model, _routed(corpus).tokens, prompt, tokens=tokens, seed=seed)

    def _language(self) -> CausalLM:
        return CausalLM(model=self.model, trust_remote_code=self.trust_remote_code)


def _mean_loss(model: nn.Module, pieces: Pieces, indices: Integers) -> dict[str, float]:
    tokens = int(pieces.tokens[indices].sum())
    total = float(-pieces.log_likelihoods(model, indices).sum())
    return {"loss": total / max(1, tokens), "tokens": float(tokens)}


def _routed(corpus: Corpus) -> RoutedCorpus:
    assert isinstance(corpus, RoutedCorpus)
    return corpus
