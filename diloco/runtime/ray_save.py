"""Checkpoints on Ray: what the islands exported for the next one, and which is the newest that is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diloco import checkpoint as ckpt
from diloco.messages import SourceId
from diloco.runtime.ray_island import RayIsland
from diloco.runtime.ray_refs import Pending, short


class Saver:
    """Asks shards and islands to write, and completes what they wrote."""

    def __init__(self, pending: Pending, told: Callable[..., None]) -> None:
        """`told` is called with path, seconds and what went wrong when a checkpoint is complete, or given up."""
        self.newest = ""  # the newest complete one
        self._pending, self._told = pending, told
        self._exported: dict[SourceId, tuple[RayIsland, int]] = {}  # who holds it, and of which round it is

    def exported(self, source: SourceId, island: RayIsland, round_: int) -> None:
        """An island holds a copy of what belongs to `source`, for the next checkpoint."""
        self._exported[source] = (island, round_)

    def forget(self, island: RayIsland) -> None:
        """It is gone, with all that it held."""
        self._exported = {source: held for source, held in self._exported.items() if held[0] is not island}

    def save(self, shards: Sequence[Any], root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """Shards freeze a copy in their queue's order and write it in another thread."""
        start_s = time.monotonic()
        folder = ckpt.CheckpointFolder(root)

        def done(answers: list[dict[str, str]], error: Exception | None) -> None:
            files = {path: digest for answer in answers for path, digest in answer.items()}
            problem = folder.conclude(name, manifest, files, keep=keep, error="" if error is None else short(error))
            self.newest = self.newest if problem else f"{root}/{name}"
            self._told(path=f"{root}/{name}", seconds=time.monotonic() - start_s, error=problem)

        try:
            folder.begin(name)
        except OSError as failure:
            return done([], failure)
        temporary = folder.temporary(name)
        refs = [shard.write.remote(temporary, name, shard.freeze.remote(name)) for shard in shards]
        for source, (island, round_) in self._exported.items():
            refs += island.write(temporary, source, round_)
        self._exported.clear()
        self._pending.add(refs, done)
