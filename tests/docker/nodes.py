"""Ray nodes on loopback, each started by docker/node.sh on ports of its own, and ended by process number."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.toy import wait_for

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "docker" / "node.sh"
START_S = 150.0


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on, of which the 20th and later are for processes."""
    for _ in range(100):
        first = 20_000 + secrets.randbelow(10_000)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as tried:
                    tried.bind(("", port))
            return first
    raise AssertionError("no free ports")


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a node or driver: with a token, and nothing of the Ray that the caller may know."""
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "NODE_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
    return {**kept, "PATH": path, **ray, **(more or {})}


def descendants(process: int) -> set[int]:
    """The numbers of the processes below one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {process}


@dataclass
class Node:
    """One that docker/node.sh runs."""

    folder: Path  # of its log
    arguments: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([NODE, *self.arguments], env=self.environment, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder / f"{self.arguments[0]}.log"

    def await_start(self) -> None:
        """Until it is there."""
        wait_for(lambda: self.process.poll() is not None or "block forever" in self.log.read_text(), limit_s=START_S)
        assert self.process.poll() is None, self.log.read_text()

    def end(self, limit_s: float = 30.0) -> int:
        """SIGTERM; the status that it ends with. What is left of it after that is killed, and is a failure."""
        below = descendants(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(limit_s)
            with suppress(TimeoutError):
                wait_for(lambda: not [child for child in below if runs(child)], limit_s=30.0)
            left = [child for child in below if runs(child)]
            assert not left, f"{len(left)} processes outlived their node"
            return status
        finally:
            for child in [self.process.pid, *below]:
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def head(folder: Path, environment: dict[str, str]) -> tuple[Node, str]:
    """A head with one CPU, and its address; a free port is the first of all its ports."""
    ports = free_ports(300)
    arguments = ["head", f"--port={ports}", f"--dashboard-port={ports + 1}", f"--ray-client-server-port={ports + 2}"]
    node = Node(folder, [*arguments, *small(folder)], {**environment, "NODE_PORTS": str(ports + 10)})
    return node, f"127.0.0.1:{ports}"


def worker(folder: Path, environment: dict[str, str], address: str) -> Node:
    """A worker with one CPU and a resource of the name `worker`."""
    more = {"NODE_PORTS": str(free_ports(300)), "HEAD": address}
    return Node(folder, ["worker", *small(), '--resources={"worker": 1}'], {**environment, **more})


def small(folder: Path | None = None) -> list[str]:
    """Options of a small node; a head's files are below `folder`, in a path short enough for sockets."""
    options = ["--num-cpus=1", f"--object-store-memory={150 << 20}"]
    return [*options, f"--temp-dir={folder}/r"] if folder else options
