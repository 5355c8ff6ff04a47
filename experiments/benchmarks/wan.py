"""Several hosts on one Linux machine, each behind a rate-limited link of its own; and Ray on them.

A host is a network namespace; all hang on one bridge, which lies in a namespace of its own, so that the machine's
network is neither touched nor reached. A token-bucket filter at both ends of a host's link limits what it sends and
what it receives. Hosts share files, processes and the clock with the machine.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from experiments.benchmarks import common
from experiments.benchmarks.pace import environment_alone

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "iperf3": "iperf3"}  # command -> what to install for it
NETWORK = "10.77.0"  # host k has the address NETWORK.(k+1)
DEVICE = "eth0"  # a host's end of its link
BURST_S, QUEUE_S = 0.004, 0.05  # what the filter lets pass at once, and the longest wait in its queue
LEAST_BURST_BYTES, LEAST_QUEUE_BYTES = 10_000, 65_536  # so that slow links carry whole segments
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
MEASURE_S = 3  # of a line, by iperf3
END_S = 10.0  # for processes to end after SIGTERM
RECEIVED = ("sum_received", "sum_received_bidir_reverse")  # names of iperf3 for the two directions
RAY_PORT = 6379
NOTHING: Mapping[str, str] = MappingProxyType({})
RAY_SETTINGS = {  # environment of the nodes
    "RAY_object_manager_max_bytes_in_flight": str(5 << 20),  # a chunk: more get in each other's way on a slow link
    "RAY_preallocate_plasma_memory": "1",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "300",  # all hosts share this machine's cores
}


def check(option: str, commands: Sequence[str] = tuple(PACKAGES)) -> None:
    """Raise ValueError where hosts cannot be made or used here: what is missing, and how to get it."""
    lacking = [command for command in commands if shutil.which(command) is None]
    if lacking:
        packages = " ".join(sorted({PACKAGES[command] for command in lacking}))
        raise ValueError(f"{option} needs {' and '.join(lacking)}, not found here: apt-get install {packages}")
    if os.geteuid() != 0:
        raise ValueError(f"{option} needs root, for network namespaces: run it with sudo, or in a container as root")


def bits_per_s(rate: str) -> int:
    """A rate as tc writes it, 200mbit, as a number. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if found is None or not 8_000 <= float(found[1]) * UNITS[found[2]] <= 32e9:
        raise ValueError(f"rate {rate!r} is not a number with kbit, mbit or gbit between 8kbit and 32gbit")
    return round(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts that stand. Made by `hosts`."""

    names: tuple[str, ...]  # of their namespaces
    addresses: tuple[str, ...]
    hub: str  # the namespace of the bridge

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """What runs `command` in a host, with the process id of whoever calls it."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def set_rate(self, host: int, rate_bit_s: int) -> None:
        """Limit what a host sends and what it receives, also while it does."""
        _limit(self.names[host], DEVICE, rate_bit_s)
        _limit(self.hub, f"host{host}", rate_bit_s)

    def cut(self, host: int) -> None:
        """Unplug a host: it keeps its address, nothing gets through, and connections hang until they time out."""
        _ip("-n", self.hub, "link", "set", f"host{host}", "down")

    def heal(self, host: int) -> None:
        """Plug it in again."""
        _ip("-n", self.hub, "link", "set", f"host{host}", "up")

    def pids(self, host: int) -> list[int]:
        """The processes in a host."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[host]).split()]

    def end(self, host: int) -> None:
        """End all processes in a host, at last by SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids(host):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline_s = time.monotonic() + END_S
            while self.pids(host) and time.monotonic() < deadline_s:
                time.sleep(0.1)


def found(prefix: str) -> Hosts:
    """Hosts that another process has made, by what their names begin with. Raises ValueError where there are none."""
    there = {line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()}
    names = sorted((each for each in there if re.fullmatch(rf"{re.escape(prefix)}-\d+", each)), key=_number)
    if len(names) < 2 or f"{prefix}-hub" not in there:
        raise ValueError(f"there are no hosts {prefix}-0, {prefix}-1 ...; ip netns list says what there is")
    addresses = tuple(f"{NETWORK}.{_number(name) + 1}" for name in names)
    return Hosts(names=tuple(names), addresses=addresses, hub=f"{prefix}-hub")


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


@contextmanager
def hosts(count: int, *, rate_bit_s: int) -> Iterator[Hosts]:
    """Make so many hosts; remove them and end what runs in them afterwards, in any case.

    Their names have this process's id in them, so that several may do this at once. Raises ValueError where the
    kernel refuses.
    """
    check("--wan")
    _clear()
    prefix = f"wan{os.getpid()}"
    made = Hosts(
        names=tuple(f"{prefix}-{host}" for host in range(count)),
        addresses=tuple(f"{NETWORK}.{host + 1}" for host in range(count)),
        hub=f"{prefix}-hub",
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or nothing is removed
    try:
        _build(made, rate_bit_s)
        yield made
    finally:
        _remove(made)
        signal.signal(signal.SIGTERM, before)


def _clear() -> None:
    """Remove hosts whose process was killed before it could."""
    found = [re.match(r"wan(\d+)-\S+", line) for line in _ip("netns", "list").splitlines()]
    orphans = tuple(name[0] for name in found if name and not Path(f"/proc/{name[1]}").exists())
    _remove(Hosts(names=orphans, addresses=(), hub=""))


def _build(made: Hosts, rate_bit_s: int) -> None:
    try:
        for name in (made.hub, *made.names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", made.hub, "link", "add", "bridge", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("-n", made.hub, "link", "set", "bridge", "up")
        for host, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
            port = f"host{host}"
            _ip("-n", made.hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _ip("-n", made.hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
            made.set_rate(host, rate_bit_s)
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())
        raise ValueError(f"--wan: the kernel refuses {' '.join(error.cmd)!r}: {said}") from error


def _remove(made: Hosts) -> None:
    there = {line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()}
    for host, name in reversed(list(enumerate(made.names))):  # host 0 last: the others report to it
        if name in there:
            made.end(host)
    for name in there & {made.hub, *made.names}:
        _ip("netns", "del", name)


def _limit(namespace: str, device: str, rate_bit_s: int) -> None:
    burst = max(round(rate_bit_s / 8 * BURST_S), LEAST_BURST_BYTES)
    queue = max(round(rate_bit_s / 8 * QUEUE_S), LEAST_QUEUE_BYTES)
    sizes = ["rate", f"{rate_bit_s}bit", "burst", str(burst), "limit", str(burst + queue)]
    _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *sizes])


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def line_mbit(made: Hosts) -> list[float]:
    """What TCP carries, in Mbit/s: between each host and the next, in both directions at once, by iperf3."""
    found: list[float] = []
    for host in range(len(made.names)):
        there = (host + 1) % len(made.names)
        options = ["--client", made.addresses[there], "--bidir", "--time", str(MEASURE_S), "--json"]
        client = made.command(host, ["iperf3", *options])
        serve = made.command(there, ["iperf3", "--server", "--one-off"])
        with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                common.wait_until(lambda: _measured(client, found), limit_s=60.0, what=f"iperf3 on host {host}")  # noqa: B023
            finally:
                server.kill()
    return found


def _measured(client: Sequence[str], found: list[float]) -> bool:
    """False where the server does not listen yet."""
    answer = json.loads(subprocess.run(client, capture_output=True, text=True, check=False).stdout)
    if "error" not in answer:
        found += [answer["end"][name]["bits_per_second"] / 1e6 for name in RECEIVED]
    return "error" not in answer


def start_ray(
    made: Hosts, folder: Path, *, object_store_bytes: int, variables: Mapping[str, str] = NOTHING
) -> dict[str, str]:
    """A Ray node on each host, with a CPU for an island and token authentication; ended with the hosts.

    `variables` are for all processes there, beside. Returns the environment of drivers, which belong on host 0. A
    RAY_ variable that is set here already counts there instead of what is in RAY_SETTINGS.
    """
    address = f"{made.addresses[0]}:{RAY_PORT}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**RAY_SETTINGS, **environment_alone(), **token, **variables}
    for host in range(len(made.names)):
        command = node_command(made, host, folder, object_store_bytes=object_store_bytes)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"Ray did not start on host {host}: {done.stderr or done.stdout}")
    return {"RAY_ADDRESS": address, **token, **variables}


def node_command(made: Hosts, host: int, folder: Path, *, object_store_bytes: int) -> list[str]:
    """What starts a Ray node on a host, that of host 0 as the head, in the environment of `start_ray`."""
    address = f"{made.addresses[0]}:{RAY_PORT}"
    role = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"] if host == 0 else [f"--address={address}"]
    options = [f"--node-ip-address={made.addresses[host]}", "--num-cpus=1", "--disable-usage-stats"]
    options += [f"--object-store-memory={object_store_bytes}", f"--temp-dir={folder / f'h{host}'}"]
    return made.command(host, [str(Path(sys.executable).with_name("ray")), "start", *role, *options])
