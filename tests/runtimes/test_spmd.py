"""Runtime `spmd`, with real processes: the same bits as `local`, and what happens when processes die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diloco import Result, RunConfig
from diloco.checkpoint import Checkpoint, CheckpointFolder, read_source
from diloco.codec import BFloat16
from diloco.config import register, to_yaml
from diloco.data import Data
from diloco.layout import Fragments, Outside
from diloco.messages import Commit, ModuleKey, SourceId, Task
from diloco.metrics import Metrics
from diloco.progress import IslandView
from diloco.replica import ReplicaKind
from diloco.runtime.base import Runtime, Store
from diloco.runtime.local import Local
from diloco.runtime.spmd import Spmd
from diloco.runtime.spmd_start import Roster
from diloco.schedule import Barrier, NoMore, Schedule, Wait
from diloco.starting import read_values
from diloco.views import RunView
from experiments import entry
from tests.conftest import BASE
from tests.toy import Constant, Line, Signalling, WithBatchNorm, digests, launch, records, wait_for, warned

pytestmark = pytest.mark.timeout(400)  # seconds a test: starts of many processes, where others are busy too
ROOT = Path(__file__).resolve().parents[2]
THREE: dict[str, Any] = {**BASE, "islands": 3}
DEEP: dict[str, Any] = {
    "workload": Line(blocks=2),
    "layout": Fragments(layers_per_fragment=2, outside=Outside.balanced, count=2),
}
CODED: dict[str, Any] = {"codec": BFloat16(error_feedback=True), "codec_down": BFloat16(error_feedback=True)}
WORKERS: dict[str, Any] = {
    **BASE,
    "islands": 2,
    "workload": Line(blocks=2),
    "workers": [1, 2],
    "data": Data(batch=8),
    "store": Store(shards=2),
    "checkpoint": Checkpoint(every=1, keep=9),
    "rounds": 2,
}
# Each with three processes.
CASES: dict[str, dict[str, Any]] = {
    "plain": {**THREE, "checkpoint": Checkpoint(every=1, keep=9)},
    "two shards, late": {**THREE, "store": Store(shards=2), "patience": 0.001},
    "streaming, coded": {**THREE, **DEEP, **CODED, "schedule": Barrier(lag=2, keep=0.5)},
    "dropping": {**THREE, "schedule": Barrier(drop_probability=0.5)},
    "mistaken": {**THREE, "workload": WithBatchNorm()},
    "ddp": {**WORKERS, "replica": ReplicaKind.ddp},
    "fsdp2": {**WORKERS, "replica": ReplicaKind.fsdp2},
}
SAME = (
    "weights_sha256",
    "outer_state_sha256",
    "status",
    "tokens",
    "bytes_up",
    "bytes_down",
    "val_loss",
    "contributions",
    "data_sha256",
    "outer_steps",
)


def run(directory: Path, runtime: Runtime | None = None, **settings: Any) -> Result:
    """On spmd unless said otherwise."""
    found = launch(directory, **{**BASE, **settings, "runtime": runtime or Spmd()})
    assert not dist.is_initialized()
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()  # such as another module's, which this process ran before
    yield
    assert children() <= before


def children(parent: int | None = None) -> set[int]:
    """The processes that a process has started and that still are; without mp's own helper."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(status[1]) == (parent or os.getpid()) and status[0] != "Z" and b"resource_tracker" not in command:
            found.add(int(folder.name))
    return found


def told(directory: Path) -> list[tuple[Any, ...]]:
    """What the metrics say that is not of time."""
    names = ("inner/loss", "inner/grad_norm", "inner/lr", "eval/loss", "outer/contributors", "outer/update_norm")
    keys = ("event", "round", "island", "segment")
    found = records(directory, "segment", "commit", "evaluation")
    lines = [(*[r.get(key) for key in keys], *[r[name] for name in names if name in r]) for r in found]
    return sorted(lines, key=repr)


# --- the same bits ---

RANK = """
import sys
from pathlib import Path
from diloco import train
from diloco.config import load
from diloco.runtime.base import Abandoned
for config in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        found = train(load(config), config.with_suffix(""))
        assert found.directory == config.with_suffix("") and found.summary["status"] == "finished"
    except (ValueError, Abandoned) as error:
        config.with_suffix(f".{sys.argv[2]}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes with the environment that a launcher gives them made of all cases, one after the other."""
    folder = tmp_path_factory.mktemp("launched")
    for name, settings in CASES.items():
        given = {"rounds": 3, "inner_steps": 6, "segment_steps": 2, "runtime": Spmd(), "metrics": Metrics(live=False)}
        (folder / f"{name}.yaml").write_text(to_yaml(RunConfig(**{**given, **settings})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**environment(), "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                RANK,
                str(folder),
                str(rank),
            ],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [process.communicate(timeout=380)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(said)
    assert said[0].count("preparing the corpus") == len(CASES) and said[1:] == ["", ""], said
    return folder


@pytest.mark.parametrize("case", ["plain", "two shards, late", "streaming, coded", "dropping"])
def test_the_same_bits_as_in_one_process(case: str, launched: Path, runs: Path) -> None:
    settings = {**CASES[case], "patience": 0.0}  # nobody is late
    assert_same(launched / case, launch(runs / "local", **settings))


def assert_same(found: Path, expected: Result) -> None:
    """Digests, figures, metrics, and what the checkpoints hold of the sources."""
    summary = json.loads((found / "summary.json").read_text())
    for key in SAME:
        assert summary[key] == expected.summary[key], key
    assert summary["runtime"] == "spmd"
    assert told(found) == told(expected.directory)
    root = CheckpointFolder(str(found / "checkpoints"))
    assert root.names() == CheckpointFolder(str(expected.directory / "checkpoints")).names()
    for name in root.names():
        for source in map(SourceId, range(summary["islands"])):
            theirs, mine = (read_source(f"{r}/checkpoints/{name}", source) for r in (expected.directory, found))
            assert theirs is not None and mine is not None
            assert all(torch.equal(mine.tensors[key], value) for key, value in theirs.tensors.items())


@pytest.mark.parametrize("kind", ReplicaKind)
def test_islands_of_one_and_of_two_workers(kind: ReplicaKind, launched: Path, runs: Path) -> None:
    """To the rounding of sums; what was saved is gone on with in one process."""
    expected = launch(runs / "local", **CASES[kind.value])
    newest = CheckpointFolder(str(launched / kind.value / "checkpoints")).newest()[0]
    values = [read_values(checkpoint) for checkpoint in (expected.summary["checkpoint"], newest)]
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-4, atol=1e-6)
    shutil.copytree(launched / kind.value, runs / "run")
    on = launch(runs / "run", **{**CASES[kind.value], "rounds": 3, "resume": str(runs / "run")})
    assert (on.summary["status"], on.summary["rounds"]) == ("finished", 3)


def test_a_mistake_is_told_where_the_run_is_driven(launched: Path) -> None:
    said = [(launched / f"mistaken.{rank}").read_text() for rank in range(3)]
    assert said[0].startswith("ValueError: norm keeps batch statistics") or "keeps batch statistics" in said[0]
    assert said[1:] == ["Abandoned: ", "Abandoned: "]
    assert not (launched / "mistaken").exists()


@pytest.mark.parametrize("islands", [1, 2])
def test_processes_of_its_own(islands: int, runs: Path) -> None:
    settings = {"islands": islands, "checkpoint": Checkpoint(every=1, keep=9)}
    found = run(runs / "spmd", **settings)
    assert_same(found.directory, launch(runs / "local", **{**BASE, **settings}))


def test_which_rank_works_for_which_island() -> None:
    roster = Roster((2, 1, 3))
    assert roster.size == 6 and roster.leaders == (0, 2, 3)
    assert [roster.find(rank) for rank in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


# --- stopped, and gone on with ---


@pytest.mark.parametrize("first", ["local", "spmd"])
def test_stopped_in_one_runtime_and_gone_on_with_in_the_other(first: str, runs: Path) -> None:
    """Within a round, by a signal."""
    flag, settings = runs / "flag", {"rounds": 4, "checkpoint": Checkpoint(every=0)}
    workload = Signalling(dropout=0.3, file=str(flag), at_shard=0, at_step=6 + 1, number=int(signal.SIGINT))
    expected = launch(runs / "whole", **{**BASE, **settings, "workload": workload})
    flag.write_text("")
    makers: dict[str, Runtime] = {"local": Local(), "spmd": Spmd()}
    stopped = run(runs / "run", makers.pop(first), **settings, workload=workload)
    assert not flag.exists()
    assert stopped.summary["status"] == "interrupted" and "-steps-" in stopped.summary["checkpoint"]
    other = makers.popitem()[1]
    found = run(runs / "run", other, **settings, workload=workload, resume=str(runs / "run"))
    assert digests(found) == digests(expected)
    assert told(found.directory) == told(expected.directory)
    assert found.summary["tokens"] == expected.summary["tokens"]


def test_more_islands_on_resuming(runs: Path) -> None:
    settings: dict[str, Any] = {"islands": 2, "rounds": 2, "store": Store(shards=2)}
    run(runs / "run", **settings)
    again = {**settings, "rounds": 3, "islands": 3, "resume": str(runs / "run")}
    found = run(runs / "run", **again)
    launch(runs / "local", **{**BASE, **settings})
    expected = launch(runs / "local", **{**BASE, **again, "resume": str(runs / "local")})
    assert digests(found) == digests(expected)


def test_a_killed_rank_stops_the_run_and_it_is_gone_on_with(runs: Path) -> None:
    """In its third round, which begins once the checkpoint of the first is complete."""
    flag = runs / "kill"
    flag.write_text("")
    settings: dict[str, Any] = {"rounds": 4, "checkpoint": Checkpoint(every=1, keep=9)}
    workload = Signalling(dropout=0.3, file=str(flag), at_shard=1, at_step=2 * 6 + 3)
    with pytest.raises(RuntimeError, match=r"rank 1 \(island 1\) is gone \(killed by signal 9\); go on with resume="):
        run(runs / "run", workload=workload, **settings)
    assert json.loads((runs / "run" / "summary.json").read_text())["status"] == "failed"
    found = run(runs / "run", workload=workload, resume=str(runs / "run"), **settings)
    assert digests(found) == digests(launch(runs / "local", **{**BASE, **settings, "workload": workload}))


@dataclass(kw_only=True)
class Failing(Constant):
    """Fails on one shard only."""

    def batch(self, corpus: Any, shard: Any, step: int) -> Any:
        if shard == 1 and step == self.fails_after_step:
            raise RuntimeError("the batch cannot be made")
        return {"gradient": torch.ones(1)}


register(group="workload", name="failing_at_once", node=Failing)


def test_what_an_island_raises_is_told_with_its_name(runs: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 \(island 1\): RuntimeError: the batch cannot be made") as caught:
        run(runs / "run", workload=Failing(fails_after_step=7), imports=[__name__])
    assert "in batch" in str(caught.value.__cause__)


def test_a_checkpoint_that_cannot_be_written_is_told(runs: Path) -> None:
    (runs / "file").write_text("in the way of a folder")
    with pytest.raises(ValueError, match=r"checkpoint\.path: nothing can be written to .*Not a directory"):
        run(runs / "run", checkpoint=Checkpoint(every=1, path=str(runs / "file")))
    assert not (runs / "run").exists()


def test_a_checkpoint_that_is_not_written_is_told_and_the_run_goes_on(runs: Path) -> None:
    (runs / "saved" / "run").mkdir(parents=True)
    (runs / "saved" / "run" / "round-000001.tmp").symlink_to("nowhere")  # in the way of a folder
    found = run(runs / "run", checkpoint=Checkpoint(every=1, path=str(runs / "saved")))
    assert found.summary["status"] == "finished"
    assert len([message for message in warned(found.directory) if "could not be written" in message]) == 1


# --- what is refused ---


@dataclass(kw_only=True)
class Impatient(Schedule):
    """Of no use."""

    def next_task(self, island: IslandView, run: RunView, now_s: float) -> Task | Wait | NoMore:
        return NoMore()

    def commits(self, run: RunView, touched: Sequence[ModuleKey], now_s: float) -> list[Commit]:
        return []


@dataclass(kw_only=True)
class NearlyBarrier(Barrier):
    """Of which nothing is known."""


@pytest.mark.parametrize("schedule", [Impatient(), NearlyBarrier()])
def test_other_schedules_are_refused(schedule: Schedule, runs: Path) -> None:
    with pytest.raises(ValueError, match=f"schedule={type(schedule).__name__} does not run on runtime=spmd.*barrier"):
        run(runs / "run", schedule=schedule)
    assert not list(runs.iterdir())


def test_a_mistake_that_an_island_finds_reaches_the_caller(runs: Path) -> None:
    with pytest.raises(ValueError, match="keeps batch statistics"):
        run(runs / "run", workload=WithBatchNorm())
    assert not list(runs.iterdir())


def test_gpus_that_are_not_there_are_refused(runs: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    with pytest.raises(ValueError, match="gpus_per_worker=1 needs 2 GPU"):
        run(runs / "run", gpus_per_worker=1.0)


def test_a_process_group_of_the_users_own_is_refused_where_it_is_in_the_way(runs: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="workers=2 needs torch's default process group"):
            launch(runs / "run", **BASE, workers=2, data=Data(batch=8), runtime=Spmd())
    finally:
        dist.destroy_process_group()


# --- the command line ---

TOY = ["--import", "tests.toy", "runtime=spmd", "workload=line", "metrics.live=false", "inner_steps=4"]
PLAIN = [sys.executable, "-W", "error", "-m", "experiments.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "experiments.train"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def do(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    run = [*command, *TOY, *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=150, check=False)


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("runs/latest/summary.json").read_text())
    return found


def test_the_command_starts_its_own_processes_or_is_started_by_torchrun(runs: Path) -> None:
    both = []
    for command in (PLAIN, TORCHRUN):
        done = do(command, "rounds=2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("round 2/2  loss") == done.stderr.count("starting 2 island(s)") == 1
        both.append((summary()["weights_sha256"], summary()["outer_state_sha256"]))
        assert summary()["runtime"] == "spmd" and Path("runs/latest/export/model.pt").is_file()
    assert both[0] == both[1]
    assert len(list(runs.iterdir())) == 3


def test_under_torchrun_a_mistake_is_said_once(runs: Path) -> None:
    done = do(TORCHRUN, "islands=3")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "started 2 process(es), but islands and workers add up to 3" in said[0], done.stderr
    assert re.search(r"rank +: 0 .*\n *exitcode +: 2 ", done.stderr), done.stderr
    assert "entry.py" not in done.stderr  # no traceback but the launcher's own
    assert done.returncode != 0 and not list(runs.iterdir())


def test_several_runs_are_refused_under_a_launcher(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in ("0", "error: several runs need processes of their own"), ("1", ""):
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(entry, "SILENT_S", 0.0)
        assert entry.main(["-m", "seed=1,2", *TOY]) == 2
        found = capsys.readouterr()
        assert found.err.startswith(said) and bool(found.err) == bool(said) and not found.out
    assert not list(runs.iterdir())


@contextmanager
def under_way(command: list[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A long run, in its third round."""
    given = [*command, *TOY, "rounds=1000000", "checkpoint.every=0", "inner=sgd", *arguments]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as run:
        try:
            assert run.stdout is not None
            for line in run.stdout:
                if line.split()[:2] == ["round", "3/1000000"]:
                    break
            yield run
        finally:
            run.kill()


def test_ctrl_c_writes_a_checkpoint_to_go_on_from(runs: Path) -> None:
    with under_way(PLAIN) as process:
        others = children(process.pid)
        assert len(others) == 1
        for other in [*others, process.pid]:  # as a terminal, or Slurm, asks all of them
            os.kill(other, signal.SIGINT)
        _, stderr = process.communicate(timeout=150)
        assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    stopped = summary()
    assert stopped["status"] == "interrupted" and Path(stopped["checkpoint"], "manifest.json").is_file()
    assert not any(alive(other) for other in others)


def test_torchrun_that_is_terminated_leaves_a_checkpoint(runs: Path) -> None:
    with under_way(TORCHRUN) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=150)
    stopped = summary()
    assert stopped["status"] == "interrupted" and Path(stopped["checkpoint"], "manifest.json").is_file()


def test_nothing_outlives_a_killed_run(runs: Path) -> None:
    with under_way(PLAIN) as process:
        others = children(process.pid)
        assert len(others) == 1
        process.kill()
        process.wait()
        wait_for(lambda: not any(alive(other) for other in others), limit_s=60)


def alive(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_torchrun_ends_when_a_rank_is_killed(runs: Path) -> None:
    with under_way(TORCHRUN) as process:
        ranks = sorted(children(process.pid))
        last = next(r for r in ranks if b"RANK=1\0" in Path("/proc", str(r), "environ").read_bytes())
        os.kill(last, signal.SIGKILL)
        _, stderr = process.communicate(timeout=150)
    assert process.returncode != 0
    assert not any(alive(rank) for rank in ranks)
