"""No process is left behind, however a run with a Ray of its own ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from diloco import RunConfig
from diloco.checkpoint import Checkpoint
from diloco.config import to_yaml
from diloco.metrics import Metrics
from diloco.runtime import reaper
from diloco.runtime.base import Store
from diloco.runtime.ray_cluster import RayCluster
from tests.toy import Line, WithBatchNorm, records, wait_for

ROOT = Path(__file__).resolve().parents[2]
MARK = "DILOCO_TEST_FOLDER"  # set in the environment of a driver, and so in that of all that it starts
DRIVER = """
import sys
from pathlib import Path
import tests.toy
from diloco import train
from diloco.config import load
print(train(load(Path(sys.argv[1])), Path(sys.argv[2])).summary["status"])
"""


def marked(folder: Path) -> list[str]:
    """The command lines of all processes that a driver with this mark started, and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it is gone, or somebody else's
            if f"{MARK}={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [command for command in found if command]  # a zombie has none


def drive(folder: Path, *, within: Sequence[str] = (), **settings: object) -> subprocess.Popen[str]:
    config = RunConfig(
        **{"imports": ["tests.toy"], "workload": Line(), "rounds": 3, "inner_steps": 4, **settings},  # type: ignore[arg-type]
        islands=1,
        store=Store(shards=1),
        runtime=RayCluster(tick_s=0.2),
        metrics=Metrics(live=False),
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*within, sys.executable, "-c", DRIVER, str(folder / "config.yaml"), str(folder / "run")],
        env=environment | {"PYTHONPATH": str(ROOT), MARK: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def training(folder: Path) -> bool:
    return (folder / "run" / "metrics.jsonl").is_file() and bool(records(folder / "run", "commit"))


def test_a_run_that_ends_in_an_error_leaves_no_process(tmp_path: Path) -> None:
    driver = drive(tmp_path, workload=WithBatchNorm())
    told, _ = driver.communicate(timeout=200)
    assert "batch statistics" in told
    wait_for(lambda: not marked(tmp_path), limit_s=30)


def test_a_run_that_is_killed_while_it_starts_leaves_no_process(tmp_path: Path) -> None:
    with drive(tmp_path, rounds=100_000) as driver:
        wait_for(lambda: len(marked(tmp_path)) >= 8)  # Ray is there, the islands are not
        # Ray's agents write their title over the start of their environment, and so over the mark.
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait(timeout=60)
    deadline_s = time.monotonic() + 90.0
    while left := [*marked(tmp_path), *(process for process in started if process.is_running())]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


def test_a_signal_for_its_group_is_for_the_run_and_not_for_its_ray(tmp_path: Path) -> None:
    """`timeout` sends one, which the run answers with a last checkpoint."""
    with drive(tmp_path, within=["timeout", "500"], rounds=100_000, checkpoint=Checkpoint(every=0)) as driver:
        wait_for(lambda: training(tmp_path))
        driver.send_signal(signal.SIGTERM)
        told, _ = driver.communicate(timeout=120)
    assert told.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "run" / "checkpoints").glob("round-*"))
    wait_for(lambda: not marked(tmp_path), limit_s=30)


def test_sigterm_while_a_run_starts_is_answered_as_ctrl_c(tmp_path: Path) -> None:
    """And not with Ray's dump of registers."""
    command = [sys.executable, "-m", "experiments.train", "--import", "tests.toy", "workload=line", "islands=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        wait_for(lambda: any("ray::" in each for each in marked(tmp_path)))  # Ray's first: it still starts
        driver.send_signal(signal.SIGTERM)
        told, _ = driver.communicate(timeout=120)
    assert (driver.returncode, told.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "runs").exists()
    wait_for(lambda: not marked(tmp_path), limit_s=30)


def test_an_agent_without_the_mark_is_known_by_the_log_that_it_has_open(tmp_path: Path) -> None:
    """Its session's name ends in the driver's process number; what is not Ray's is left alone."""
    started = []
    try:
        for session, title in ((41, "ray::Agent"), (42, "ray::Agent"), (41, "sleep")):
            logs = tmp_path / f"session_2026-01-01_{session}" / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            command = ["bash", "-c", f'exec -a {title} sleep 60 7>"{logs}/agent.log"']
            started.append(subprocess.Popen(command, env={}))
        names = {f"/proc/{one.pid}/cmdline" for one in started}
        wait_for(lambda: all(b"bash" not in Path(name).read_bytes() for name in names))
        assert reaper.marked("41-of-nobody", "/nowhere") == [started[0].pid]
    finally:
        for one in started:
            one.kill()
            one.wait()
