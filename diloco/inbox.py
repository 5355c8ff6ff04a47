"""Inbox: what was sent to one module and waits for its commit, encoded; or, where the merge can, added up already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from diloco.codec import Codec
from diloco.merge import Merge
from diloco.messages import Commit, Contribution, Fold, ModuleKey, Payload, SourceId, State, Tensors, Verdict

Key: TypeAlias = tuple[int, SourceId]  # round and source
MEASURED_SOURCES = 8  # pairwise cosines of at most so many contributions, so that their cost stays linear
EMPTY = np.empty(0, dtype=np.uint8)


class Inbox:
    """Contributions and their verdicts, by round and source.

    Those that were folded are in a running sum; the first few of them stay encoded too, to be measured.
    """

    def __init__(self) -> None:
        self._sent: dict[Key, Contribution] = {}
        self._verdicts: dict[Key, Verdict] = {}
        self._sum: Tensors = {}
        self._shares: dict[Key, float] = {}  # of the sum's contributions, in their order

    def put(self, contribution: Contribution, judge: Callable[[Contribution], Verdict]) -> Verdict:
        """Keep it if it is sound. One that is here already changes nothing, unless it is of an earlier attempt.

        What was folded stays as it is: a later attempt comes too late.
        """
        key = (contribution.round, contribution.source)
        known = self._verdicts.get(key)
        if known is None or (known.attempt < contribution.attempt and key not in self._shares):
            self._sent.pop(key, None)
            self._verdicts[key] = judge(contribution)
            if self._verdicts[key].good:
                self._sent[key] = contribution
        return self._verdicts[key]

    def fold(self, fold: Fold, merge: Merge, codec: Codec) -> None:
        """Add these to the sum, in their order, and let go of what they were encoded as. Those that are in it stay."""
        for source, weight in zip(fold.sources, fold.weights, strict=True):
            self._add((fold.round, source), weight, fold.planned, merge, codec)

    def merged(self, commit: Commit, merge: Merge, codec: Codec) -> Tensors:
        """The contributions of a commit as one. The same bits, however many of them were folded before."""
        keys = commit.keys
        if commit.planned:
            added = [
                self._add(key, weight, commit.planned, merge, codec)
                for key, weight in zip(keys, commit.weights, strict=True)
            ]
            if all(added):
                assert list(self._shares) == list(keys), "a sum holds the first contributions of its commit, in order"
                total, shares = self._sum, self._shares
                self._sum, self._shares = {}, {}
                if len(shares) < len(commit.planned):  # a mean over those that came
                    torch._foreach_mul_(list(total.values()), 1 / math.fsum(shares.values()))
                return total
        return merge.combine((codec.view(self._sent[key].payload) for key in keys), commit.weights)

    def chosen(self, commit: Commit) -> list[tuple[Contribution, Verdict]]:
        """The contributions of a commit. Beyond the first few, their payloads may be empty."""
        return [(self._sent[key], self._verdicts[key]) for key in commit.keys]

    def forget(self, commit: Commit) -> None:
        """All that was sent up to these rounds is done with."""
        newest = {source: round_ for round_, source in sorted(commit.keys)} if commit.rounds else {}
        for round_, source in list(self._verdicts):
            if round_ <= (newest.get(source, -1) if commit.rounds else commit.round):
                self._sent.pop((round_, source), None)
                del self._verdicts[round_, source]

    def nbytes(self) -> int:
        """Of what is kept: contributions as they are encoded, and the sum."""
        sent = sum(contribution.payload.nbytes for contribution in self._sent.values())
        return sent + sum(value.numel() * value.element_size() for value in self._sum.values())

    def state(self) -> State:
        """Copies of all of it, for a checkpoint."""
        tensors: Tensors = {f"sum/{name}": value.clone() for name, value in self._sum.items()}
        inbox: list[dict[str, Any]] = []
        for contribution in self._sent.values():
            tensors[f"inbox/{len(inbox)}"] = torch.from_numpy(contribution.payload.body.copy())
            inbox.append(
                {
                    "source": contribution.source,
                    "island": contribution.island,
                    "round": contribution.round,
                    "base_version": contribution.base_version,
                    "attempt": contribution.attempt,
                    "codec": contribution.payload.codec,
                    "header": contribution.payload.header.decode(),
                }
            )
        told = ("source", "round", "finite", "shape_ok", "norm", "attempt", "version_ok")
        verdicts = [{name: vars(verdict)[name] for name in told} for verdict in self._verdicts.values()]
        folded = [[round_, source, share] for (round_, source), share in self._shares.items()]
        return State(tensors=tensors, meta={"inbox": inbox, "verdicts": verdicts, "folded": folded})

    @classmethod
    def loaded(cls, key: ModuleKey, tensors: Tensors, meta: Mapping[str, Any]) -> Inbox:
        """What `state` gave, of the module `key`."""
        inbox = cls()
        for index, entry in enumerate(meta["inbox"]):
            payload = Payload(
                codec=entry["codec"], header=entry["header"].encode(), body=tensors[f"inbox/{index}"].numpy()
            )
            inbox._sent[entry["round"], entry["source"]] = Contribution(
                module=key,
                source=entry["source"],
                island=entry["island"],
                round=entry["round"],
                base_version=entry["base_version"],
                attempt=entry["attempt"],
                payload=payload,
            )
        for told in meta["verdicts"]:
            inbox._verdicts[told["round"], told["source"]] = Verdict(module=key, **told)
        inbox._sum = {name.removeprefix("sum/"): t for name, t in tensors.items() if name.startswith("sum/")}
        inbox._shares = {(round_, source): share for round_, source, share in meta["folded"]}
        return inbox

    def _add(self, key: Key, weight: float, planned: Sequence[float], merge: Merge, codec: Codec) -> bool:
        """Whether it is in the sum now; False where the merge needs all at once."""
        if key in self._shares:
            return True
        sent = self._sent[key]
        share = merge.fold(self._sum, codec.view(sent.payload), weight, planned)
        if share is None:
            return False
        self._shares[key] = share
        if len(self._shares) > MEASURED_SOURCES:
            self._sent[key] = replace(sent, payload=replace(sent.payload, body=EMPTY))
        return True
