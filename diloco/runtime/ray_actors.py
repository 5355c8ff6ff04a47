"""What runs inside Ray's actors: thin shells around Island and ModuleStore.

Methods of the group `io` run in a thread of their own, so that checkpoints are written while the actor works on; so do
those of `links`, which wait for other nodes, and of `ping`, which are answered whatever else is going on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diloco import checkpoint as ckpt
from diloco import workers
from diloco.messages import (
    EVALUATOR,
    Commit,
    CommitStats,
    Contribution,
    Fold,
    IslandId,
    ModuleKey,
    Modules,
    Report,
    Shape,
    SlotName,
    Snapshot,
    SourceId,
    State,
    Task,
    Verdict,
    Written,
)
from diloco.runtime.base import LOADED
from diloco.runtime.kept import Kept, pack, unpack
from diloco.runtime.ray_place import Packed, Where, host
from diloco.starting import StartingValues

LOG = logging.getLogger("diloco")  # Ray keeps what actors say: `ray logs`
LINKS = 16  # fetches of a shard at once, of which all but one hang on nodes that do not answer any more


class WorkerShell:
    """One worker of an island, or the evaluator. All workers of an island are asked the same, in the same order."""

    def __init__(self, packed: Packed, island: IslandId, rank: int) -> None:
        self._packed, self._number, self._rank = packed, island, rank
        self._frozen: dict[tuple[SourceId, int], State] = {}  # by source and round

    def meet(self) -> str:
        """Open the place where the workers of this island meet; rank 0 only."""
        address = host()
        self._store = workers.meet(address)
        return f"{address}:{self._store.port}"

    def build(self, meeting: str) -> dict[str, Shape]:
        """Make the island; returns the model's trainable parameters. Not in `__init__`, whose errors Ray rewords."""
        job = self._job = self._packed.opened()
        size = 1 if self._number == EVALUATOR else job.workers[self._number]
        gpus = 0.0 if self._number == EVALUATOR else job.gpus_per_worker
        device = torch.device("cuda", 0) if gpus > 0 else torch.device("cpu")
        world = workers.World(device=device)
        if size > 1:
            world = workers.join(
                self._store if self._rank == 0 else meeting,
                host=host(),
                rank=self._rank,
                size=size,
                device=device,
                shared=gpus < 1,
            )
        self._island = job.make_island(job.corpus(), world, self._number)
        return self._island.shapes()

    @ray.method(concurrency_group="ping")
    def where(self) -> Where:
        """Told while it is still being built."""
        return Where.here()

    def setup(self, modules: Modules) -> Where:
        """What the layout has built."""
        self._modules = modules
        self._island.setup(modules)
        return Where.here()

    def sees(self, file: str) -> bool:
        """Whether this file is there for this worker too."""
        return ckpt.sees(file)

    def initial(self, groups: Sequence[Sequence[ModuleKey]], init_from: str) -> Any:
        """Version 0 of these modules, one list of snapshots for each group (a shard of the store)."""
        starting = StartingValues(init_from, self._modules) if init_from else None
        parts = [self._island.initial(keys, starting.of(keys) if starting else None) for keys in groups]
        return parts if len(parts) > 1 else parts[0]

    def adopt(self, digests: Mapping[ModuleKey, str]) -> list[ModuleKey]:
        """Which of these modules are here already."""
        return self._island.adopt(digests)

    def load(self, checkpoint: str, source: SourceId) -> bool:
        """Become a source of a checkpoint; whether it has that source."""
        state = ckpt.read_source(checkpoint, source, self._island.empty)
        if state is not None:
            self._island.load(source, state)
            self._freeze(source, LOADED)  # it may have no more to do before the next checkpoint
        return state is not None

    def read(self, checkpoint: str, source: SourceId) -> Kept | None:
        """What a checkpoint holds of a source, for whoever takes it up; None where it has nothing."""
        state = ckpt.read_source(checkpoint, source)
        return None if state is None else pack(state)

    def keep(self, task: Task) -> Kept:
        """What the task is to save of the present source, for whoever takes it up."""
        return pack(self._island.export(task.source, sheds=task.sheds))

    def take_up(self, source: SourceId, kept: Kept) -> None:
        """Become a source as it was kept."""
        self._island.load(source, unpack(kept))

    @ray.method(concurrency_group="io")
    def write_kept(self, folder: str, source: SourceId, kept: Kept) -> dict[str, str]:
        """Write what was kept of a source, by whomever."""
        return ckpt.write_source(folder, source, unpack(kept))

    def run(self, task: Task, snapshots: Sequence[Any], *fetched: list[Snapshot]) -> None:
        """All of a task but what it contributes; followed by `contribute` for each shard of the store, and `report`."""
        self._report: Report | None = None
        # One fetch after the other, in the order given: at once they would get in each other's way on slow links.
        with _leaving():
            pulled = [snapshot for part in (*fetched, *map(ray.get, snapshots)) for snapshot in part]
            self._report = self._island.train(task, pulled)
        place = f"island {task.island} rank {self._rank} source {task.source} round {task.round}"
        installed = f", installed versions {sorted(set(task.install.values()))}" if task.install else ""
        LOG.info("%s: steps %d to %d%s", place, task.first_step, task.first_step + task.steps, installed)

    def contribute(self, task: Task, slots: Sequence[SlotName]) -> list[Contribution]:
        """What the task contributes of these slots; each is handed over before the next is made."""
        report = self._done()
        with _leaving():
            made = [self._island.contribution(task, slot) for slot in slots]
        sent = [contribution for contribution in made if contribution is not None]
        self._report = replace(report, bytes_up=report.bytes_up + sum(c.payload.nbytes for c in sent))
        return sent

    def report(self, task: Task) -> Report:
        """What is to be told of the task, once all of it is done."""
        report = self._done()
        if task.save and not self._job.moving:  # with what error feedback lost of these contributions
            self._freeze(task.source, task.round)
        return report

    def _done(self) -> Report:
        if self._report is None:
            raise RuntimeError("the task failed")  # which `run` has told
        return self._report

    @ray.method(concurrency_group="ping")
    def alive(self) -> bool:
        """Answers from a thread of its own, so also while this worker waits for another."""
        return True

    @ray.method(concurrency_group="io")
    def write(self, folder: str, source: SourceId, round_: int) -> dict[str, str]:
        """Write what a task with `save` in this round left of this source."""
        if not self._island.saves:
            return {}
        state = self._frozen.pop((source, round_))
        for older in [key for key in self._frozen if key[0] == source and key[1] < round_]:
            del self._frozen[older]
        return ckpt.write_source(folder, source, state, self._island.world)

    def _freeze(self, source: SourceId, round_: int) -> None:
        if self._island.saves:
            self._frozen[source, round_] = self._island.export(source)

    def finish(self, task: Task, snapshots: Sequence[Any], folder: str | None, prompt: str) -> tuple[int, str, Written]:
        """Install the final weights; export and sample where there is a folder: (parameters, SHA-256, samples)."""
        self._island.install([snapshot for ref in snapshots for snapshot in ray.get(ref)], task.install)
        if folder is not None:
            self._island.write_model(Path(folder))
        written = self._island.written(prompt) if folder is not None else Written()
        return self._island.num_parameters(), self._island.weights_sha256(), written


class ShardShell:
    """One shard of the store."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._frozen: dict[str, dict[ModuleKey, State]] = {}

    def setup(self, steps_a_round: Mapping[ModuleKey, int]) -> Where:
        """Make the shard; `steps_a_round`: how often each module steps in a round."""
        self._store = self._packed.opened().make_store()
        self._store.setup(steps_a_round)
        return Where.here()

    @ray.method(concurrency_group="ping")
    def alive(self) -> bool:
        """Answers whatever the shard is doing."""
        return True

    def fill(self, snapshots: list[Snapshot]) -> dict[ModuleKey, str]:
        """Starting values; returns their digests."""
        return self._store.fill(snapshots)

    def load(self, checkpoint: str, keys: list[ModuleKey]) -> None:
        """What a checkpoint holds of these modules."""
        self._store.load_state(ckpt.read_modules(checkpoint, keys))

    @ray.method(concurrency_group="links")
    def fetch(self, refs: Sequence[Any]) -> None:
        """Bring these objects to this node; in a thread of its own, so that nothing else waits for a slow link."""
        ray.wait(list(refs), num_returns=len(refs))

    def push(self, contributions: list[Contribution]) -> list[Verdict]:
        """Judge and keep."""
        return [self._store.push(contribution) for contribution in contributions]

    def fold(self, folds: Sequence[Fold]) -> None:
        """Add up what has come."""
        for fold in folds:
            self._store.fold(fold)

    def commit(self, commits: Sequence[Commit]) -> list[int]:
        """Outer steps; returns the versions."""
        versions = [self._store.commit(commit) for commit in commits]
        for commit, version in zip(commits, versions, strict=True):
            LOG.info("%s round %d: version %d of sources %s", commit.module, commit.round, version, commit.sources)
        return versions

    def pull(self, have: Mapping[ModuleKey, int | None]) -> list[Snapshot]:
        """What the receiver lacks."""
        return self._store.pull(have)

    def measure(self) -> list[CommitStats]:
        """What the last commits looked like."""
        return self._store.measure()

    def freeze(self, name: str) -> None:
        """Copy what checkpoint `name` is to hold."""
        self._frozen[name] = self._store.state()

    @ray.method(concurrency_group="io")
    def write(self, folder: str, name: str, frozen: None) -> dict[str, str]:
        """Write what `freeze` copied; `frozen` is its answer, so that Ray calls this after it."""
        return ckpt.write_modules(folder, self._frozen.pop(name))

    def outer_digests(self) -> dict[str, str]:
        """SHA-256 of each outer state tensor."""
        return self._store.outer_digests()


@contextmanager
def _leaving() -> Iterator[None]:
    """Where this worker fails, it leaves the island's others, who would wait for it."""
    try:
        yield
    except Exception:
        workers.leave()
        raise


_actor: Any = ray.remote  # Ray's types know nothing of concurrency groups
WorkerActor: Any = _actor(concurrency_groups={"io": 1, "ping": 1})(WorkerShell)
_ShardActor: Any = _actor(concurrency_groups={"io": 1, "links": LINKS, "ping": 1})(ShardShell)


def spawn_shard(packed: Packed, node: str) -> Any:
    """A handle of a new shard of the store, on that node."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)  # soft, an actor without CPUs lands anywhere
    return _ShardActor.options(num_cpus=0, scheduling_strategy=strategy).remote(packed)
