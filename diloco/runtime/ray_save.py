"""Checkpoints on Ray: what the islands exported for the next one, and which is the newest that is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from diloco import checkpoint as ckpt
from diloco.messages import SourceId, Task
from diloco.runtime.base import LOADED
from diloco.runtime.ray_island import RayIsland
from diloco.runtime.ray_refs import Pending, Ref, get, short


class Saver:
    """Asks shards and islands to write, and completes what they wrote."""

    def __init__(self, pending: Pending, told: Callable[[str, float, str], None], *, moving: bool) -> None:
        """`told` is called with path, seconds and what went wrong when a checkpoint is complete, or given up."""
        self.newest = ""  # the newest complete one
        self._pending, self._told, self._moving = pending, told, moving
        self._kept: dict[SourceId, Ref] = {}  # where sources move: what the next island takes up
        self._exported: dict[SourceId, tuple[RayIsland, int]] = {}  # who holds it, and of which round it is

    def load(self, checkpoint: str, sources: Mapping[SourceId, RayIsland]) -> None:
        """Islands become the sources of a checkpoint; where sources move, they read what is to be taken up."""
        self.newest = checkpoint
        if self._moving:
            self._kept = {source: island.read(checkpoint, source) for source, island in sources.items()}
            ray.wait(list(self._kept.values()), num_returns=len(self._kept), fetch_local=False)
            return
        asked = {source: island.load(checkpoint, source) for source, island in sources.items()}
        for source, refs in asked.items():
            if get(refs)[0]:
                self._exported[source] = (sources[source], LOADED)

    def exported(self, task: Task, island: RayIsland) -> None:
        """A task with `save` is finished: there is a copy of what belongs to its source, for the next checkpoint."""
        if self._moving:
            self._kept[task.source] = island.kept(task)
        else:
            self._exported[task.source] = (island, task.round)

    def take_up(self, source: SourceId, island: RayIsland) -> None:
        """An island is to go on with a source as it was kept last."""
        island.take_up(source, self._kept[source])

    def forget(self, island: RayIsland) -> None:
        """It is gone, with all that it held."""
        self._exported = {source: held for source, held in self._exported.items() if held[0] is not island}

    def save(
        self, shards: Sequence[Any], writer: RayIsland, root: str, name: str, manifest: Mapping[str, Any], keep: int
    ) -> None:
        """Shards freeze a copy in their queue's order and write it in another thread. `writer`: of what is kept."""
        start_s = time.monotonic()
        folder = ckpt.CheckpointFolder(root)

        def done(answers: list[dict[str, str]], error: Exception | None) -> None:
            files = {path: digest for answer in answers for path, digest in answer.items()}
            problem = folder.conclude(name, manifest, files, keep=keep, error="" if error is None else short(error))
            self.newest = self.newest if problem else f"{root}/{name}"
            self._told(f"{root}/{name}", time.monotonic() - start_s, problem)

        try:
            folder.begin(name)
        except OSError as failure:
            return done([], failure)
        temporary = folder.temporary(name)
        refs = [shard.write.remote(temporary, name, shard.freeze.remote(name)) for shard in shards]
        for source, (island, round_) in self._exported.items():
            refs += island.write(temporary, source, round_)
        self._exported.clear()
        refs += [writer.write_kept(temporary, source, kept) for source, kept in self._kept.items()]
        self._pending.add(refs, done)
