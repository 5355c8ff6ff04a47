"""A finished run of several paths: its corpus, its paths as they were exported, and its token router."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import nn

from diloco import config as configuration
from diloco import pretrained
from diloco.workloads.language import without_progress_bars
from dipaco.corpus import RoutedCorpus
from dipaco.documents import score
from dipaco.saved import Integers
from dipaco.token_router import FOLDER, Fitting, Scored, TokenRouter
from dipaco.workload import RoutedLM

FITTED = "fitted.json"  # in that folder: what it was fitted on


@final
class Finished:
    """What is left of a run to be evaluated."""

    def __init__(self, run: str | Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        """Open the run in this directory, and its corpus. ValueError where it has no several paths, or no export.

        `say` is told of what takes long, before it begins.
        """
        self.directory, self.say = Path(run), say
        self.export = self.directory / "export"
        config = configuration.load(self.directory / "config.yaml")
        if not isinstance(config.workload, RoutedLM):
            raise ValueError(f"{run}: its workload sends no documents to paths: give a run with workload=routed_lm")
        if not self.export.is_dir():
            raise ValueError(f"{run} has no export: give a finished run (diloco train resume={run} finishes it)")
        if not (self.export / "paths.json").is_file():
            raise ValueError(f"{run} has one path, and there is nothing to route: give a run with layout=paths")
        summary = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))
        self.weights_sha256 = str(summary["weights_sha256"])
        self.base = config.workload.base or str(self.export / "path0")  # what a token router is fine-tuned from
        shards = config.num_sources()
        self.corpus: RoutedCorpus = config.workload.corpus(config.data, seed=config.seed, shards=shards)
        self.paths = self.corpus.settings.paths
        if self.corpus.sha256 != summary["data_sha256"]:
            raise ValueError(
                f"{run}: the corpus is another one here than the run was trained on: use the machine or the cache "
                "(data.cache) of the run"
            )

    def fitted_on(self) -> dict[str, int]:
        """How many documents the saved token router learned from: held out for it, and trained on."""
        fitted = json.loads((self.export / FOLDER / FITTED).read_text(encoding="utf-8"))
        return {name: fitted[name] for name in ("held_out_documents", "training_documents")}

    def model(self, path: int) -> nn.Module:
        """Read the model of a path from the export: float32, on the CPU, in eval mode."""
        from transformers import AutoModelForCausalLM

        with without_progress_bars():
            model: Any = pretrained.load_model(AutoModelForCausalLM, self.export / f"path{path}")
        assert isinstance(model, nn.Module)
        return model.eval()

    def router_documents(self, count: int) -> Integers:
        """int64[documents] to fit a token router on: those held out for it, the first `count` of them at random.

        0 = all of them; where `count` is more, documents that were trained on make it up. ValueError for none.
        """
        table, held_out = self.corpus.table, self.corpus.router_documents
        assert table is not None
        if count == 0 and len(held_out) == 0:
            raise ValueError(
                f"{self.directory} held no documents out for a router: give --documents N to take so many that were "
                "trained on, or train with a larger workload.router_fraction"
            )
        random = np.random.default_rng(self.corpus.settings.seed)
        training = np.flatnonzero(table.trains[:, 0] >= 0)
        order = np.concatenate([random.permutation(held_out), random.permutation(training)])
        return np.sort(order[: count or len(held_out)])

    def scored(self, documents: Integers) -> list[Scored]:
        """Documents with more than a prefix, and how every path does on the rest of them."""
        table = score(self.corpus.pieces(documents), self.paths, self.model, say=self.say)
        known, firsts = np.unique(table.document, return_index=True)
        parts = np.split(table.values, firsts[1:], axis=1)  # a document's tokens are together, in order
        folder, prefix = self.corpus.tokens.folder, self.corpus.settings.prefix_tokens
        return [
            Scored(tokens=folder.document(index), likelihoods=part, first=prefix)
            for index, part in zip(known.tolist(), parts, strict=True)
        ]


def token_router(
    run: Finished,
    *,
    look_ahead: int | None = None,
    steps: int | None = None,
    documents: int | None = None,
    refit: bool = False,
) -> TokenRouter:
    """The token router of a run: the saved one, or one that is fitted now and saved in the export.

    It is fitted where none was saved, `refit` is true, the paths have other weights now, or other settings than the
    saved one's are given; those left out are Fitting's defaults.
    """
    asked: dict[str, int] = {
        name: value
        for name, value in (("look_ahead", look_ahead), ("steps", steps), ("documents", documents))
        if value is not None
    }
    folder = run.export / FOLDER
    if (folder / FITTED).is_file() and not refit:
        fitted = json.loads((folder / FITTED).read_text(encoding="utf-8"))
        router = TokenRouter.load(folder, paths=run.paths)
        if fitted["weights_sha256"] == run.weights_sha256 and router.fitting == replace(router.fitting, **asked):
            return router
    fitting = replace(Fitting(), **asked)
    chosen = run.router_documents(fitting.documents)
    scored = run.scored(chosen)
    run.say(f"the token router learns from {len(scored):,} documents in {fitting.steps} steps")
    router = TokenRouter.fit(run.base, scored, fitting)
    held_out = int(np.isin(chosen, run.corpus.router_documents).sum())
    fitted = {
        "weights_sha256": run.weights_sha256,
        "held_out_documents": held_out,
        "training_documents": len(chosen) - held_out,
    }
    _replace(folder, router, fitted)
    return router


def _replace(folder: Path, router: TokenRouter, fitted: dict[str, object]) -> None:
    """Save into `folder`, completely or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
        made = Path(name) / folder.name
        router.save(made)
        (made / FITTED).write_text(json.dumps(fitted, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
