"""docker/node.sh: nodes with a token and TLS do work, a worker leaves in order, and each ends what is its own."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import nodes

pytestmark = pytest.mark.timeout(500)

ROOT = Path(__file__).resolve().parents[2]
DRAIN_S = 15  # `ray drain-node` alone may take 8 on a busy machine
# An actor on the worker gets a large object and gives one back; then it tells when its node is to leave.
DRIVER = """
import json, sys, time
import numpy as np
import ray
from ray._private.state import state

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

class Actor:
    def total(self, values):
        return int(values.sum())
    def made(self, size):
        return np.full(size, 3, dtype=np.uint8)

actor = ray.remote(Actor).options(num_cpus=0, resources={"worker": 1}).remote()
values = np.full(20 << 20, 2, dtype=np.uint8)
told = {"total": ray.get(actor.total.remote(ray.put(values)), timeout=60)}
told["made"] = int(ray.get(actor.made.remote(10 << 20), timeout=60).sum())
print(json.dumps(told), flush=True)
deadline_s = time.monotonic() + 60
while not state.get_draining_nodes() and time.monotonic() < deadline_s:
    time.sleep(0.1)
leaving = state.get_draining_nodes()
names = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
print(json.dumps({"leaves": [sorted(names[node]) for node in leaving],
                  "in_s": [at_ms / 1000 - time.time() for at_ms in leaving.values()]}), flush=True)
if len(sys.argv) > 2:
    ray.kill(actor)
    del actor
while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < deadline_s:
    time.sleep(0.1)
print(json.dumps({"alive": sum(node["Alive"] for node in ray.nodes())}), flush=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a short name: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="n") as name:
        yield Path(name)


def certificates(folder: Path) -> dict[str, str]:
    """Those for this machine, as variables."""
    from ray._common.network_utils import node_ip_address_from_perspective

    make = [ROOT / "docker" / "make-certificates.sh", folder / "tls", node_ip_address_from_perspective()]
    subprocess.run(make, check=True, capture_output=True)
    files = {"CA_CERT": "ca.crt", "SERVER_CERT": "node.crt", "SERVER_KEY": "node.key"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(folder / "tls" / file) for name, file in files.items()}


def asked(url: str, token: str) -> int:
    """The status that the dashboard answers with."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def encrypted(folder: Path, host: str, port: int) -> bool:
    """Whether a port speaks TLS with the cluster's certificate."""
    if not (folder / "tls").is_dir():
        context = ssl._create_unverified_context()
    else:
        context = ssl.create_default_context(cafile=str(folder / "tls" / "ca.crt"))
        context.load_cert_chain(folder / "tls" / "node.crt", folder / "tls" / "node.key")
    with socket.create_connection((host, port), timeout=10) as plain:
        try:
            context.wrap_socket(plain, server_hostname=host).close()
        except (ssl.SSLError, OSError):
            return False
    return True


def told_by_doctor(environment: dict[str, str], address: str) -> None:
    """`diloco doctor` looks at both nodes."""
    command = [sys.executable, "-m", "experiments.cli", "doctor", "--link", "1gbit"]
    where = {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=environment | where, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for words in ("2 node(s)", "on all nodes", "ms between nodes", "asked for, in ", "1 Gbit/s over a round trip"):
        assert words in answer.stdout, words


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_a_worker_leaves_in_order(folder: Path, tls: bool) -> None:
    environment = nodes.environment(folder, certificates(folder) if tls else {})
    head, address = nodes.head(folder, environment)
    try:
        head.await_start()
        host, port = address.split(":")
        assert [asked(f"http://{host}:{int(port) + 1}/api/version", token) for token in ("", "f" * 64)] == [401, 403]
        # GCS, node manager, object manager and dashboard agent: what other nodes speak with
        assert {encrypted(folder, host, int(port) + more) for more in (0, 10, 11, 13)} == {tls}
        worker = nodes.worker(folder, {**environment, "NODE_DRAIN_S": str(DRAIN_S)}, address)
        try:
            worker.await_start()
            if not tls:
                told_by_doctor(environment, address)
            # without TLS, the island goes at once, and the node with it; with TLS it stays until the end
            command = [sys.executable, "-c", DRIVER, address, *([] if tls else ["leave"])]
            driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            assert driver.stdout is not None
            told = json.loads(driver.stdout.readline())
            assert told == {"total": 2 * (20 << 20), "made": 3 * (10 << 20)}
        finally:
            begun_s = time.monotonic()
            assert worker.end(90.0) == 0, worker.log.read_text()
            took_s = time.monotonic() - begun_s
        rest, _ = driver.communicate(timeout=60)
        leaving, end = (json.loads(line) for line in rest.splitlines())
        assert len(leaving["leaves"]) == 1 and "worker" in leaving["leaves"][0]
        assert 0 < leaving["in_s"][0] <= DRAIN_S and end == {"alive": 1}
        # bash counts whole seconds
        assert took_s > DRAIN_S - 1 if tls else took_s < DRAIN_S + 3
        assert head.process.poll() is None, "the head goes on"
    finally:
        assert head.end() == 0, head.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        ([], {}, "usage"),
        (["tail"], {}, "NODE_DRAIN_S"),
        (["worker"], {}, "a worker needs HEAD=host"),
        (["head"], {"NODE_PORTS": "many"}, "whole numbers, not many"),
    ],
)
def test_mistakes_are_told(folder: Path, arguments: list[str], more: dict[str, str], words: str) -> None:
    answer = subprocess.run(
        [nodes.NODE, *arguments], env=nodes.environment(folder, more), capture_output=True, text=True, timeout=30
    )
    assert answer.returncode == 2
    assert words in answer.stderr or "node.sh head" in answer.stderr


def test_a_stop_while_it_starts(folder: Path) -> None:
    head, _ = nodes.head(folder, nodes.environment(folder))
    time.sleep(1.5)
    assert head.end() == 0
