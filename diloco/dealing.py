"""Which documents a shard has, and the endless order in which it is read: pure functions of the seed."""

from __future__ import annotations

import heapq
from enum import Enum

import numpy as np

from diloco.tokens import Array, TokenFolder


class ShardSplit(Enum):
    """How training documents are dealt to shards."""

    iid = "iid"  # at random, balanced by tokens
    domain = "domain"  # whole domains, the largest first, each to the smallest shard


def spread(available: int, most: int) -> Array:
    """int64[at most `most`], below `available`: places at even distances."""
    count = min(most, available)
    return np.arange(count) * available // max(1, count)


class Epochs:
    """Places in the endless orders of shards: each epoch is a permutation of all that a shard holds."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._orders: dict[int, tuple[int, Array]] = {}  # shard -> (epoch, order) of the last read

    def indices(self, shard: int, size: int, *, first: int, count: int) -> Array:
        """int64[count], below `size`, which must be the same at each call for a `shard`: places `first` and after."""
        epochs, places = np.divmod(np.arange(first, first + count), size)
        found = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._order(shard, size, int(epoch))[places[here]]
        return found

    def _order(self, shard: int, size: int, epoch: int) -> Array:
        known = self._orders.get(shard)
        if known is not None and known[0] == epoch:
            return known[1]
        random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(1, shard, epoch)))
        order = random.permutation(size)
        self._orders[shard] = (epoch, order)
        return order


def deal(folder: TokenFolder, split: ShardSplit, *, seed: int, shards: int) -> list[Array]:
    """The training documents of each shard: int64[documents]."""
    documents = np.flatnonzero(~folder.held_out)
    if split is ShardSplit.iid:
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
        groups = list(random.permutation(documents)[:, None])
        kind, remedy = "training documents", "cut text files with data.document=passage or line"
    else:
        domains = folder.domains[documents]
        groups = [documents[domains == domain] for domain in np.unique(domains)]
        kind, remedy = "domains in the training documents", "set data.domain_field, use data.split=iid"
    if len(groups) < shards:
        raise ValueError(
            f"{len(groups)} {kind} cannot fill {shards} shards: use fewer islands, {remedy}, or give more data"
        )
    sizes = np.diff(folder.offsets)
    totals = [int(sizes[group].sum()) for group in groups]
    turns = range(len(groups))
    smallest = [(0, shard) for shard in range(shards)]  # heap of (tokens, shard)
    dealt: list[list[Array]] = [[] for _ in range(shards)]
    for index in turns if split is ShardSplit.iid else sorted(turns, key=lambda index: -totals[index]):
        tokens, shard = smallest[0]
        dealt[shard].append(groups[index])
        heapq.heapreplace(smallest, (tokens + totals[index], shard))
    return [np.concatenate(parts) for parts in dealt]
