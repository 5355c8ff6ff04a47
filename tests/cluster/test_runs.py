"""Runs over three hosts with links of 100 Mbit/s, also while a host is cut off, or comes late."""

from __future__ import annotations

import json
import time

import pytest

from tests.cluster.hosts import ROOT, Machines
from tests.cluster.ray_nodes import LIMIT_S, TOY, Cluster, Training
from tests.toy import wait_for

pytestmark = pytest.mark.timeout(900)

SMOKE = ("+experiment=smoke", "rounds=2", "islands=3", "metrics.live=false", "data.cache=cache")
CUT_S = 4.0


def sent_bytes(machines: Machines) -> list[int]:
    """By each host so far."""
    file = "/sys/class/net/eth0/statistics/tx_bytes"
    return [int(machines.run(host, "cat", file).stdout) for host in range(len(machines.addresses))]


def gated(cluster: Cluster, round_: int) -> tuple[str, ...]:
    """A toy whose first island goes on from that round on, counted from 1, only once the file `gate` is there."""
    gate = cluster.machines.folder / "gate"
    gate.unlink(missing_ok=True)
    return (*TOY, "workload=signalling", f"workload.gate={gate}", f"workload.gate_step={6 * (round_ - 1)}")


def opened(cluster: Cluster) -> None:
    (cluster.machines.folder / "gate").touch()


def contributors(run: Training) -> list[list[int]]:
    """Of each round so far."""
    return [record["outer/contributors"] for record in run.records("commit")]


def test_the_same_bits_as_in_one_process(unsteady: Cluster) -> None:
    """Though one of the hosts is cut off for some seconds."""
    before = sent_bytes(unsteady.machines)
    with unsteady.training("spread", *SMOKE) as run:
        run.wait_for("commit", round=1)
        with unsteady.cut(2):
            time.sleep(CUT_S)
        spread = run.end()
    sent = [after - then for after, then in zip(sent_bytes(unsteady.machines), before, strict=True)]
    alone = unsteady.finished("alone", *SMOKE, "runtime=local")
    for key in ("weights_sha256", "outer_state_sha256", "tokens", "bytes_sent"):
        assert spread[key] == alone[key], key
    assert spread["islands_lost"] == 0
    # Of what an island sends, two thirds go to shards of the store on the other hosts.
    assert min(sent) > 2 / 3 * 4 * spread["parameters"] * spread["rounds"], f"{sent}: not every host took part"


def test_a_submitted_job(cluster: Cluster) -> None:
    """Its driver is killed, and the command goes on with its run by itself, in the same job."""
    environment = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})  # for the toy
    options = ["--address", cluster.dashboard, "--runtime-env-json", environment]
    submit = ["ray", "job", "submit", *options, "--"]
    slow = ("rounds=8", "runtime.slowdown=[0.2,0.2,0.2]", "eval_every=0", "checkpoint.every=1", "resume=auto")
    with cluster.training("job", "--restarts", "2", *TOY, "islands=3", *slow, within=submit) as run:
        run.wait_for("checkpoint", round=2)
        (driver,) = [record for record in run.records("process") if record["kind"] == "driver"]
        host = cluster.machines.addresses.index(driver["host"])
        assert cluster.machines.run(host, "kill", "-KILL", str(driver["pid"])).returncode == 0
        found = run.end()
        said = run.said.read_text()
    assert (found["status"], found["islands"], found["rounds"]) == ("finished", 3, 8)
    assert [record["round"] for record in run.records("commit")] == list(range(1, 9))
    assert "starting it again, 1 more time(s)" in said and found["run_directory"] in said, "the job's output is shown"
    stranger = cluster.machines.run(1, *submit, "ls", environment={"RAY_AUTH_TOKEN": "0" * 64})
    assert stranger.returncode != 0


def test_a_host_that_is_cut_off_for_long(unsteady: Cluster) -> None:
    """The others go on. Ray gives up the node, which is started anew; its island takes part from the next round on."""
    slow = "runtime.slowdown=[0.3,0.3,0.3]"  # so that the cut comes within round 3
    overrides = ("islands=3", "store.shards=1", "rounds=7", "patience=0", slow)
    with unsteady.training("long_cut", *gated(unsteady, 5), *overrides) as run:
        run.wait_for("commit", round=2)
        places = {record["kind"]: record["host"] for record in run.records("process") if record["kind"] != "island"}
        hosts = {record["host"]: record["island"] for record in run.records("process") if record["kind"] == "island"}
        (far, *_) = sorted(set(hosts) - set(places.values()))  # without a part of the store, or the driver
        with unsteady.cut(unsteady.machines.addresses.index(far)):
            run.wait_for("lost", island=hosts[far])
            run.wait_for("commit", round=4)
        unsteady.restart(unsteady.machines.addresses.index(far))
        run.wait_for("joined", island=hosts[far])
        opened(unsteady)
        found = run.end()
    assert (found["status"], found["islands_lost"], found["islands_joined"]) == ("finished", 1, 1)
    rest = [island for island in range(3) if island != hosts[far]]
    heard = contributors(run)
    assert found["tokens"] == sum(map(len, heard)) * 6 * 8
    assert (heard[:2], heard[3:5], heard[5:]) == ([[0, 1, 2]] * 2, [rest] * 2, [[0, 1, 2]] * 2)


def test_a_host_that_joins_late(unsteady: Cluster) -> None:
    """The run begins with two, and from the next round on has three."""
    unsteady.stop(2)
    with unsteady.training("late", *gated(unsteady, 2), "islands=2", "max_islands=3", "rounds=4", "patience=0") as run:
        run.wait_for("commit", round=1)
        unsteady.start(2)
        run.wait_for("joined", island=2)
        opened(unsteady)
        found = run.end()
    assert (found["status"], found["islands_lost"], found["islands_joined"]) == ("finished", 0, 1)
    assert contributors(run) == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert found["tokens"] == 10 * 6 * 8


def test_a_host_that_is_lost_with_a_part_of_the_store(unsteady: Cluster) -> None:
    """The run returns to its checkpoint, goes on with the two islands that have a place, and later has three again."""
    slow = ("rounds=30", "runtime.slowdown=[0.05,0.05,0.05]", "eval_every=0", "patience=0")
    store = ("islands=3", "store.shards=3", "checkpoint.every=1")
    with unsteady.training("store", *gated(unsteady, 25), *slow, *store) as run:
        run.wait_for("commit", round=3)
        unsteady.stop(2)
        wait_for(lambda: any(len(heard) == 2 for heard in contributors(run)), limit_s=LIMIT_S)
        unsteady.start(2)
        run.wait_for("joined")
        opened(unsteady)
        found = run.end()
    assert (found["status"], found["recoveries"]) == ("finished", 1) and found["rounds_again"] <= 1
    assert [record["round"] for record in run.records("commit")] == list(range(1, 31))
    heard = contributors(run)
    assert heard[:3] == [[0, 1, 2]] * 3 == heard[-3:]
    assert found["tokens"] == sum(map(len, heard)) * 6 * 8
