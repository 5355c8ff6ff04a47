"""Log-probabilities of completions under the model that training starts from: what preferences are measured against."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from diloco.data import make_once
from diloco.tokens import Array
from diloco.workloads.completions import log_probabilities, padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.language import EVALUATION_BATCH, LanguageModel, evaluating, one_thread

FORMAT = 1  # of cached log-probabilities


def completion_logps(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """float32[rows, texts]: sums over each text's targets, in nats. `tokens`, `targets`: [rows, texts, longest]."""
    flat = {"tokens": tokens.flatten(0, 1), "targets": targets.flatten(0, 1)}
    return log_probabilities(model, flat).sum(dim=1).view(tokens.shape[:2])


def stacked(corpus: ExampleCorpus, rows: list[int]) -> dict[str, Tensor]:
    """{"tokens", "targets"}: [rows, texts, longest] of all texts of these rows; see `padded`."""
    width = corpus.examples.width
    batch = padded([corpus.text(row, index) for row in rows for index in range(width)])
    return {name: value.view(len(rows), width, -1) for name, value in batch.items()}


def cached(corpus: ExampleCorpus, language: LanguageModel, *, seed: int) -> Array:
    """float32[rows, texts]: of every row under `language`, as it is before training; once for each cache.

    The next process reads what the first one found. Without a folder of weights, they are those of `seed`.
    """
    key = json.dumps([FORMAT, corpus.sha256, language.fingerprint(seed)])
    root = Path(corpus.data.cache).expanduser().absolute() / "references"
    final = root / hashlib.sha256(key.encode()).hexdigest()[:20]

    def make(folder: Path) -> None:
        rows = len(corpus.folder.held_out)
        found = np.zeros((rows, corpus.examples.width), dtype=np.float32)
        model = language.build(seed)
        with one_thread(), evaluating(model):
            for first in range(0, rows, EVALUATION_BATCH):
                batch = stacked(corpus, list(range(first, min(first + EVALUATION_BATCH, rows))))
                found[first : first + EVALUATION_BATCH] = completion_logps(model, **batch).numpy()
        np.save(folder / "logps.npy", found)

    make_once(final, make)
    return np.asarray(np.load(final / "logps.npy", mmap_mode="r"))
