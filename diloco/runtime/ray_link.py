"""How fast objects go from node to node of a Ray cluster: the link that a run would have."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diloco.runtime.ray_address import connect_to

OBJECT_BYTES = 20 << 20
REPEATS = 3  # of which the median counts; one more comes first, for the connection
MOST_NODES = 8  # that are measured against the first
LIMIT_S = 60.0  # for one object, and for an actor to start


class End:
    """One end of a link; an actor."""

    def make(self) -> list[ray.ObjectRef[Any]]:
        """A new object that lies here, in a list so that it is not fetched along."""
        return [ray.put(np.random.default_rng().integers(0, 256, OBJECT_BYTES, dtype=np.uint8))]

    def fetch(self, refs: list[ray.ObjectRef[Any]]) -> float:
        """Seconds until the object is here."""
        start_s = time.perf_counter()
        found = ray.get(refs[0])
        spent_s = time.perf_counter() - start_s
        assert found.nbytes == OBJECT_BYTES
        return spent_s


def measured_gbits(address: str) -> float | None:
    """Gbit/s between the first node of the cluster at `address` and the slowest of some others.

    One object of 20 MiB at a time, each way between two nodes, latency included; None where there is one node.
    Leaves the cluster as it was. Raises ValueError where none answers in time.
    """
    connect_to(address)
    try:
        list_nodes: Any = ray.nodes
        nodes = [str(node["NodeID"]) for node in list_nodes() if node["Alive"]][: MOST_NODES + 1]
        if len(nodes) < 2:
            return None
        shell: Any = ray.remote(End)
        ends = [
            shell.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
        ]
        pairs = [pair for other in ends[1:] for pair in ((ends[0], other), (other, ends[0]))]
        return min(8 * OBJECT_BYTES / 1e9 / _seconds(*pair) for pair in pairs)
    except ray.exceptions.GetTimeoutError as error:
        raise ValueError(
            f"the nodes of the cluster at {address} do not exchange {OBJECT_BYTES >> 20} MiB within {LIMIT_S:.0f} s;"
            " give --link"
        ) from error
    finally:
        ray.shutdown()


def _seconds(sender: Any, receiver: Any) -> float:
    """The median time that an object takes from one to the other."""
    found = []
    for _ in range(1 + REPEATS):
        refs = ray.get(sender.make.remote(), timeout=LIMIT_S)
        found.append(float(ray.get(receiver.fetch.remote(refs), timeout=LIMIT_S)))
    return statistics.median(found[1:])
