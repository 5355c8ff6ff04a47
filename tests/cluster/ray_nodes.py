"""A Ray cluster on the hosts of `hosts`: a node with one CPU on each, which may come and go."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks import wan
from tests.cluster.hosts import ROOT, Machines
from tests.toy import records, wait_for

COMMAND = ("python", "-m", "experiments.train")
LIMIT_S = 500.0  # of a run
STORE_BYTES = 100 << 20
DASHBOARD_PORT = 8265
NODE = {  # environment of the nodes
    **wan.RAY_SETTINGS,
    "RAY_preallocate_plasma_memory": "0",
    # A node that is cut off is given up after about 20 s, with Ray's own settings after a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}
TOY = (  # as `toy.launch` with this workload and inner optimizer
    *("--import", "tests.toy", "workload=line", "workload.dropout=0.3", "inner.lr=0.01"),
    *("inner_steps=6", "segment_steps=2", "metrics.live=false"),
)
NODES = """
import sys, time, ray
ray.init(log_to_driver=False)
while len(there := [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]) < int(sys.argv[1]):
    time.sleep(0.5)
print(*there)
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Host 0 is the head. Nothing runs before `start`."""

    machines: Machines

    @property
    def address(self) -> str:
        """As RAY_ADDRESS wants it."""
        return f"{self.machines.addresses[0]}:{wan.RAY_PORT}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.machines.addresses[0]}:{DASHBOARD_PORT}"

    def node(self, host: int) -> list[str]:
        """The command that starts a node."""
        address = self.machines.addresses[host]
        head = [f"--port={wan.RAY_PORT}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
        role = ["--head", *head] if host == 0 else [f"--address={self.address}"]
        size = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
        return ["ray", "start", *role, f"--node-ip-address={address}", *size, "--disable-usage-stats"]

    def start(self, host: int, **environment: str) -> None:
        """A node on this host."""
        done = self.machines.run(host, *self.node(host), environment={**NODE, **environment}, limit_s=180.0)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self, host: int) -> None:
        """End it. `ray stop` ends every Ray that it sees: here those of the host, which has processes of its own."""
        done = self.machines.run(host, "ray", "stop", "--force", limit_s=180.0)
        assert done.returncode == 0, done.stdout + done.stderr

    def restart(self, host: int, **environment: str) -> None:
        """As what watches over a node does: Ray itself ends on a host that was given up."""
        self.stop(host)
        self.start(host, **environment)

    def nodes(self, *, least: int = 1) -> list[str]:
        """The addresses of those that there are, once they are so many."""
        command = ["python", "-c", NODES, str(least)]
        done = self.machines.run(0, *command, limit_s=120.0, environment={"RAY_ADDRESS": self.address})
        assert done.returncode == 0, done.stderr or f"there are never {least} nodes"
        return done.stdout.split()

    def train(
        self, *overrides: str, host: int = 0, limit_s: float = LIMIT_S, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A run that is started on a host, in the folder that all see."""
        inside = {**self._driver(), **environment}
        return self.machines.run(host, *COMMAND, *overrides, limit_s=limit_s, environment=inside)

    def finished(self, name: str, *overrides: str) -> dict[str, Any]:
        """The summary of a run that finishes."""
        done = self.train(f"name={name}", *overrides)
        assert done.returncode == 0, done.stderr
        return self.summary(name)

    def summary(self, name: str) -> dict[str, Any]:
        """What the run of this name came to."""
        (file,) = (self.machines.folder / "runs").glob(f"*_{name}/summary.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    @contextmanager
    def training(self, name: str, *overrides: str, within: Sequence[str] = ()) -> Iterator[Training]:
        """A run, while it goes on; what comes before its command may hand it on to elsewhere."""
        command = [*within, *COMMAND, f"name={name}", *overrides]
        inside = self.machines.command(0, *command, limit_s=LIMIT_S, environment=self._driver())
        with (self.machines.folder / f"{name}.txt").open("w+") as said:
            process = subprocess.Popen(inside, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            try:
                yield Training(cluster=self, name=name, process=process, said=Path(said.name))
            finally:
                self.machines.end(process)

    @contextmanager
    def cut(self, host: int) -> Iterator[None]:
        """Meanwhile nothing gets through to a host, or from it."""
        self.machines.network.cut(host)
        try:
            yield
        finally:
            self.machines.network.heal(host)

    def _driver(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run that goes on in a host."""

    cluster: Cluster
    name: str
    process: subprocess.Popen[bytes]
    said: Path  # what it prints

    def records(self, *events: str) -> list[dict[str, Any]]:
        """What it has told so far, of these events."""
        found: list[Path] = []
        with suppress(FileNotFoundError):  # made to try whether it can be written to, and removed again
            found += (self.cluster.machines.folder / "runs").glob(f"*_{self.name}/metrics.jsonl")
        return records(found[0].parent, *events) if found else []

    def wait_for(self, event: str, **values: object) -> None:
        """Until it tells of that event with these values. TimeoutError where it does not, or ends before."""

        def there() -> bool:
            ended = self.process.poll() is not None
            if any(values.items() <= record.items() for record in self.records(event)):
                return True
            if ended:
                raise TimeoutError(f"the run ended without {event} {values}: {self.said.read_text()}")
            return False

        wait_for(there, limit_s=LIMIT_S)

    def end(self) -> dict[str, Any]:
        """Wait until it is finished; its summary."""
        status = self.process.wait()
        assert status == 0, self.said.read_text()
        return self.cluster.summary(self.name)
