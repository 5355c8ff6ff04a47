"""The routed model as one language model whose path is chosen once a document, or again every so many tokens.

Section 2.4.3 of arXiv:2403.10616. All is counted from one table: the log-likelihood of every token under every path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dipaco.documents import Likelihoods, score
from dipaco.finished import Finished, token_router
from dipaco.saved import Doubles, Integers
from dipaco.shards import loads
from dipaco.token_router import TokenRouter

ONCE = "once"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How well the routed model does with one way to choose paths."""

    loss: float  # mean nats a counted token
    loads: list[float]  # the share of the counted tokens that each path predicts
    oracle: float  # the loss, had each window gone through the path that turned out best for it: a bound

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def once(table: Likelihoods, paths: Integers) -> Figures:
    """`paths`: int64[documents], the path of each document of the corpus."""
    return _figures(table, paths[table.document], table.document)


def rerouted(
    table: Likelihoods, paths: Integers, choices: Mapping[int, Integers], *, every: int, prefix: int
) -> Figures:
    """A path for every window of `every` tokens, the first one's by `paths` as in `once`.

    `choices`: for each document int64[tokens + 1], as `TokenRouter.choices` gives them: a window is predicted by the
    choice at its first token, which knows those before it alone.
    """
    windows = table.windows(every, prefix=prefix)
    path = paths[table.document]
    known, place = np.unique(table.document, return_inverse=True)
    ends = np.cumsum([len(choices[index]) for index in known.tolist()])
    joined = np.concatenate([choices[index] for index in known.tolist()])
    starts = (ends - [len(choices[index]) for index in known.tolist()])[place]
    later = windows > 0
    path[later] = joined[(starts + prefix + windows * every)[later]]
    most = int(windows.max(initial=0)) + 1
    return _figures(table, path, table.document * most + windows)


def evaluate(run: Finished, every: Sequence[int], router: TokenRouter) -> dict[str, Figures]:
    """On the validation documents without their prefixes: "once", which is the run's own loss, and each of `every`.

    A path reads a token's predecessors in the same piece of `data.sequence_length`, as it was trained and as the run
    was evaluated; `router` may look further back. Raises ValueError where one of `every` is below 1.
    """
    check_every(every)
    corpus = run.corpus
    pieces, prefix = corpus.validation, corpus.settings.prefix_tokens
    documents = np.arange(len(corpus.tokens.folder.held_out))
    paths = corpus.paths_of(documents)
    table = score(pieces, run.paths, run.model, say=run.say)
    run.say(f"the token router reads {len(np.unique(table.document)):,} validation documents")
    choices = {index: router.choices(corpus.tokens.folder.document(index)) for index in np.unique(table.document)}
    found = {ONCE: once(table, paths)}
    for length in every:
        found[str(length)] = rerouted(table, paths, choices, every=length, prefix=prefix)
    return found


def check_every(every: Sequence[int]) -> None:
    """Raise ValueError where one of these windows has no token."""
    for tokens in every:
        if tokens < 1:
            raise ValueError(f"every={tokens}: a path is chosen for at least 1 token")


def frequencies(
    run: str | Path,
    every: Sequence[int],
    *,
    look_ahead: int | None = None,
    steps: int | None = None,
    documents: int | None = None,
    refit: bool = False,
) -> dict[str, float]:
    """The losses of a finished run, {"once": ..., "64": ..., ...}: see `evaluate`, and `token_router` for the rest."""
    check_every(every)  # before the router is fitted
    finished = Finished(run)
    router = token_router(finished, look_ahead=look_ahead, steps=steps, documents=documents, refit=refit)
    return {name: figures.loss for name, figures in evaluate(finished, every, router).items()}


def _figures(table: Likelihoods, path: Integers, window: Integers) -> Figures:
    """`path`, `window`: int64[tokens]: which path predicts each token, and with which others it goes."""
    paths, tokens = table.values.shape
    chosen = table.values[path, np.arange(tokens)].astype(np.float64)
    _, place = np.unique(window, return_inverse=True)
    sums: Doubles = np.stack([np.bincount(place, own) for own in table.values])  # float64[paths, windows]
    return Figures(
        loss=float(-chosen.sum() / tokens),
        loads=loads(path, paths).tolist(),
        oracle=float(-sums.max(axis=0).sum() / tokens),
    )
