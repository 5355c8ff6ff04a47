"""Ray's cluster launcher on three hosts: `ray up`, `ray submit` of the one file, `ray down`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import ENVIRONMENT, ROOT, Machines
from tests.cluster.ray_nodes import STORE_BYTES, Cluster

TEMPLATE = ROOT / "docker" / "cluster.yaml"
SCRIPT = ROOT / "experiments" / "train.py"
SHELL = {"RAY_UP_enable_autoscaler_v2": "0"}  # as the template says


def filled_in(machines: Machines) -> Path:
    """The template, with what it says is to be changed."""
    text = TEMPLATE.read_text()
    head, *workers = machines.addresses
    python = " ".join(f"{name}={ENVIRONMENT[name]}" for name in ("PATH", "PYTHONPATH") if name in ENVIRONMENT)
    changes = {
        "192.0.2.1": head,
        "[192.0.2.2, 192.0.2.3]": f"[{', '.join(workers)}]",
        "ssh_user: diloco": "ssh_user: root",
        "~/.ssh/id_ed25519": str(machines.key),
        "PATH=$HOME/diloco/.venv/bin:$PATH": python,
        "--object-store-memory=1000000000": f"--object-store-memory={STORE_BYTES} --num-cpus=1",
    }
    for before, after in changes.items():
        assert before in text, f"{TEMPLATE} has no {before}"
        text = text.replace(before, after)
    file = machines.folder / "cluster.yaml"
    file.write_text(text)
    return file


@pytest.mark.timeout(900)
def test_up_submit_down(machines: Machines) -> None:
    """The script is one copied file, started in the head's home, which the workers do not see."""
    file, cluster = str(filled_in(machines)), Cluster(machines=machines)
    checkpoints = machines.folder / "checkpoints"
    paths = [f"data.cache={machines.folder / 'cache'}", f"checkpoint.path={checkpoints}"]
    overrides = ["+experiment=smoke", "islands=3", "rounds=1", *paths]
    try:
        up = machines.run(0, "ray", "up", "-y", file, environment=SHELL, limit_s=300)
        assert up.returncode == 0, up.stdout + up.stderr
        assert sorted(cluster.nodes(least=3)) == sorted(machines.addresses)
        done = machines.run(0, "ray", "submit", file, str(SCRIPT), "--", *overrides, environment=SHELL, limit_s=300)
        assert done.returncode == 0, done.stdout + done.stderr
        down = machines.run(0, "ray", "down", "-y", file, environment=SHELL, limit_s=300)
        assert down.returncode == 0, down.stdout + down.stderr
        assert machines.run(0, "pgrep", "raylet").returncode == 1, "the head still runs"
    finally:
        for host in (2, 1, 0):  # the launcher ends only the head of machines that it was told
            cluster.stop(host)
    assert (machines.home(0) / "train.py").read_text() == SCRIPT.read_text()
    (summary,) = machines.home(0).glob("runs/*_smoke/summary.json")
    told = json.loads(summary.read_text())
    assert (told["status"], told["islands"], told["rounds"]) == ("finished", 3, 1)
    assert Path(told["checkpoint"]).is_relative_to(checkpoints)
