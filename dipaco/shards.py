"""Routed documents -> shards: overlap, capacity, replicas, and what is wrong with shards before training on them."""

from __future__ import annotations

import heapq
from typing import Any, TypeAlias

import numpy as np

from dipaco.router import best, check_enough
from dipaco.saved import Doubles, Floats, Integers

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

TINY = 0.1  # of a fair share of the tokens: less is reported
SHORT = 0.2  # of the validation documents: as many without a token after the prefix are reported
FEW_DOCUMENTS = 10  # held out for the router, per path: fewer are reported
FEW_TOKENS = 1.0  # tokens per parameter of a path: fewer are reported. Compute-optimal are about 20


def overlapping(scores: Floats, overlap: int) -> Integers:
    """int64[documents, overlap]: every document's `overlap` best shards, the best first; for training only.

    Raises ValueError for fewer documents than shards, or an overlap outside 1 ... shards.
    """
    documents, shards = scores.shape
    check_enough(documents, shards)
    if not 1 <= overlap <= shards:
        raise ValueError(f"overlap={overlap} with {shards} paths: use 1 to {shards}")
    return best(scores, overlap)


def balanced(scores: Floats, *, slack: float, overlap: int = 1, sizes: Array | None = None) -> Integers:
    """Like `overlapping`, but no shard holds more than `slack` times a fair share, nor less than the 1/`slack` of it.

    Shares are of `sizes` (default: documents). Greedy: documents that lose most with their second choice choose first,
    then small shards take from others what loses least. With `sizes` other than 1, documents that fit nowhere go to the
    emptiest shard, and a shard may stay too small by a document. Raises ValueError also for a slack below 1.
    """
    if slack < 1:
        raise ValueError(f"balance={slack}: a shard must have room for its fair share, so use at least 1 (0 = off)")
    ranked = overlapping(scores, scores.shape[1])  # int64[documents, shards], best first
    documents, shards = ranked.shape
    overlapping(scores, overlap)
    weights = np.ones(documents, dtype=np.int64) if sizes is None else sizes
    fair = overlap * float(weights.sum()) / shards
    capacity = float(np.ceil(slack * fair)) if sizes is None else slack * fair
    ordered = np.take_along_axis(scores, ranked, axis=1)
    margins = ordered[:, 0] - ordered[:, min(1, shards - 1)]
    loads = [0.0] * shards
    chosen = np.full((documents, overlap), -1, dtype=np.int64)
    for place in range(overlap):
        for document in np.argsort(-margins, kind="stable"):
            weight, taken = float(weights[document]), set(chosen[document, :place].tolist())
            free = [shard for shard in ranked[document].tolist() if shard not in taken]
            fitting = (shard for shard in free if loads[shard] + weight <= capacity)
            shard = next(fitting, min(free, key=loads.__getitem__))
            chosen[document, place] = shard
            loads[shard] += weight
    _fill(chosen, scores, loads, weights, least=fair / slack, most=capacity)
    return chosen


def _fill(chosen: Integers, scores: Floats, loads: list[float], weights: Array, *, least: float, most: float) -> None:
    """Bring shards up to `least`, as far as others stay above it and none gets above `most`. Writes into `chosen`."""
    rows = np.arange(len(chosen))[:, None]
    for shard in sorted(range(len(loads)), key=loads.__getitem__):
        losses = scores[rows, chosen] - scores[:, [shard]]  # float32[documents, overlap]
        for place in np.argsort(losses, axis=None, kind="stable").tolist():
            if loads[shard] >= least:
                break
            document, choice = divmod(place, chosen.shape[1])
            giver, weight = int(chosen[document, choice]), float(weights[document])
            fits = loads[giver] - weight >= least and loads[shard] + weight <= most
            if fits and shard not in chosen[document]:
                chosen[document, choice] = shard
                loads[giver] -= weight
                loads[shard] += weight


def deal_replicas(documents: list[Array], sizes: Array, shards: int) -> list[Array]:
    """Deal each path's documents evenly to its sources: source s trains path s % paths.

    `documents`: int64[documents of the path] for each path; `sizes`: tokens of every document of the corpus.
    Raises ValueError where `shards` is no multiple of the paths.
    """
    paths = len(documents)
    check_divides(paths, shards)
    if shards == paths:
        return documents
    dealt: list[Array] = [np.empty(0, dtype=np.int64)] * shards
    for path, own in enumerate(documents):
        smallest = [(0, source) for source in range(path, shards, paths)]  # heap of (tokens, source)
        parts: dict[int, list[int]] = {source: [] for _, source in smallest}
        for document in own.tolist():
            tokens, source = smallest[0]
            parts[source].append(document)
            heapq.heapreplace(smallest, (tokens + int(sizes[document]), source))
        for source, part in parts.items():
            dealt[source] = np.array(part, dtype=np.int64)
    return dealt


def check_divides(paths: int, shards: int) -> None:
    """Raise ValueError unless each path has equally many of the `shards`."""
    if paths < 1 or shards % paths:
        raise ValueError(
            f"workload.paths={paths} do not divide {shards} sources: use a multiple of {max(1, paths)} islands "
            "(source s trains path s % paths), or other paths"
        )


def loads(assignment: Integers, paths: int, sizes: Array | None = None) -> Doubles:
    """float64[paths]: each path's share of the documents, or of their `sizes`; `assignment`: int64[documents(, n)]."""
    columns = assignment.reshape(len(assignment), -1)
    weights = np.ones(len(columns)) if sizes is None else sizes.astype(np.float64)
    totals = np.bincount(columns.ravel(), np.repeat(weights, columns.shape[1]), minlength=paths)
    return np.asarray(totals / max(1.0, float(totals.sum())), dtype=np.float64)


def purity(assignment: Array, domains: Array) -> float:
    """The share of documents that are of their path's commonest domain: 1 = no path mixes domains."""
    return _majority(assignment, domains)


def concentration(assignment: Array, domains: Array) -> float:
    """The share of documents that are in their domain's commonest path: 1 = no domain is torn apart."""
    return _majority(domains, assignment)


def _majority(groups: Array, labels: Array) -> float:
    table = np.zeros((int(groups.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (groups, labels), 1)
    return float(table.max(axis=1).sum() / len(groups))


def check_shards(tokens: list[int], *, needed: int, balance: float = 0.0) -> list[str]:
    """Warnings about tiny shards. `tokens`: of each path; `needed`: what one sequence takes; `balance`: what was set.

    Raises ValueError for a shard that is empty or holds less than one sequence.
    """
    remedy = "workload.overlap=2 fills the small ones; or use fewer paths"
    if not balance:
        remedy = f"workload.balance=1.5 takes from the largest shards, {remedy}"
    for path, count in enumerate(tokens):
        if count < needed:
            raise ValueError(
                f"the shard of path {path} holds {count} tokens, fewer than one sequence needs ({needed}): {remedy}, "
                "shorter sequences or more data"
            )
    fair = sum(tokens) / len(tokens)
    tiny = [f"path {path} ({count})" for path, count in enumerate(tokens) if count < TINY * fair]
    if not tiny:
        return []
    return [f"less than {TINY:.0%} of a fair share of {fair:.0f} tokens: {', '.join(tiny)}: {remedy}"]


def check_prefixes(sizes: Array, *, prefix_tokens: int) -> list[str]:
    """A warning where many validation documents are all prefix. `sizes`: of each in tokens, with end-of-text.

    Raises ValueError where all are.
    """
    short = float((sizes <= prefix_tokens).mean()) if len(sizes) else 1.0
    remedy = "use a shorter prefix, longer documents (data.document=file), or a larger data.validation_fraction"
    if short == 1:
        raise ValueError(
            f"no validation document has more than workload.prefix_tokens={prefix_tokens} tokens, which are not "
            f"evaluated: {remedy}"
        )
    if short < SHORT:
        return []
    return [
        f"{short:.0%} of the validation documents have no more than workload.prefix_tokens={prefix_tokens} tokens and "
        f"count for no loss: {remedy}"
    ]


def few_tokens(tokens: list[int], *, parameters: int) -> list[str]:
    """A warning where paths have few tokens; `parameters`: of one path, 0 = unknown.

    With fixed data, each new path takes tokens from the others until all overfit (arXiv:2403.10616, section 4).
    """
    least = min(tokens)
    if len(tokens) < 2 or not parameters or least >= FEW_TOKENS * parameters:
        return []
    return [
        f"{len(tokens)} paths share {sum(tokens)} tokens: the smallest has {least}, {least / parameters:.2g} for each "
        f"of a path's {parameters} parameters, so paths may overfit: use fewer paths, workload.overlap=2, shared "
        "levels or more data"
    ]


def few_for_router(documents: int, paths: int) -> list[str]:
    """A warning where few documents were held out to tell paths apart."""
    if documents >= FEW_DOCUMENTS * paths:
        return []
    return [
        f"{documents} router documents for {paths} paths are fewer than {FEW_DOCUMENTS} each, which teach a router "
        "little: raise workload.router_fraction in this run and in its workload.scorer"
    ]
