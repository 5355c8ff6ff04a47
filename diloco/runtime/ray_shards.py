"""The driver's handles of the shards of the store. Without one of them the run can only go back to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from diloco.messages import ModuleKey
from diloco.patience import HICCUP_S
from diloco.runtime.base import StoreLost
from diloco.runtime.ray_actors import spawn_shard
from diloco.runtime.ray_place import Packed, Where
from diloco.runtime.ray_refs import Ref, get, short
from diloco.runtime.ray_ring import Part


class Shards:
    """All of them, in their order."""

    def __init__(self, patience: float) -> None:
        self.actors: list[Any] = []
        self.nodes: list[str] = []
        self._limit_s = patience * HICCUP_S
        self._asked: dict[Ref, tuple[int, float]] = {}  # whether it is alive -> shard, and when that was asked

    def spawn(self, packed: Packed, nodes: Sequence[str], count: int) -> None:
        """Next to the islands, which are on these nodes, so that all links carry the same."""
        self.nodes = [nodes[index % len(nodes)] for index in range(count)]
        self.actors = [spawn_shard(packed, node) for node in self.nodes]

    def setup(self, steps_a_round: Mapping[ModuleKey, int]) -> list[Where]:
        """Make them; where they are."""
        return list(get([shard.setup.remote(steps_a_round) for shard in self.actors]))

    def parts(self, sent: Sequence[tuple[int, Ref]]) -> list[Part]:
        """To whom, and where, contributions go that are for these shards."""
        return [(self.actors[shard], self.nodes[shard], ref) for shard, ref in sent]

    def check(self, now_s: float) -> None:
        """Ask each whether it is alive, once it has answered the last time. Raises StoreLost."""
        ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for ref in ready:
            shard, _ = self._asked.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                raise StoreLost(f"shard {shard} of the store is gone: {short(error)}") from error
        for shard, asked_s in self._asked.values():
            if self._limit_s and now_s - asked_s > self._limit_s:
                raise StoreLost(f"shard {shard} of the store has not answered for {now_s - asked_s:.0f} s")
        waiting = {shard for shard, _ in self._asked.values()}
        for shard, actor in enumerate(self.actors):
            if shard not in waiting:
                self._asked[actor.alive.remote()] = (shard, now_s)

    def kill(self) -> None:
        """End all of them."""
        for shard in self.actors:
            ray.kill(shard)
