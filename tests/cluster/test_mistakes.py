"""What is wrong with a cluster is said in a line or two, with exit status 2, and soon."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT
from tests.cluster.ray_nodes import TOY, Cluster

pytestmark = pytest.mark.timeout(400)

SOON_S = 150.0  # on a busy machine; Ray by itself asks for a quarter of an hour


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It was said in at most two lines what is wrong."""
    told = [
        line for line in done.stderr.splitlines() if not line.startswith(("preparing ", "starting ", "waiting ", "["))
    ]
    assert done.returncode == 2, done.stderr
    assert told[0].startswith("error: ") and len(told) <= 2, done.stderr
    assert all(word in " ".join(told) for word in words), told


@pytest.mark.parametrize("token", ["wrong", "none", "off"])
def test_a_token_that_does_not_fit(token: str, cluster: Cluster) -> None:
    environment = {
        "wrong": {"RAY_AUTH_TOKEN": "0" * 64},
        "none": {"RAY_AUTH_TOKEN_PATH": "/nowhere"},
        "off": {"RAY_AUTH_MODE": "disabled"},
    }
    done = cluster.train(*TOY, "islands=3", limit_s=SOON_S, **environment[token])
    refused(done, "does not let this process in", "RAY_AUTH_MODE=token", "auth_token")


def test_an_address_where_nobody_answers(cluster: Cluster) -> None:
    host, _, _ = cluster.address.rpartition(":")
    other = host.rpartition(".")[0] + ".99"
    for address in (f"{host}:6399", f"{other}:6379"):
        done = cluster.train(*TOY, "islands=3", limit_s=SOON_S, RAY_ADDRESS=address)
        refused(done, f"no Ray cluster answers at {address}", "start it, or unset RAY_ADDRESS")


@pytest.mark.parametrize("more", [("islands=4",), ("islands=2", "workers=2")])
def test_too_few_places(more: tuple[str, ...], cluster: Cluster) -> None:
    done = cluster.train(*TOY, *more, limit_s=SOON_S)
    refused(done, " ".join(more), "3 node(s)", "have places for 3; use fewer or start more nodes")


def test_checkpoints_that_workers_cannot_see(cluster: Cluster) -> None:
    done = cluster.train(*TOY, "islands=3", "checkpoint.path=/root/checkpoints", limit_s=SOON_S)
    refused(done, "/root/checkpoints", "all nodes", "checkpoint.path")
    assert not (cluster.machines.home(0) / "checkpoints").exists(), "nothing is left behind"


@pytest.fixture
def elsewhere(unsteady: Cluster) -> Iterator[Path]:
    """A copy of the project in the place of that of host 2."""
    copy = unsteady.machines.home(2) / "copy"
    for package in ("diloco", "dipaco", "experiments"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    unsteady.restart(2, PYTHONPATH="/root/copy")
    yield copy
    unsteady.restart(2)


def test_another_version_of_the_project_on_a_node(elsewhere: Path, unsteady: Cluster) -> None:
    actors = elsewhere / "diloco" / "runtime" / "ray_actors.py"
    for text in (f"{actors.read_text()}# another line\n", '"""A version in which nothing of this is there."""\n'):
        actors.write_text(text)
        done = unsteady.train(*TOY, "islands=3", limit_s=SOON_S)
        refused(done, unsteady.machines.addresses[2], "the same version on all nodes")
