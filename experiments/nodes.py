"""What doctor asks of Ray: whether it runs an actor, and, of a cluster, what its nodes are, have and lack."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diloco.runtime.ray_address import listens as listens

PROBE_LIMIT_S = 90
NODE_LIMIT_S = 30  # for all nodes to answer
PROBE_STORE_BYTES = 100 << 20
HANDSHAKES = 3  # of which the quickest counts
TLS_FILES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")


@dataclass(kw_only=True)
class Node:
    """One node of a cluster, as it answered."""

    address: str
    cpus: float
    gpus: float
    memory: int  # bytes
    silent: bool = False  # it did not answer, and what follows is not known
    project: str = ""  # version of the project there; empty = not installed
    rtt_s: dict[str, float] = field(default_factory=dict)  # to each of the others that it reaches
    buffers: dict[str, list[int]] = field(default_factory=dict)  # see links.py


@dataclass(frozen=True)
class Secured:
    """Whether something is as it should be, what it is, and a remedy."""

    good: bool
    found: str
    mend: str = ""


class NoAnswer(ValueError):
    """Ray does not run an actor."""


def ask(address: str) -> list[Node]:
    """The nodes of the cluster at `address`, or of a Ray that is started here for that; in a process of its own.

    Raises NoAnswer.
    """
    command = [sys.executable, "-c", "import sys; from experiments.nodes import probe; probe(sys.argv[1])", address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"does not answer within {PROBE_LIMIT_S} s") from None
    try:
        return [Node(**node) for node in json.loads(answer.stdout.splitlines()[-1])]
    except (IndexError, ValueError):
        said = answer.stderr.strip().splitlines() or ["nothing was said"]
        raise NoAnswer(f"does not run an actor: {said[-1]}") from None


def probe(address: str) -> None:
    """Run an actor, ask all nodes, and print them as JSON. Called in another process by `ask`."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", object_store_memory=PROBE_STORE_BYTES, include_dashboard=False, **quiet)

    class Echo:  # within a function, so that it travels to nodes where the project is another, or none
        def say(self) -> str:
            return "here"

    echo: Any = ray.remote(Echo).options(num_cpus=0).remote()
    assert ray.get(echo.say.remote()) == "here"
    list_nodes: Any = ray.nodes
    alive = [node for node in list_nodes() if node["Alive"]]
    found = [_plain(node) for node in alive]
    if address:
        _fill(found, alive)
    ray.shutdown()
    print(json.dumps([asdict(node) for node in found]))


def _plain(node: Mapping[str, Any]) -> Node:
    cpus, gpus, memory = (node["Resources"].get(name, 0) for name in ("CPU", "GPU", "memory"))
    return Node(address=node["NodeManagerAddress"], cpus=cpus, gpus=gpus, memory=int(memory))


def _fill(found: list[Node], alive: list[dict[str, Any]]) -> None:
    """What each node says of itself, and of the way to the others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(others: list[tuple[str, int]], limits: tuple[str, ...], handshakes: int) -> dict[str, Any]:
        import importlib
        import socket
        import time
        from pathlib import Path

        answer: dict[str, Any] = {"project": "", "rtt_s": {}, "buffers": {}}
        try:
            answer["project"] = importlib.import_module("diloco.versions").own()
        except ImportError:  # none, or an old one
            pass
        for name in limits:
            try:
                text = Path("/proc/sys", *name.split(".")).read_text()
                answer["buffers"][name] = [int(part) for part in text.split()]
            except (OSError, ValueError):
                pass
        for host, port in others:
            try:
                for _ in range(handshakes):
                    start_s = time.perf_counter()
                    socket.create_connection((host, port), timeout=5).close()
                    took_s = time.perf_counter() - start_s
                    answer["rtt_s"][host] = min(took_s, answer["rtt_s"].get(host, took_s))
            except OSError:
                pass
        return answer

    from experiments.links import LIMITS

    places = [(node["NodeManagerAddress"], int(node["NodeManagerPort"])) for node in alive]
    asked: dict[Any, Node] = {}
    for node, raw, place in zip(found, alive, places, strict=True):
        there = NodeAffinitySchedulingStrategy(raw["NodeID"], soft=False)
        remote: Any = ray.remote(look).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        asked[remote.remote([other for other in places if other != place], LIMITS, HANDSHAKES)] = node
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_LIMIT_S)
    for answer, node in asked.items():
        try:
            told = ray.get(answer, timeout=0) if answer in ready else None
        except ray.exceptions.RayError:
            told = None
        node.silent = told is None
        for name, value in (told or {}).items():
            setattr(node, name, value)


def own_version() -> str:
    """The project's version in this process."""
    from diloco import versions

    return versions.own()


def token_state(environment: Mapping[str, str]) -> Secured:
    """A cluster's authentication as this process would use it."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        text = "off (RAY_AUTH_MODE is not token): whoever reaches the cluster's ports runs code on it"
        return Secured(False, text, "RAY_AUTH_MODE=token on every node and for every run; docker/README.md says how")
    if environment.get("RAY_AUTH_TOKEN"):
        return Secured(True, "asked for, in RAY_AUTH_TOKEN")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not _readable(path):
        mend = f"copy the head's there and chmod 600 {path}; a first one: ray get-auth-token --generate"
        return Secured(False, f"asked for, but {path} is not there, empty or not readable", mend)
    return _private(path, f"asked for, in {path}")


def tls_state(environment: Mapping[str, str]) -> Secured:
    """Encryption between nodes as this process would use it."""
    if environment.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return Secured(True, "off: on a network that others share, use a VPN or RAY_USE_TLS=1 (docker/README.md)")
    for name in TLS_FILES:
        path = Path(environment.get(name, ""))
        if not environment.get(name) or not _readable(path):
            text = f"on, but {name}={environment.get(name, '')} is not there, empty or not readable"
            return Secured(False, text, "docker/make-certificates.sh DIR ADDRESS ... makes all three")
    return _private(Path(environment["RAY_TLS_SERVER_KEY"]), "on")


def _private(path: Path, found: str) -> Secured:
    """`found`, unless others may read the file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Secured(False, f"{found}; others may read {path} (mode {mode:04o})", f"chmod 600 {path}")
    return Secured(True, found)


def _readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK) and path.stat().st_size > 0
