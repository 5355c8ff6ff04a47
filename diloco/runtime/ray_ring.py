"""What goes between the nodes of a Ray cluster, and in which order: contributions one way, global values the other.

Ray would fetch all at once, and several streams on one link get in each other's way: each takes longer, and links lie
idle at the end. In ring order every link carries one object at a time, and all of them are busy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from ray.exceptions import RayError

from diloco.codec import Codec, Float32
from diloco.messages import IslandId, ModuleKey, Modules
from diloco.runtime.ray_refs import Pending, Ref, Then

QUEUED = (
    2  # transfers that a node is told of at once: that under way and the next, so that it never waits for the driver
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """Something that lies on one node and goes to another."""

    sender: str
    receiver: str
    begin: Callable[[], None]


class Ring:
    """Decides which transfer is next: out of each node one at a time, and into each one at a time."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._places = {node: place for place, node in enumerate(dict.fromkeys(nodes))}
        self._waiting: list[Transfer] = []
        self._given: dict[str, list[Transfer]] = {}  # by receiver; the first is under way

    def add(self, transfer: Transfer) -> None:
        """It is to be begun at some time."""
        for node in (transfer.sender, transfer.receiver):
            self._places.setdefault(node, len(self._places))
            self._given.setdefault(node, [])
        self._waiting.append(transfer)

    def end(self, transfer: Transfer) -> None:
        """It has come to its end, in whatever way, or is not to be waited for any more."""
        for transfers in (self._given[transfer.receiver], self._waiting):
            if transfer in transfers:
                transfers.remove(transfer)

    def take(self) -> list[Transfer]:
        """Those to be begun now, each told once.

        An idle node takes whatever it can. A busy one is told of its next where that follows on the ring: what else
        is there may be overtaken by what is ready in a moment.
        """
        taken = []
        for turn in range(QUEUED):
            busy = {given[turn].sender for given in self._given.values() if len(given) > turn}
            for transfer in sorted(self._waiting, key=self._distance):
                given = self._given[transfer.receiver]
                follows = not given or self._distance(transfer) - self._distance(given[-1]) in (0, 1)
                if len(given) == turn and follows and transfer.sender not in busy:
                    given.append(transfer)
                    busy.add(transfer.sender)
                    taken.append(transfer)
                    self._waiting.remove(transfer)
        return taken

    def _distance(self, transfer: Transfer) -> int:
        """In turn k a node takes from the k-th after it."""
        return (self._places[transfer.sender] - self._places[transfer.receiver]) % len(self._places)


Part: TypeAlias = tuple[Any, str, Ref]  # a shard of the store, its node, and contributions to it


@dataclass(kw_only=True)
class _Coming:
    transfer: Transfer
    island: IslandId
    then: list[Callable[[], None]] = field(default_factory=list)  # what waits for it


class Pusher:
    """Hands contributions to the shards of the store, those from other nodes in ring order."""

    def __init__(self, pending: Pending, nodes: Sequence[str]) -> None:
        """`nodes` of the shards, in their order."""
        self._pending, self._ring = pending, Ring(nodes)
        self._coming: dict[Ref, _Coming] = {}  # offered, not there yet

    def offer(self, parts: Sequence[Part], sender: str, island: IslandId) -> None:
        """Begin to bring these from node `sender`, where at least the first is made, before they are judged."""
        for part in parts:
            if part[1] != sender:
                self._add(part, sender, island)
        self._begin()

    def push(self, parts: Sequence[Part], then: Then) -> None:
        """Have them judged as they are there; `then` as for `Pending.add`, one answer for each part."""
        answers: dict[int, Any] = {}
        errors: list[RayError] = []
        assert parts

        def judged(index: int, found: list[Any], error: RayError | None) -> None:
            if error is None:
                answers[index] = found[0]
            else:
                errors.append(error)
            if len(answers) + len(errors) == len(parts):
                in_order = [answers[index] for index in sorted(answers)]
                then([] if errors else in_order, errors[0] if errors else None)

        def judge(index: int, shard: Any, ref: Ref) -> None:
            self._pending.add([shard.push.remote(ref)], partial(judged, index))

        for index, (shard, _, ref) in enumerate(parts):
            begin = partial(judge, index, shard, ref)
            if ref in self._coming:
                self._coming[ref].then.append(begin)
            else:
                begin()

    def forget(self, island: IslandId) -> None:
        """It is given up for lost: others need not wait for what it was sending, which may never come."""
        for ref in [ref for ref, coming in self._coming.items() if coming.island == island]:
            self._ring.end(self._coming.pop(ref).transfer)
        self._begin()

    def _add(self, part: Part, sender: str, island: IslandId) -> None:
        shard, receiver, ref = part

        def fetch() -> None:
            self._pending.add([shard.fetch.remote([ref])], fetched)  # nested, or Ray would fetch it before its turn

        def fetched(answers: list[Any], error: RayError | None) -> None:  # who pushes it will meet the error too
            if ref not in self._coming:
                return
            self._ring.end(transfer)
            self._begin()
            for begin in self._coming.pop(ref).then:
                begin()

        transfer = Transfer(sender=sender, receiver=receiver, begin=fetch)
        self._coming[ref] = _Coming(transfer=transfer, island=island)
        self._ring.add(transfer)

    def _begin(self) -> None:
        for transfer in self._ring.take():
            transfer.begin()


class Puller:
    """Has the shards of the store give out what islands and the evaluator want of them."""

    def __init__(self, shards: Sequence[Any], modules: Modules, codec_down: Codec) -> None:
        """Without a codec what one gets does not depend on what one has: all get the same object."""
        self._shards, self._holders = shards, modules.shards
        self._updates = not isinstance(codec_down, Float32)
        self._given: dict[tuple[int, str, tuple[tuple[ModuleKey, int | None], ...]], Ref] = {}

    def renew(self) -> None:
        """The store has changed."""
        self._given.clear()

    def pull(self, node: str, island: IslandId, wants: Mapping[ModuleKey, int | None]) -> list[Ref]:
        """An object of each shard, the same for all receivers on a node: what it has after all commits asked for.

        In ring order: each island begins with another shard, so that no link carries all at once.
        """
        by_shard: dict[int, dict[ModuleKey, int | None]] = {}
        for key, have in wants.items():
            by_shard.setdefault(self._holders[key], {})[key] = have if self._updates else None
        refs = []
        for shard in sorted(by_shard, key=lambda shard: (shard - island - 1) % len(self._shards)):
            asked = (shard, node, tuple(by_shard[shard].items()))
            if asked not in self._given:
                self._given[asked] = self._shards[shard].pull.remote(by_shard[shard])
            refs.append(self._given[asked])
        return refs
