"""Discriminative re-sharding: a new router from how well the paths of an earlier run predict held-out documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diloco.tokens import TokenFolder
from diloco.workloads.language import LanguageModel, one_thread
from dipaco.documents import Pieces
from dipaco.features import Features
from dipaco.router import LinearRouter, balancing_bias
from dipaco.routing import FIT_DOCUMENTS, SUMMARY, Routing, Settings, fit_features, texts
from dipaco.saved import Doubles, Integers


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A finished run of several paths, whose export scores documents."""

    run: Path
    config: dict[str, Any]  # its config.yaml
    summary: dict[str, Any]  # its summary.json
    routing: Routing | None  # none where documents came to paths by true domains or at random

    @classmethod
    def open(cls, run: Path) -> Scorer:
        """Raises ValueError where the directory is not that of a finished run of several paths."""
        if (run / "sweep.csv").is_file():
            raise ValueError(f"workload.scorer={run} is several runs: give the directory of one of them")
        if not (run / "config.yaml").is_file():
            raise ValueError(f"workload.scorer={run} is not the directory of a run: it has no config.yaml")
        if not (run / SUMMARY).is_file() or not (run / "export" / "paths.json").is_file():
            raise ValueError(
                f"workload.scorer={run} has no export of several paths: give a run with layout=paths that finished"
            )
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        if "router_fraction" not in config["workload"]:
            raise ValueError(f"workload.scorer={run} has routed no documents: give a run with workload=routed_lm")
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        router = run / "export" / "router"
        routing = Routing.load(router) if router.is_dir() else None
        return cls(run=run, config=config, summary=summary, routing=routing)

    def check(self, folder: TokenFolder, settings: Settings) -> None:
        """Raise ValueError unless it has as many paths, the same data, and never trained on what it is to score."""
        paths = len(json.loads((self.run / "export" / "paths.json").read_text(encoding="utf-8"))["paths"])
        if paths != settings.paths:
            raise ValueError(
                f"workload.scorer={self.run} has {paths} paths, and this run {settings.paths}: use a layout with "
                f"{paths} paths, or another run"
            )
        theirs: dict[str, Any] = self.summary["data"]
        if theirs["sha256"] != folder.meta["sha256"]:
            before, now = theirs["recipe"], folder.meta["recipe"]
            differing = [f"{key}={now.get(key)} was {value}" for key, value in before.items() if now.get(key) != value]
            raise ValueError(
                f"workload.scorer={self.run} was trained on other tokens"
                f" ({'; '.join(differing) or 'of other documents'}): use the data.* of that run, or train it anew"
            )
        mine = {"router_fraction": settings.router_fraction, "prefix_tokens": settings.prefix_tokens}
        for key, value in mine.items():
            if self.config["workload"][key] != value:
                raise ValueError(
                    f"workload.{key}={value}, and {self.config['workload'][key]} in workload.scorer={self.run}: use the"
                    " same, so that both hold out the same documents and tokens for the router"
                )
        if settings.base and self.routing is not None and self.config["workload"]["base"] != settings.base:
            raise ValueError(
                f"workload.base={settings.base}, but the features are those of workload.scorer={self.run}: leave "
                "workload.base out"
            )

    def scores(self, folder: TokenFolder, documents: Integers, *, tokens: int) -> tuple[Integers, Doubles]:
        """int64[scored]: those of the documents that have more than a prefix; float64[scored, paths] of them.

        Mean log-likelihoods of what follows the prefix, in nats: of about `tokens` tokens of each document, 0 = all.
        One path's model is in memory at a time.
        """
        workload, length = self.config["workload"], self.config["data"]["sequence_length"]
        pieces = Pieces(folder, documents, length=length, prefix=workload["prefix_tokens"])
        if tokens:
            pieces.shorten(tokens)
        columns = []
        with one_thread():
            for path in range(workload["paths"]):
                exported = str(self.run / "export" / f"path{path}")
                language = LanguageModel.named(exported, trust_remote_code=workload["trust_remote_code"])
                columns.append(pieces.document_scores(language.build(0)))
        return np.unique(pieces.documents), np.stack(columns, axis=1)

    def loads(self) -> Doubles:
        """float64[paths]: the share of the training documents that each path trained on."""
        sources = self.summary["data"]["shard_documents"]  # source s trains path s % paths
        documents = np.array(sources, dtype=np.float64).reshape(-1, self.config["workload"]["paths"]).sum(axis=0)
        return np.asarray(documents / documents.sum(), dtype=np.float64)

    def features(self, folder: TokenFolder, settings: Settings) -> Features:
        """Those that it was routed by, so that they stay the same; new ones after true domains or random paths."""
        return self.routing.features if self.routing is not None else fit_features(folder, settings)[0]


def discriminative(folder: TokenFolder, settings: Settings, *, aside: Integers, training: Integers) -> Routing:
    """One alternation of arXiv:2403.10616, section 2.4.2, on the paths of the run `settings.scorer`.

    `aside`: int64[documents] held out of training in both runs, which are scored; `training`: those to be dealt, as
    evenly as they were in that run. Raises ValueError where the run does not fit this one, or too few are held out.
    """
    scorer = Scorer.open(Path(settings.scorer))
    scorer.check(folder, settings)
    check_held_out(len(aside), settings)
    documents, scores = scorer.scores(folder, aside, tokens=settings.document_tokens)
    check_held_out(len(documents), settings)
    features = scorer.features(folder, settings)
    return reshard(folder, settings, features, documents, scores, training=training, target=scorer.loads())


def reshard(
    folder: TokenFolder,
    settings: Settings,
    features: Features,
    documents: Integers,
    scores: Doubles,
    *,
    training: Integers,
    target: Doubles,
) -> Routing:
    """A linear router from features to each document's best path, with a bias for the loads.

    `scores`: float64[documents, paths] of `documents`; `target`: float64[paths], the share of the `training` documents
    that each path shall get. Where a path is nobody's best, as the paper has it, nothing would tell what it is good at:
    then a constant is first added to each path's scores, so that they are best as often as `target` says.
    """
    labels = scores.argmax(axis=1)
    if len(np.unique(labels)) < settings.paths:
        labels = (scores + balancing_bias(scores.astype(np.float32), target)).argmax(axis=1)
    chosen = np.random.default_rng(settings.seed).permutation(training)[:FIT_DOCUMENTS]
    tokens = settings.prefix_tokens
    router = LinearRouter.fit(
        features.vectors(texts(folder, documents), tokens=tokens),
        labels,
        paths=settings.paths,
        match=features.vectors(texts(folder, chosen), tokens=tokens),
        target=target,
    )
    return Routing(features, router, prefix_tokens=tokens)


def check_held_out(documents: int, settings: Settings) -> None:
    """Raise ValueError where there are fewer router documents than paths."""
    if documents < settings.paths:
        raise ValueError(
            f"{documents} router documents with more than {settings.prefix_tokens} tokens cannot tell {settings.paths} "
            f"paths apart: raise workload.router_fraction={settings.router_fraction} in both runs, or give more data"
        )
