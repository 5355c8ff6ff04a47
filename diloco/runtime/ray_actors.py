"""What runs inside Ray's actors: thin shells around Island and ModuleStore.

Methods of the group `io` run in a thread of their own, so that checkpoints are written while the actor works on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diloco import checkpoint as ckpt
from diloco.messages import (
    EVALUATOR,
    Commit,
    CommitStats,
    Contribution,
    IslandId,
    ModuleKey,
    Modules,
    Shape,
    Snapshot,
    SourceId,
    State,
    Task,
    Verdict,
)
from diloco.runtime.base import Job


class IslandShell:
    """One island, or the evaluator."""

    def __init__(self, job: Job, island: IslandId) -> None:
        self._job, self._gpus = job, job.gpus_per_worker if island != EVALUATOR else 0.0
        self._frozen: dict[SourceId, State] = {}

    def build(self) -> dict[str, Shape]:
        """Make the island; returns the model's trainable parameters. Not in `__init__`, whose errors Ray rewords."""
        _prepare(self._job)
        self._island = self._job.make_island(self._job.corpus(), gpus=self._gpus)
        return self._island.shapes()

    def setup(self, modules: Modules) -> str:
        """Returns the node that this actor runs on."""
        self._island.setup(modules)
        return str(ray.get_runtime_context().get_node_id())

    def initial(self, groups: Sequence[Sequence[ModuleKey]], init_from: str) -> Any:
        """Version 0 of these modules, one list of snapshots for each group (a shard of the store)."""
        values = ckpt.read_values(init_from) if init_from else None
        parts = [self._island.initial(keys, values) for keys in groups]
        return parts if len(parts) > 1 else parts[0]

    def load(self, checkpoint: str, source: SourceId) -> bool:
        """Become a source of a checkpoint; whether it has that source."""
        state = ckpt.read_source(checkpoint, source)
        if state is not None:
            self._island.load(source, state)
            self._frozen[source] = state  # it may have no more to do before the next checkpoint
        return state is not None

    def run(self, task: Task, snapshots: Sequence[Any], groups: Sequence[Sequence[ModuleKey]]) -> Any:
        """The report, then one list of contributions for each group of modules (a shard of the store)."""
        # One fetch after the other, in the order given: at once they would get in each other's way on slow links.
        pulled = [snapshot for ref in snapshots for snapshot in ray.get(ref)]
        report, contributions = self._island.run(task, pulled)
        if task.save:
            self._frozen[task.source] = self._island.export(task.source)
        parts = [[c for c in contributions if c.module in keys] for keys in groups]
        return (report, *parts) if parts else report

    @ray.method(concurrency_group="io")
    def write(self, folder: str, source: SourceId) -> dict[str, str]:
        """Write what the last task with `save` left of this source."""
        return ckpt.write_source(folder, source, self._frozen.pop(source))

    def finish(self, snapshots: Sequence[Any], folder: str | None, prompt: str) -> tuple[int, str, str]:
        """Install the final weights; export and sample where there is a folder: (parameters, SHA-256, sample)."""
        self._island.install([snapshot for ref in snapshots for snapshot in ray.get(ref)])
        if folder is not None:
            self._island.write_model(Path(folder))
        sample = self._island.sample(prompt) if folder is not None else ""
        return self._island.num_parameters(), self._island.weights_sha256(), sample


class ShardShell:
    """One shard of the store."""

    def __init__(self, job: Job) -> None:
        _prepare(job)
        self._store = job.make_store()
        self._frozen: dict[str, dict[ModuleKey, State]] = {}

    def fill(self, snapshots: list[Snapshot]) -> None:
        """Starting values."""
        self._store.fill(snapshots)

    def load(self, checkpoint: str, keys: list[ModuleKey]) -> None:
        """What a checkpoint holds of these modules."""
        self._store.load_state(ckpt.read_modules(checkpoint, keys))

    def push(self, contributions: list[Contribution]) -> list[Verdict]:
        """Judge and keep."""
        return [self._store.push(contribution) for contribution in contributions]

    def commit(self, commits: Sequence[Commit]) -> list[int]:
        """Outer steps; returns the versions."""
        return [self._store.commit(commit) for commit in commits]

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


def _prepare(job: Job) -> None:
    torch.set_num_threads(job.threads_per_worker)
    for module in job.imports:  # registers the user's own parts here too
        importlib.import_module(module)


_actor: Any = ray.remote  # Ray's types know nothing of concurrency groups
_IslandActor: Any = _actor(concurrency_groups={"io": 1})(IslandShell)
_ShardActor: Any = _actor(concurrency_groups={"io": 1})(ShardShell)


def spawn_island(job: Job, island: IslandId) -> Any:
    """A handle of a new island, or evaluator, somewhere in the cluster."""
    if island == EVALUATOR:  # exports to the run's directory, so it lives where the driver does
        home = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return _IslandActor.options(num_cpus=0, scheduling_strategy=home).remote(job, island)
    cpus, gpus = job.threads_per_worker, job.gpus_per_worker
    return _IslandActor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD").remote(job, island)


def spawn_shard(job: Job) -> Any:
    """A handle of a new shard of the store."""
    return _ShardActor.options(num_cpus=0, scheduling_strategy="SPREAD").remote(job)
