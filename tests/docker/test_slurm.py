"""docker/slurm.sh on a Slurm of one node, played by two small scripts: a cluster, a run on it, and nothing left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import nodes
from tests.toy import wait_for

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "srun": 'while [[ ${1:-} == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then echo here; else echo "$@" >> scontrol.log; fi\n',
    "hostname": "echo 127.0.0.1 10.0.0.1\n",
}
RUN = ["--import", "tests.toy", "workload=line", "metrics.live=false", "inner_steps=2", "islands=1", "name=job"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A checkout with the scripts, and Slurm's commands."""
    with tempfile.TemporaryDirectory(prefix="s") as name:
        here = Path(name)
        (here / "docker").symlink_to(ROOT / "docker")
        (here / "bin").mkdir()
        for command, text in STUBS.items():
            (here / "bin" / command).write_text(f"#!/usr/bin/env bash\n{text}")
            (here / "bin" / command).chmod(0o755)
        yield here


def submitted(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """What sbatch starts, in a session of its own."""
    ports = nodes.free_ports(300)
    options = f"--dashboard-port={ports + 1} --ray-client-server-port={ports + 2}"
    environment = nodes.environment(folder)
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_ON_NODE": "2"}
    environment |= {"SLURM_SUBMIT_DIR": str(folder), "NODE_PORTS": str(ports + 10), "PYTHONPATH": str(ROOT)}
    environment |= {"HEAD_PORT": str(ports), "PATH": f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"}
    environment |= {"NODE_OPTIONS": f"{options} --object-store-memory={150 << 20} --temp-dir={folder}/r"}
    command = [ROOT / "docker" / "slurm.sh", *RUN, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2)])
def test_without_sbatch_it_says_what_to_do(arguments: list[str], status: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", str(ROOT / "docker" / "slurm.sh"), *arguments]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == status and told.stderr == ""
    assert "sbatch --nodes=4" in told.stdout and "#" not in told.stdout


def test_a_job_runs_and_ends(folder: Path) -> None:
    job = submitted(folder, "rounds=2")
    token = folder / "runs" / ".token-7"
    wait_for(lambda: token.is_file() and len(token.read_text()) == 64)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    wait_for(lambda: bool(nodes.descendants(job.pid)))
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    assert "finished" in (folder / "runs" / "latest" / "summary.json").read_text()
    assert not token.exists() and not (folder / "scontrol.log").exists()


def test_a_job_whose_time_is_over_asks_for_more(folder: Path) -> None:
    job = submitted(folder, "rounds=10000", "checkpoint.every=0", "eval_every=0")
    try:
        metrics = '"event": "commit"'
        wait_for(lambda: any(metrics in path.read_text() for path in folder.glob("runs/*/metrics.jsonl")), limit_s=400)
        below = nodes.descendants(job.pid)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=400)
        assert job.returncode == 130, said
        assert (folder / "scontrol.log").read_text() == "requeue 7\n"
        assert list(folder.glob("runs/*/checkpoints/round-*/manifest.json")), said
        wait_for(lambda: not [child for child in below if nodes.runs(child)], limit_s=30.0)
    finally:
        for child in [job.pid, *nodes.descendants(job.pid)]:
            try:
                os.kill(child, signal.SIGKILL)
            except OSError:
                continue
