"""`diloco doctor`: what this machine or cluster can run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

from experiments import links, nodes
from experiments.links import Buffers
from experiments.nodes import Node

SOCKET_BYTES = 16 << 20  # 1 Gbit/s over a round trip of 130 ms
FREE_BYTES = 2 << 30  # a corpus, some checkpoints
MEMORY_BYTES = 4 << 30  # two islands of a small model
CACHE = Path("~/.cache/diloco").expanduser()

OK, WARNING, MISSING = "ok", "warning", "missing"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. `missing` = no run is possible without it."""

    what: str
    state: str
    found: str
    mend: str = ""  # the command, or what to do


@dataclass(kw_only=True)
class Findings:
    """All of them, printed as they come."""

    rows: list[Finding] = field(default_factory=list)

    def add(self, what: str, state: str, found: str, mend: str = "") -> None:
        """Note one and print it."""
        self.rows.append(Finding(what=what, state=state, found=found, mend=mend))
        print(f"{state:8} {what:14} {found}")
        if mend and state != OK:
            print(f"{'':8} {'':14}   -> {mend}")
        sys.stdout.flush()

    def count(self, state: str) -> int:
        """How many are in this state."""
        return sum(row.state == state for row in self.rows)


def examine(*, quick: bool, gbits: float | None = None, rtt_s: float | None = None) -> int:
    """Look at everything and say what was found. Returns 0 where a run is possible, else 1.

    `gbits` and `rtt_s` are of the link between islands. Raises ValueError where only the former is known.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if gbits is not None and rtt_s is None and (quick or not address):
        raise ValueError("--link needs the round trip: --rtt 80ms, or RAY_ADDRESS (and no --quick) to measure it")
    findings = Findings()
    check_versions(findings, requirements())
    check_devices(findings)
    check_machine(findings)
    check_disk(findings, {"runs": Path("runs").absolute(), "cache": CACHE})
    if rtt_s is not None:
        check_buffers(findings, links.read_buffers(), gbits=gbits or links.ASSUMED_GBITS, rtt_s=rtt_s)
    elif quick or not address:  # else the round trips will be measured
        check_sockets(findings, Path("/proc/sys/net/core"))
    for name, use in {"botocore": "data.corpus=botocore", "wandb": "metrics.wandb"}.items():
        _check_extra(findings, name, use)
    if address:
        for what, state in (("token", nodes.token_state(os.environ)), ("TLS", nodes.tls_state(os.environ))):
            findings.add(what, OK if state.good else WARNING, state.found, state.mend)
    if not quick:
        check_cluster(findings, check_ray(findings, address), gbits=gbits, rtt_s=rtt_s)
    missing, warnings = findings.count(MISSING), findings.count(WARNING)
    if missing:
        print(f"\nno run is possible yet: {missing} missing")
        return 1
    print(f"\na run is possible{f', with {warnings} warning(s)' if warnings else ''}: diloco train +experiment=smoke")
    return 0


def requirements() -> list[str]:
    """What the project needs, such as `torch>=2.9`: as installed, or as its checkout says."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        import tomllib

        return [str(line) for line in tomllib.loads(project.read_text())["project"]["dependencies"]]
    return [line for line in importlib.metadata.requires("diloco") or [] if "extra ==" not in line]


def check_versions(findings: Findings, needed: list[str]) -> None:
    """Python and the packages, against the oldest that will do."""
    state = OK if sys.version_info >= (3, 11) else MISSING
    findings.add("python", state, platform.python_version(), "install Python 3.11 or newer")
    for line in needed:
        requirement = Requirement(line)
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.add(requirement.name, MISSING, f"not installed, needed: {wanted}", _install(wanted))
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        text = found if fits else f"{found}, needed: {requirement.specifier}"
        findings.add(requirement.name, OK if fits else MISSING, text, _install(wanted))


def check_devices(findings: Findings) -> None:
    """CUDA devices that torch sees, and those that it does not."""
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = ", ".join(f"{device.name} ({device.total_memory >> 30} GiB)" for device in devices)
        findings.add("CUDA", OK, f"{text}; use gpus_per_worker=1")
    elif shutil.which("nvidia-smi") and not torch.version.cuda:
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        findings.add("CUDA", WARNING, "there is a driver, but this torch is built for the CPU only", mend)
    else:
        findings.add("CUDA", OK, "no device; runs train on the CPU")


def check_machine(findings: Findings) -> None:
    """Cores, memory, and the memory that Ray's object store lives in."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    state = OK if cores >= 2 else WARNING
    findings.add("cores", state, str(cores), "two islands share one core and take turns; use a larger machine")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    mend = "use runtime=local, which needs one process"
    findings.add("memory", OK if memory >= MEMORY_BYTES else WARNING, _gib(memory), mend)
    shared = Path("/dev/shm")
    if shared.is_dir():
        try:
            from diloco.runtime.ray_start import LARGE_STORE_BYTES
        except ImportError:
            return  # what is lacking was said above
        wanted, free = LARGE_STORE_BYTES, shutil.disk_usage(shared).free
        mend = "in a container: --shm-size=2g; else runtime.object_store_bytes=268435456"
        text = f"{_gib(free)} free, Ray's object store may take {_gib(wanted)} and more"
        findings.add("/dev/shm", OK if free >= wanted else WARNING, text, mend)


def check_disk(findings: Findings, folders: dict[str, Path]) -> None:
    """Room for runs and for prepared corpora, in what there is of these folders."""
    for name, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(there, os.W_OK):
            mend = f"work in another folder, or: chmod u+w {there}"
            findings.add(f"disk, {name}", MISSING, f"{there} cannot be written", mend)
            continue
        free = shutil.disk_usage(there).free
        mend = "delete old runs, or give data.cache= and checkpoint.path= another disk"
        findings.add(f"disk, {name}", OK if free >= FREE_BYTES else WARNING, f"{_gib(free)} free at {there}", mend)


def check_sockets(findings: Findings, folder: Path) -> None:
    """The largest buffers that one TCP stream may have: over far links, bandwidth x round trip."""
    small = []
    for name in ("rmem_max", "wmem_max"):
        try:
            size = int((folder / name).read_text())
        except (OSError, ValueError):
            return  # another system
        if size < SOCKET_BYTES:
            small.append(f"net.core.{name} = {size / (1 << 20):.3g} MiB")
    if small:
        text = f"{', '.join(small)}: less than a far, fast link needs (bandwidth x round trip); fine on one machine"
        mend = f"sysctl -w net.core.rmem_max={4 * SOCKET_BYTES} net.core.wmem_max={4 * SOCKET_BYTES}; see also tcp_rmem"
        findings.add("TCP buffers", WARNING, text, mend)
    else:
        findings.add("TCP buffers", OK, "16 MiB or more")


def check_ray(findings: Findings, address: str) -> list[Node]:
    """Start Ray here, or ask the cluster at `address`, whose nodes come back."""
    where, mend = "Ray on this machine", "runtime=local needs no Ray"
    if address:
        where = f"the cluster at RAY_ADDRESS={address}"
        mend = "start the cluster (docker/node.sh head), or unset RAY_ADDRESS"
        if not nodes.listens(address):
            findings.add("Ray", MISSING, f"{where} cannot be reached", mend)
            return []
    try:
        found = nodes.ask(address)
    except nodes.NoAnswer as error:
        findings.add("Ray", MISSING, f"{where} {error}", mend)
        return []
    findings.add("Ray", OK, f"{where} runs actors; {len(found)} node(s)")
    for node in found:
        parts = [f"{node.cpus:g} CPU", f"{node.gpus:g} GPU", _gib(node.memory)]
        text, again = f"{node.address}: {', '.join(parts)}", "look at its Ray's logs, or at the firewall"
        findings.add("  node", WARNING if node.silent else OK, text + ", does not answer" * node.silent, again)
    return found if address else []


def check_cluster(findings: Findings, found: list[Node], *, gbits: float | None, rtt_s: float | None) -> None:
    """What the nodes have of the project, how far they are from each other, and whether their buffers suit that."""
    versions = {node.address: node.project for node in found if not node.silent}
    here = nodes.own_version()
    differing = [f"{address} has {version or 'none'}" for address, version in versions.items() if version != here]
    mend = "install the same version on all nodes: pip install ."
    if differing:
        findings.add("project", MISSING, f"here is {here}, but {'; '.join(differing)}", mend)
    elif versions:
        findings.add("project", OK, f"{here} on all nodes")
    trips = {(node.address, other): took_s for node in found for other, took_s in node.rtt_s.items()}
    if trips:
        (first, second), most_s = max(trips.items(), key=lambda trip: trip[1])
        least, most = (f"{trip_s * 1e3:.3g}" for trip_s in (min(trips.values()), most_s))
        findings.add("round trip", OK, f"{least} to {most} ms between nodes; {first} to {second} is the most")
        rtt_s = rtt_s if rtt_s is not None else most_s
    if rtt_s is not None:
        for node in found:
            check_buffers(findings, node.buffers, gbits=gbits or links.ASSUMED_GBITS, rtt_s=rtt_s, at=node.address)


def check_buffers(findings: Findings, buffers: Buffers, *, gbits: float, rtt_s: float, at: str = "") -> None:
    """Whether one stream can fill a link of this bandwidth and round trip from a machine with these buffers."""
    wanted = links.wanted_bytes(gbits, rtt_s)
    small = links.too_small(buffers, wanted)
    link, node = links.told(gbits, rtt_s), f"{at}: " if at else ""
    if small:
        sizes = ", ".join(f"{name} = {numbers[-1] / (1 << 20):.3g} MiB" for name, numbers in small.items())
        text = f"{node}{sizes}: {link} wants {wanted / (1 << 20):.3g} MiB"
        findings.add("TCP buffers", WARNING, text, f"{links.sysctl(small, wanted)}  (to keep it: /etc/sysctl.d)")
    elif buffers:
        findings.add("TCP buffers", OK, f"{node}enough for {link}")


def _check_extra(findings: Findings, name: str, use: str) -> None:
    try:
        findings.add(name, OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        findings.add(name, WARNING, f"not installed; only {use} needs it", _install(name))


def _install(requirement: str) -> str:
    return f"pip install '{requirement}'"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
