"""Runtime `ray_cluster`, with real processes: the same bits as `local`, and what happens when processes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from diloco import RunConfig
from diloco.checkpoint import Checkpoint, CheckpointFolder
from diloco.config import to_yaml
from diloco.metrics import Metrics
from diloco.runtime.base import Store
from diloco.runtime.ray_cluster import RayCluster
from diloco.runtime.ray_refs import Pending
from tests.conftest import BASE, Start
from tests.faults.acting import opened_when_joined
from tests.toy import (
    Signalling,
    WithBatchNorm,
    assert_same_sources,
    digests,
    launch,
    records,
    warned,
)

ROOT = Path(__file__).resolve().parents[2]


def told(directory: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What the metrics say that is not of time: losses and rates of segments, and who contributed."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for record in records(directory, "segment", "commit", "evaluation"):
        key = (record["event"], record["round"], record.get("island"), record.get("segment"))
        assert key not in found, f"{key} is told twice"
        names = ("inner/loss", "inner/grad_norm", "inner/lr", "eval/loss", "outer/contributors")
        found[key] = tuple(record[name] for name in names if name in record)
    return found


# --- with a Ray of their own: before the others, since these may not be connected yet ---


def test_more_islands_than_this_machine_holds_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"islands=50000 needs 500\d\d processes.*MiB of memory"):
        launch(runs / "run", **BASE, islands=50_000, runtime=RayCluster())
    assert not (runs / "run").exists()
    assert not ray.is_initialized()


PARTS = '''
"""Parts of a user's own, outside the repository."""

from dataclasses import dataclass

import numpy as np
import torch

from diloco.codec import Codec, header_shapes, make_header
from diloco.config import register
from diloco.messages import Payload, Tensors
from diloco.outer import OuterOptimizer


@dataclass(kw_only=True)
class Thousandths(Codec):
    """Whole numbers of thousandths, in 32 bits."""

    scale: float = 1000.0

    def encode(self, tensors: Tensors) -> Payload:
        flat = [np.rint(t.detach().numpy().reshape(-1) * self.scale).astype("<i4") for t in tensors.values()]
        body = np.concatenate(flat).view(np.uint8)
        return Payload(codec="thousandths", header=make_header(tensors), body=body)

    def decode(self, payload: Payload) -> Tensors:
        values, found, at = payload.body.view("<i4") / self.scale, {}, 0
        for name, shape in header_shapes(payload).items():
            size = int(np.prod(shape))
            found[name] = torch.from_numpy(values[at : at + size].astype(np.float32)).reshape(shape)
            at += size
        return found


@dataclass(kw_only=True)
class HeavyBall(OuterOptimizer):
    """Momentum without Nesterov's look ahead."""

    lr: float = 0.5
    momentum: float = 0.8

    def init(self, params: Tensors) -> Tensors:
        return {f"velocity/{name}": torch.zeros_like(value) for name, value in params.items()}

    def step(self, params: Tensors, delta: Tensors, state: Tensors) -> None:
        for name, value in params.items():
            velocity = state[f"velocity/{name}"]
            velocity.mul_(self.momentum).add_(delta[name])
            value.sub_(velocity, alpha=self.lr)


register(group="codec", name="thousandths", node=Thousandths)
register(group="outer", name="heavy_ball", node=HeavyBall)
'''


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in a folder that only this process has on its path."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "users_own_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(folder))
    import users_own_parts  # type: ignore[import-not-found]

    yield users_own_parts
    del sys.modules["users_own_parts"]


def test_parts_of_the_users_own_travel(runs: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for workers, where the project is not installed
    settings = {
        "imports": ["tests.toy", "users_own_parts"],
        "codec": parts.Thousandths(scale=1e5),
        "outer": parts.HeavyBall(lr=0.6),
        "islands": 1,
        "rounds": 2,
        "inner_steps": 4,
    }
    expected = launch(runs / "local", **{**BASE, **settings})
    found = launch(runs / "ray", **{**BASE, **settings, "runtime": RayCluster(object_store_bytes=200 << 20)})
    assert not ray.is_initialized()  # what was started for the run ended with it
    assert digests(found) == digests(expected)
    plain = launch(runs / "plain", **{**BASE, "islands": 1, "rounds": 2, "inner_steps": 4})
    assert digests(plain)[0] != digests(found)[0]  # they were used


# --- on one Ray ---


def test_the_same_bits_as_in_one_process(start: Start, runs: Path) -> None:
    """Two islands on two shards, in segments, against an uncut run without Ray."""
    settings = {"store": Store(shards=2), "checkpoint": Checkpoint(every=2)}
    expected = launch(runs / "local", **{**BASE, **settings, "segment_steps": 2})
    uncut = launch(runs / "uncut", **{**BASE, **settings, "segment_steps": 0})
    found = start("ray", **settings, segment_steps=2)
    assert digests(found) == digests(expected) == digests(uncut)
    assert told(found.directory) == told(expected.directory)
    same = ("status", "tokens", "bytes_up", "bytes_down", "val_loss", "contributions", "data_sha256", "outer_steps")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}
    assert warned(found.directory) == []
    assert CheckpointFolder(str(found.directory / "checkpoints")).names() == ["round-000002", "round-000003"]


# --- processes that die ---


@ray.remote(num_cpus=0)
class Echo:
    """Answers at once, with what it was given."""

    def say(self, number: int) -> int:
        return number


def test_answers_are_handled_in_the_order_of_asking(one_ray: None) -> None:
    """Of those that are there: a round's last report may not overtake the others, whose tokens count with it."""
    pending, handled = Pending(), list[int]()
    echo = Echo.remote()  # type: ignore[attr-defined]
    refs = [echo.say.remote(number) for number in range(30)]
    for number, ref in enumerate(refs):
        pending.add([ref], lambda answers, error, number=number: handled.append(number))  # type: ignore[misc]
    ray.wait(refs, num_returns=len(refs))
    while pending.wait(0.1):
        pass
    assert handled == list(range(30))
    ray.kill(echo)


def test_checkpoints_have_every_source_where_a_round_is_one_task(start: Start, runs: Path) -> None:
    """The next round's task, which saves too, is given out before the checkpoint of this one is written."""
    settings = {"segment_steps": 0, "checkpoint": Checkpoint(every=1, keep=9)}
    found = start("run", **settings)
    expected = launch(runs / "local", **{**BASE, **settings})
    assert digests(found) == digests(expected)
    assert_same_sources(found.directory, expected.directory, rounds=3)


def test_an_island_killed_by_pid_is_started_again_and_takes_part(start: Start, runs: Path) -> None:
    """Its process ends within round 1; the other one goes on, and waits in round 3 until it is back."""
    flag, back = runs / "kill", runs / "back"
    flag.write_text("")
    workload = Signalling(
        dropout=0.3, file=str(flag), at_shard=1, at_step=6 + 3, gate=str(back), gate_shard=0, gate_step=3 * 6 + 3
    )

    with opened_when_joined(back, runs / "run"):
        result = start("run", workload=workload, rounds=6, checkpoint=Checkpoint(every=1))
    assert not flag.exists()
    assert result.summary["status"] == "finished"
    assert (result.summary["islands_lost"], result.summary["islands_joined"]) == (1, 1)
    assert result.summary["contributions"] == {"accepted": 2 + 1 + 1 + 1 + 2 + 2, "rejected": 0, "late": 0, "stale": 0}
    contributors = [record["outer/contributors"] for record in records(result.directory, "commit")]
    assert contributors == [[0, 1], [0], [0], [0], [0, 1], [0, 1]]
    steps = [record["step"] for record in records(result.directory, "segment") if record["island"] == 1]
    again = [8, 10, 12, 14, 16, 18]  # from step 6, after which it died; what it told of step 8 may have died with it
    assert steps in ([2, 4, 6, *again], [2, 4, 6, 8, *again])
    assert result.summary["tokens"] == 9 * 6 * 8
    # It may have died while it wrote that of round 1; later ones do without what it had.
    failed = [message for message in warned(result.directory) if "could not be written" in message]
    assert not [message for message in failed if "round-000001" not in message]
    newest, manifest = CheckpointFolder(str(result.directory / "checkpoints")).newest()
    assert Path(newest).name == "round-000006"
    assert {name for name in manifest["files"] if name.startswith("sources/")} == {
        f"sources/{source}/state.safetensors" for source in (0, 1)
    }


def test_a_lone_island_that_is_killed_goes_on_from_its_checkpoint(start: Start, runs: Path) -> None:
    """Its moments come from the checkpoint and its data from where that left off: the result is that without a loss."""
    flag, saved = runs / "kill", runs / "run" / "checkpoints" / "round-000002" / "manifest.json"
    settings = {"islands": 1, "rounds": 4, "checkpoint": Checkpoint(every=1, keep=9)}
    workload = Signalling(
        dropout=0.3, file=str(flag), at_shard=0, at_step=2 * 6 + 3, gate=str(saved), gate_shard=0, gate_step=2 * 6 + 3
    )
    flag.write_text("")
    found = start("run", workload=workload, **settings)
    assert not flag.exists()
    assert (found.summary["islands_lost"], found.summary["islands_joined"]) == (1, 1)
    expected = launch(runs / "local", **{**BASE, **settings, "workload": workload})
    assert digests(found) == digests(expected)
    assert found.summary["tokens"] == expected.summary["tokens"]


DRIVER = """
import os, sys
from pathlib import Path
import tests.toy
from diloco import train
from diloco.config import load
Path(sys.argv[3]).write_text(str(os.getpid()))
train(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.timeout(450)
def test_a_killed_driver_is_resumed_as_if_it_never_was(start: Start, runs: Path) -> None:
    """SIGKILL within round 3, once the checkpoint of round 2 is complete and before there is one of round 4.

    The driver has a Ray of its own.
    """
    flag, saved = runs / "kill", runs / "run" / "checkpoints" / "round-000002" / "manifest.json"
    workload = Signalling(
        dropout=0.3, file=str(flag), at_shard=0, at_step=3 * 6 + 3, gate=str(saved), gate_shard=0, gate_step=3 * 6 + 3
    )
    settings = {"workload": workload, "rounds": 5, "checkpoint": Checkpoint(every=2, keep=9)}
    runtime = RayCluster(tick_s=0.2, object_store_bytes=200 << 20)
    given: dict[str, Any] = {**BASE, **settings, "inner_steps": 6, "segment_steps": 2, "runtime": runtime}
    config = runs / "config.yaml"
    config.write_text(to_yaml(RunConfig(**given, metrics=Metrics(live=False))))
    command = [sys.executable, "-c", DRIVER, str(config), str(runs / "run"), str(flag)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not flag.exists()
    assert CheckpointFolder(str(runs / "run" / "checkpoints")).names() == ["round-000002"]
    expected = launch(runs / "local", **{**BASE, **settings})
    found = start("run", resume=str(runs / "run"), **settings)
    assert digests(found) == digests(expected)
    assert told(found.directory) == told(expected.directory)
    same = ("status", "rounds", "tokens", "bytes_up", "bytes_down", "val_loss", "contributions", "islands_lost")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}


# --- what is refused ---


def test_a_mistake_that_an_island_finds_reaches_the_caller(start: Start, runs: Path) -> None:
    with pytest.raises(ValueError, match="keeps batch statistics"):
        start("run", workload=WithBatchNorm(), islands=1)
    assert not (runs / "run").exists()  # nothing half-written


def test_more_islands_than_the_cluster_holds_are_refused(start: Start, runs: Path) -> None:
    with pytest.raises(ValueError, match=r"islands=9.*4"):
        start("run", islands=9)
    assert not (runs / "run").exists()
