"""Nodes of a Ray cluster that come, and that announce that they go: real ones, though all on this machine."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from diloco.checkpoint import Checkpoint
from diloco.runtime import ray_crew
from diloco.runtime.base import Store
from diloco.runtime.ray_cluster import RayCluster
from tests import warm
from tests.conftest import BASE, ROOT
from tests.faults.acting import acting, committed, opened_when_joined, told
from tests.toy import Signalling, launch, records, warned

pytestmark = pytest.mark.timeout(300)  # four nodes on this machine's cores

NOTICE_S = 60.0  # between a notice and the end of its node
SLOW = RayCluster(tick_s=0.2, slowdown=[0.1, 0.1, 0.1])
SETTINGS: dict[str, Any] = {**BASE, "runtime": SLOW, "islands": 3, "rounds": 12, "eval_every": 0}


@pytest.fixture
def cluster(forker: None) -> Iterator[Cluster]:
    """Three nodes with a place for one island each; this process is connected to the first."""
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    with warm.forked_workers():
        made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        made.add_node(**small)
        made.add_node(**small)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    yield made
    ray.shutdown()
    made.shutdown()


def nodes(run: Path, kind: str) -> list[str]:
    """Where the first processes of a kind were, in their order."""
    return [record["node"] for record in told(run) if record["event"] == "process" and record["kind"] == kind]


def announce(node: str) -> None:
    """What a spot notice does: tell Ray that a node goes away, as `ray drain-node` does in seconds of its own."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    until_ms = int(1000 * (time.time() + NOTICE_S))
    accepted, why = client.drain_node(node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", until_ms)
    assert accepted, why


def start_node(address: str) -> subprocess.Popen[bytes]:
    """Another one with a place for one island; it ends with its process."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    options = ["--num-cpus=1", f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--block"]
    command = [ray_command, "start", f"--address={address}", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_an_island_whose_node_leaves_hands_all_of_its_round_over(
    cluster: Cluster, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told that a place is missing; then a node comes, and the island goes on there. No work is lost."""
    monkeypatch.setattr(ray_crew, "MISSING_S", 1.0)
    monkeypatch.setattr(ray_crew, "LOOK_EVERY_S", 0.5)
    run, back = runs / "run", runs / "back"
    # Island 0 has the store beside it, so it stays; it waits in round 10 for the other to be back.
    workload = Signalling(gate=str(back), gate_shard=0, gate_step=10 * 6)
    left: list[str] = []
    came: list[subprocess.Popen[bytes]] = []

    def leave() -> None:
        away = {*nodes(run, "evaluator"), *nodes(run, "shard")}
        left.append(next(node for node in nodes(run, "island") if node not in away))
        announce(left[0])

    def missed() -> bool:
        return any("no place yet for island" in record.get("message", "") for record in told(run))

    def come() -> None:
        came.append(start_node(cluster.address))

    try:
        with acting((committed(run, 2), leave), (missed, come)), opened_when_joined(back, run):
            result = launch(run, **{**SETTINGS, "workload": workload, "rounds": 14, "patience": 100.0})
    finally:
        for node in came:
            node.terminate()
            node.wait(60)
    (lost,) = records(run, "lost")
    assert lost["message"] == "its node is leaving; all its work was handed over"
    island = lost["island"]
    summary = result.summary
    assert (summary["islands_lost"], summary["islands_joined"], summary["recoveries"]) == (1, 1, 0)
    assert summary["contributions"]["late"] == 0
    counted = [island in record["outer/contributors"] for record in records(run, "commit")]
    own = [record for record in records(run, "segment") if record["island"] == island]
    before = {record["round"] for record in own if record["time_s"] < lost["time_s"]}
    assert counted[0] and counted[-1] and not all(counted)
    assert all(counted[round_] for round_ in before)  # of all that it had begun
    places = [r["node"] for r in records(run, "process") if r["kind"] == "island" and r["island"] == island]
    assert places[0] == left[0] != places[-1]
    assert any("the node of island" in message for message in warned(run))
    (missing,) = [message for message in warned(run) if "no place yet for island" in message]
    assert missing.startswith(f"no place yet for island {island}, which wants 1 CPU a worker: the cluster's")


def test_the_store_goes_elsewhere_before_its_node_has_left(
    cluster: Cluster, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint of that moment, so that no round is trained again."""
    monkeypatch.setattr(ray_crew, "LOOK_EVERY_S", 0.5)
    run = runs / "run"

    def leave() -> None:
        head = nodes(run, "evaluator")[0]
        announce(next(node for node in nodes(run, "shard") if node != head))

    with acting((committed(run, 2), leave)):
        result = launch(
            run, **{**SETTINGS, "min_islands": 1, "store": Store(shards=3), "checkpoint": Checkpoint(every=0)}
        )
    summary = result.summary
    assert (summary["status"], summary["rounds"]) == ("finished", 12)
    assert (summary["recoveries"], summary["rounds_again"]) == (1, 0)
    assert [record["round"] for record in records(run, "commit")] == list(range(1, 13))
    assert any("a node that holds a part of the store is leaving" in message for message in warned(run))
