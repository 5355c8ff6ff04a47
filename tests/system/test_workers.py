"""Islands of several workers on Ray: the joint batch of one process, resumed, killed, refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from diloco import Result, RunConfig
from diloco.checkpoint import Checkpoint, CheckpointFolder
from diloco.codec import Float32
from diloco.data import Data
from diloco.fsdp2 import Fsdp2
from diloco.inner import AdamW, Inner, Muon, Sgd
from diloco.jobs import make_job
from diloco.layout import Whole, check_blocks
from diloco.messages import Contribution, IslandId, Report, ShardId, Snapshot, SourceId, Task, Tensors
from diloco.outer import Sgd as OuterSgd
from diloco.replica import ReplicaKind, Single
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.starting import read_values
from diloco.workers import World, join, meet
from diloco.workload import Batch
from tests.conftest import Start
from tests.faults.acting import opened_when_joined
from tests.toy import (
    Deep,
    FailingInRank1,
    Line,
    Signalling,
    digests,
    launch,
    records,
    wait_for,
    warned,
)

pytestmark = pytest.mark.timeout(300)  # seconds a test: several starts of many processes
KINDS = [ReplicaKind.ddp, ReplicaKind.fsdp2]
# What a step of several workers can get wrong: accumulation, clipping, decay, blocks, a tensor of one row.
JOINT: dict[str, Any] = {
    "workload": Line(blocks=3),
    "inner": AdamW(lr=0.01, clip=0.1),
    "data": Data(batch=8, accumulation=2),
    "store": Store(shards=2),
}


def values(result: Result) -> Tensors:
    return read_values(result.summary["checkpoint"])


def assert_equal_to_rounding(found: Result, expected: Result) -> None:
    assert set(values(found)) == set(values(expected))
    for name, value in values(expected).items():
        torch.testing.assert_close(values(found)[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


def losses(result: Result) -> list[tuple[float, float]]:
    found = records(result.directory, "segment")
    found.sort(key=lambda record: (record["island"], record["step"]))
    return [(record["inner/loss"], record["inner/grad_norm"]) for record in found]


# --- what two workers train, without Ray ---


@dataclass(kw_only=True)
class Uneven(Line):
    """The tokens of a batch are not spread evenly over its sequences; the loss is the mean a token."""

    def batch(self, corpus: Any, shard: Any, step: int) -> Batch:
        return {**super().batch(corpus, shard, step), "weight": torch.arange(8) // 2}  # 0 0 1 1 2 2 3 3

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        errors = (model(batch["x"]) - batch["y"]).square().mean(1)
        return (errors * batch["weight"]).sum() / batch["weight"].sum().clamp(min=1), {}

    def tokens(self, batch: Batch) -> int:
        return int(batch["weight"].sum())


# name -> workload, inner optimizer, accumulation
CASES: dict[str, tuple[Line, Inner, int]] = {
    "adamw": (Line(blocks=3), AdamW(lr=0.01, clip=0.1), 2),
    "muon": (Line(blocks=3), Muon(lr=0.01, clip=0), 1),
    "tokens": (Uneven(blocks=2), Sgd(lr=0.05), 1),
    "tied": (Line(), AdamW(lr=0.01), 4),
}


def train_case(name: str, kind: ReplicaKind, world: World) -> tuple[Report, list[Contribution]]:
    """Three tasks as an island gets them; the last installs some of its own weights' neighbours half-way."""
    workload, inner, accumulation = CASES[name]
    data = Data(batch=8, accumulation=accumulation)
    config = RunConfig(workload=workload, inner=inner, data=data, replica=kind, store=Store(shards=2), islands=1)
    island = make_job(config).make_island(workload.corpus(data, seed=0, shards=1), world)
    modules = config.layout.build(island.shapes(), 2)
    island.setup(modules)
    path = modules.paths[0]
    fresh = Single(workload.build_model(9))
    given = [
        Snapshot(module=key, version=1, base_version=None, payload=Float32().encode(fresh.read(modules.slots[slot])))
        for slot, key in path.items()
    ]
    for segment in range(3):
        task = Task(
            source=SourceId(0), island=IslandId(0), round=0, segment=segment, modules=path, shard=ShardId(0),
            install={} if segment == 1 else dict.fromkeys(path, 1), keep=0.5 if segment == 2 else 0.0,
            first_step=3 * segment, steps=3, send=tuple(path) if segment == 2 else (), last=segment == 2,
        )  # fmt: skip
        report, sent = island.run(task, given if task.install and world.rank == 0 else [])
    return report, sent


def _train(rank: int, folder: str) -> None:
    """As one of two workers: every case with every kind of replica."""
    world = join_in(Path(folder), rank)
    for kind, name in product(KINDS, CASES):
        report, sent = train_case(name, kind, world)
        assert bool(sent) == (rank == 0)
        if rank == 0:
            deltas = {n: t for c in sent for n, t in Float32().decode(c.payload).items()}
            said = {key: report.metrics[key] for key in ("inner/loss", "inner/grad_norm")}
            torch.save({"deltas": deltas, **said}, Path(folder, f"{kind.value}-{name}.pt"))


def join_in(folder: Path, rank: int) -> World:
    torch.set_num_threads(1)
    address = folder / "address"
    if rank == 0:
        store = meet("127.0.0.1")
        (folder / "writing").write_text(f"127.0.0.1:{store.port}")
        (folder / "writing").rename(address)
    else:
        wait_for(address.exists)
    place = store if rank == 0 else address.read_text()
    return join(place, host="127.0.0.1", rank=rank, size=2, device=torch.device("cpu"), shared=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    processes.spawn(_train, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_two_workers_train_on_the_joint_batch(trained: Path, kind: ReplicaKind, name: str) -> None:
    """As one process does: with accumulation, clipping, decay, blocks, tied and frozen tensors, and one of one row."""
    found = torch.load(trained / f"{kind.value}-{name}.pt", weights_only=True)
    report, sent = train_case(name, ReplicaKind.ddp, World())
    # Muon orthogonalises in bfloat16, where sums over rows are rounded differently when the rows are split.
    loose = 100.0 if (name, kind) == ("muon", ReplicaKind.fsdp2) else 1.0
    assert found["inner/loss"] == pytest.approx(report.metrics["inner/loss"], rel=1e-5 * loose)
    assert found["inner/grad_norm"] == pytest.approx(report.metrics["inner/grad_norm"], rel=1e-4 * loose)
    expected = {n: t for c in sent for n, t in Float32().decode(c.payload).items()}
    assert set(found["deltas"]) == set(expected)
    for parameter, value in expected.items():
        if loose > 1:  # one step of torch's own differs by up to 6 %
            assert (found["deltas"][parameter] - value).norm() < 0.1 * value.norm()
        else:
            torch.testing.assert_close(found["deltas"][parameter], value, rtol=1e-3, atol=2e-6)


# --- what islands of workers train ---


def test_data_parallel_is_one_island_of_workers(start: Start, runs: Path) -> None:
    """With Nesterov's rate 1 and no momentum the store only carries the weights along."""
    settings = {**JOINT, "islands": 1, "outer": OuterSgd(lr=1.0)}
    expected = launch(runs / "local", **settings)
    found = start("run", **settings, workers=2)
    assert_equal_to_rounding(found, expected)
    for mine, theirs in zip(losses(found), losses(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert found.summary["bytes_inside"] == 4 * 2 * found.summary["trainable_parameters"] * 18
    assert expected.summary["bytes_inside"] == 0


def test_unequal_islands(start: Start, runs: Path) -> None:
    expected = launch(runs / "local", **JOINT)
    found = start("run", **JOINT, workers=[2, 1], replica=ReplicaKind.fsdp2)
    assert_equal_to_rounding(found, expected)
    same = ("tokens", "contributions", "outer_steps", "trainable_parameters")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}
    parameters = found.summary["trainable_parameters"]
    gathered = 2 * 2 * (parameters + 3)  # frozen ones too, for each of two parts of a batch
    assert found.summary["bytes_inside"] == 4 * (gathered + parameters) * 18


# --- resume ---


RESUMED = {**JOINT, "islands": 1, "rounds": 4, "checkpoint": Checkpoint(every=2, keep=9)}


def test_a_resumed_run_is_one_that_never_stopped(start: Start) -> None:
    """To the bit on the same number of workers, on another to rounding: what is spread over them."""
    fsdp2 = ReplicaKind.fsdp2
    expected = start("whole", **RESUMED, workers=2, replica=fsdp2)
    for name, workers in {"same": 2, "fewer": 1}.items():
        copied_until_round_2(expected.directory, Path("runs") / name)
        runtime = {} if workers > 1 else {"runtime": Local()}
        found = start(name, **RESUMED, **runtime, workers=workers, replica=fsdp2, resume=f"runs/{name}")
        assert found.summary["tokens"] == expected.summary["tokens"]
        assert workers != 2 or digests(found) == digests(expected)
        assert_equal_to_rounding(found, expected)


def copied_until_round_2(run: Path, to: Path) -> None:
    """A run as it would be had it been killed in round 3."""
    shutil.copytree(run, to)
    for later in ("round-000003", "round-000004"):
        shutil.rmtree(to / "checkpoints" / later, ignore_errors=True)
    assert CheckpointFolder(str(to / "checkpoints")).names() == ["round-000002"]


# --- loss and mistakes ---


def test_a_killed_worker_takes_its_island_down_and_the_run_goes_on(start: Start, runs: Path) -> None:
    """In the middle of round 1; the other island goes on, and waits in round 3 until the first is back."""
    flag, back = runs / "kill", runs / "back"
    flag.write_text("")
    workload = Signalling(
        file=str(flag), at_shard=1, at_step=6 + 3, at_worker=1, gate=str(back), gate_shard=0, gate_step=3 * 6 + 3
    )

    settings = {"rounds": 6, "checkpoint": Checkpoint(every=1)}
    with opened_when_joined(back, runs / "run"):
        result = start("run", workload=workload, workers=2, replica=ReplicaKind.fsdp2, **settings)
    assert not flag.exists()
    assert result.summary["status"] == "finished"
    assert (result.summary["islands_lost"], result.summary["islands_joined"]) == (1, 1)
    contributors = [record["outer/contributors"] for record in records(result.directory, "commit")]
    assert contributors == [[0, 1], [0], [0], [0], [0, 1], [0, 1]]
    assert result.summary["tokens"] == 9 * 6 * 8
    failed = [message for message in warned(result.directory) if "could not be written" in message]
    assert not [message for message in failed if "round-000001" not in message]
    assert Path(CheckpointFolder(str(result.directory / "checkpoints")).newest()[0]).name == "round-000006"


def test_a_mistake_that_one_worker_finds_reaches_the_caller(start: Start) -> None:
    with pytest.raises(ValueError, match="this batch is not one"):
        start("run", workload=FailingInRank1(), islands=1, workers=2)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 3}, r"workers=3 with data\.accumulation=1 do not divide data\.batch=8.*a multiple of 3"),
        ({"workers": 4, "data": Data(batch=4, accumulation=2)}, r"a multiple of 8"),
        ({"workers": [2, 1, 1]}, r"workers=\[2, 1, 1\] has 3 numbers for islands=2; give one each"),
        ({"workers": 0}, "workers=0: give a number of at least 1"),
        ({"workers": [2, "x"]}, "give a number of at least 1"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"workers": True}, "workers=True"),
        ({"replica": "fsdp3"}, "replica=fsdp3 is unknown; use ddp or fsdp2"),
    ],
)
def test_workers_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(**{"islands": 2, **settings})


def test_fsdp2_with_a_layout_that_cuts_a_block(runs: Path) -> None:
    layout = Whole(patterns=["norm|layers.*weight|enter|scale", "layers.*bias|leave"])
    with pytest.raises(ValueError, match=r"replica=fsdp2 gathers (layers\.0|what lies outside the blocks) as one"):
        launch(runs / "run", **{**JOINT, "layout": layout}, replica=ReplicaKind.fsdp2)
    assert not (runs / "run").exists()


def test_slots_that_nobody_chose_keep_blocks_whole() -> None:
    shapes = {name: tuple(p.shape) for name, p in Deep(3).named_parameters() if p.requires_grad}
    config = RunConfig(replica=ReplicaKind.fsdp2)
    modules = config.layout.build(shapes, 2)
    assert len(modules.slots) == 2
    check_blocks(modules)
    with pytest.raises(ValueError, match="the layout cuts it"):
        check_blocks(Whole().build(shapes, 2))


def test_more_gpus_than_the_cluster_has(start: Start, runs: Path) -> None:
    with pytest.raises(
        ValueError, match=r"islands=2 workers=2 with 1 CPU and 1 GPU a worker: the 1 node.* have places for 0"
    ):
        start("run", workers=2, gpus_per_worker=1.0)
    assert not (runs / "run").exists()


def test_more_workers_than_the_cluster_holds(start: Start, runs: Path) -> None:
    with pytest.raises(ValueError, match=r"islands=2 workers=\[4,1\] with 1 CPU a worker.* places for 4"):
        start("run", workers=[4, 1])
    assert not (runs / "run").exists()


def test_more_gpus_than_this_machine_has(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diloco.runtime.ray_start import _check_machine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"islands=2 workers=2 with gpus_per_worker=1 need 4 GPUs.* has 3"):
        _check_machine(make_job(RunConfig(islands=2, workers=2, gpus_per_worker=1, store=Store(shards=1))))


# --- what a worker holds ---


def _hold(rank: int, folder: str) -> None:
    """As one of two workers: install, and note how much this one keeps, and what it sends."""
    world = join_in(Path(folder), rank)
    torch.manual_seed(0)
    model = Deep(2)
    full = {n: p.detach().clone() + 1 for n, p in model.named_parameters() if p.requires_grad}
    replica = Fsdp2(model, world)
    slots: Sequence[list[str]] = ([n for n in full if "layers" in n], [n for n in full if "layers" not in n])
    anchor: Tensors = {}
    for names in slots:
        anchor |= (spread := replica.spread(names, {n: full[n] for n in names} if rank == 0 else {}))
        replica.install(names, spread, keep=0.0)
    kept = sum(part.untyped_storage().nbytes() for part in anchor.values())
    own = sum(p.to_local().numel() for p in replica.parameters().values())  # type: ignore[attr-defined]
    assert kept == 4 * own, "the anchor holds on to more than this worker's rows"
    with torch.no_grad():
        for p in replica.parameters().values():
            p.sub_(0.5)
    for names in slots:
        payload = replica.contribution(Float32(), anchor, names)
        assert (payload is not None) == (rank == 0)
        delta = {} if payload is None else Float32().decode(payload)
        assert set(delta) == (set(names) if rank == 0 else set())
        assert all(torch.equal(value, torch.full_like(full[n], 0.5)) for n, value in delta.items())
    assert replica.agreed(2 if rank == 0 else 1) == 2
    present = replica.parts(slots[0])
    assert all(torch.equal(part, anchor[name] - 0.5) for name, part in present.items()) and len(present) == len(
        slots[0]
    )
    spread = replica.spread(slots[0], {n: full[n] + 8 for n in slots[0]} if rank == 0 else {})
    replica.install(slots[0], spread, keep=0.25)
    for name, value in replica.read(list(full)).items():  # .25 (theta - .5) + .75 (theta + 8)
        torch.testing.assert_close(value, full[name] + (5.875 if name in slots[0] else -0.5))
    Path(folder, f"own{rank}").write_text(str(own))


def test_a_worker_of_fsdp2_holds_its_rows_and_no_more(tmp_path: Path) -> None:
    processes.spawn(_hold, (str(tmp_path),), nprocs=2)
    rows = [int((tmp_path / f"own{rank}").read_text()) for rank in range(2)]
    parameters = [p for p in Deep(2).parameters() if p.requires_grad]
    assert sum(rows) == sum(p.numel() for p in parameters)
    assert max(rows) < 0.62 * sum(rows)  # 7 rows are 4 and 3, and one row is 1 and 0


def test_local_and_ray_record_the_same_configuration(runs: Path) -> None:
    result = launch(runs / "run", **JOINT, workers=[2, 1], replica=ReplicaKind.fsdp2, runtime=Local())
    text = (result.directory / "config.yaml").read_text()
    assert "replica: fsdp2" in text and "keep_blocks: true" in text
    assert result.summary["workers"] == [2, 1]


@pytest.mark.parametrize(
    ("gpus", "share", "places"), [(1, 0.2, 5), (1, 0.1, 10), (2, 0.6, 2), (4, 1.0, 4), (4, 2.0, 2), (0, 0.5, 0)]
)
def test_a_workers_share_of_a_gpu_lies_on_one(gpus: int, share: float, places: int) -> None:
    from diloco.runtime.ray_start import _gpu_places

    assert _gpu_places(gpus, make_job(RunConfig(gpus_per_worker=share, store=Store(shards=1)))) == places
