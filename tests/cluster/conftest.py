"""Three hosts, and a Ray cluster on them: made once for all tests of this folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import Machines
from tests.cluster.ray_nodes import Cluster

HOSTS = 3
RATE_BIT_S = 100_000_000
NEEDED = "DILOCO_NEEDS_CLUSTER"  # set: it is a failure where hosts cannot be made, not a reason to skip


@pytest.fixture(scope="package")
def machines() -> Iterator[Machines]:
    """Without Ray."""
    if why := hosts.lacking():
        if os.environ.get(NEEDED):
            pytest.fail(f"{NEEDED} is set, but {why}")
        pytest.skip(why)
    with hosts.machines(HOSTS, rate_bit_s=RATE_BIT_S) as made:
        signal.signal(signal.SIGTERM, _end)  # until they end; the SystemExit of `wan` would only fail one test
        yield made


def _end(number: int, frame: FrameType | None) -> None:
    pytest.exit("terminated", returncode=128 + number)


@pytest.fixture(scope="package")
def cluster(machines: Machines) -> Cluster:
    """A Ray node on each host; it ends with the hosts."""
    made = Cluster(machines=machines)
    for host in range(HOSTS):
        made.start(host)
    return made


@pytest.fixture
def unsteady(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose links and nodes, but for the head, a test may change: they are mended afterwards."""
    yield cluster
    for host in range(1, HOSTS):
        cluster.machines.network.heal(host)
    there = cluster.nodes()
    for host in range(1, HOSTS):
        if cluster.machines.addresses[host] not in there:
            cluster.restart(host)
