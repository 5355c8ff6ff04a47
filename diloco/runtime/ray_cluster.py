"""Runtime `ray_cluster`: islands, evaluator and the shards of the store as Ray actors, on one machine or many."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diloco.runtime.base import Backend, Job, Runtime, one_each
from diloco.runtime.ray_backend import RayBackend
from diloco.runtime.ray_start import connect


@dataclass(kw_only=True)
class RayCluster(Runtime):
    """Ray actors: on the cluster at `address` or RAY_ADDRESS where there is one, else on this machine."""

    loses_islands = True

    address: str = ""
    tick_s: float = 1.0  # how often the coordinator hears of the time
    object_store_bytes: int = 0  # where Ray is started here; 0 = what a few rounds need
    slowdown: list[float] = field(default_factory=list)  # seconds to sleep after each inner step, one number an island

    def __post_init__(self) -> None:
        if not self.tick_s > 0:
            raise ValueError(f"runtime.tick_s={self.tick_s} must be positive")
        if self.object_store_bytes != 0 and self.object_store_bytes < 80 << 20:
            raise ValueError(f"runtime.object_store_bytes={self.object_store_bytes} is below 80 MiB; 0 derives it")
        if any(not 0 <= seconds < float("inf") for seconds in self.slowdown):
            raise ValueError(f"runtime.slowdown={self.slowdown} must hold seconds, none of them negative")

    def open(self, job: Job) -> Backend:
        """Connects, or starts Ray; refuses more islands than can be placed."""
        one_each("runtime.slowdown", self.slowdown, job.islands)
        job = replace(job, pauses_s=tuple(self.slowdown))
        ours = connect(job, address=self.address, object_store_bytes=self.object_store_bytes)
        return RayBackend(job, tick_s=self.tick_s, shut_down=ours)
