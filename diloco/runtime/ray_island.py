"""The driver's handle of one island: its workers as Ray actors, placed, asked and ended together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from diloco.messages import EVALUATOR, IslandId, ModuleKey, Modules, SlotName, SourceId, Task, Turn
from diloco.runtime.base import Job
from diloco.runtime.ray_actors import WorkerActor
from diloco.runtime.ray_place import Packed
from diloco.runtime.ray_refs import Ref, died

PING_S = 10.0  # how long a worker may take to say that it lives


class RayIsland:
    """All workers get the same tasks; rank 0 alone takes snapshots and sends. One that dies takes the others along."""

    def __init__(self, job: Job, packed: Packed, island: IslandId) -> None:
        self._group: Any = None
        self._moving = job.moving
        self._keeping: dict[tuple[Turn, int], Ref] = {}  # by turn and segment: two tasks of a source may be under way
        self._taking: list[Ref] = []  # answers to be had before the next task
        size = 1 if island == EVALUATOR else job.workers[island]
        needs = {"CPU": float(job.threads_per_worker), "GPU": job.gpus_per_worker}
        if island == EVALUATOR:  # exports to the run's directory, so it lives where the driver does
            needs = {"CPU": 0.0, "GPU": 0.0}
            here = ray.get_runtime_context().get_node_id()
            strategies: list[Any] = [NodeAffinitySchedulingStrategy(here, soft=False)]
        elif size == 1:
            strategies = ["SPREAD"]
        else:  # on one node if one has room, since workers talk on every step
            bundle = {name: amount for name, amount in needs.items() if amount > 0}
            self._group = placement_group([bundle] * size, strategy="PACK")
            strategies = [PlacementGroupSchedulingStrategy(self._group, rank) for rank in range(size)]
        self._workers = [
            WorkerActor.options(num_cpus=needs["CPU"], num_gpus=needs["GPU"], scheduling_strategy=strategy).remote(
                packed, island, rank
            )
            for rank, strategy in enumerate(strategies)
        ]
        meeting = self._workers[0].meet.remote() if size > 1 else ""
        self.built: list[Ref] = [worker.build.remote(meeting) for worker in self._workers]

    def where(self) -> Ref:
        """Where the worker that sends is; answered as soon as it is placed."""
        return self._workers[0].where.remote()

    def setup(self, modules: Modules) -> list[Ref]:
        """Each answers where it is."""
        return [worker.setup.remote(modules) for worker in self._workers]

    def sees(self, file: str) -> Ref:
        """Whether this file is there for it too."""
        return self._workers[0].sees.remote(file)

    def initial(self, groups: Sequence[Sequence[ModuleKey]], init_from: str) -> list[Ref]:
        """Version 0 of these modules, an answer for each group."""
        refs = self._workers[0].initial.options(num_returns=len(groups)).remote(groups, init_from)
        return refs if len(groups) > 1 else [refs]

    def adopt(self, digests: Mapping[ModuleKey, str]) -> list[Ref]:
        """Each answers with those of these modules that are there already."""
        return [worker.adopt.remote(digests) for worker in self._workers]

    def load(self, checkpoint: str, source: SourceId) -> list[Ref]:
        """Each answers whether the checkpoint has that source."""
        return [worker.load.remote(checkpoint, source) for worker in self._workers]

    def run(
        self, task: Task, snapshots: Sequence[Ref], groups: Sequence[Sequence[SlotName]], ahead: bool
    ) -> tuple[list[Ref], list[Ref]]:
        """What tells when the task is done, of which the last is its report; and the contributions of each group.

        `ahead`: Ray fetches the snapshots while the island is busy, rather than the island when it needs them.
        """
        answers, self._taking = self._taking, []
        contributions: list[Ref] = []
        for rank, worker in reversed(list(enumerate(self._workers))):
            own = snapshots if rank == 0 else []
            given = [[], *own] if ahead else [own]  # of arguments themselves Ray fetches what is behind
            answers.append(worker.run.remote(task, *given))
            contributions = [worker.contribute.remote(task, slots) for slots in groups]
            if task.save and self._moving and rank == 0:
                self._keeping[task.turn, task.segment] = worker.keep.remote(task)
            answers.append(worker.report.remote(task))
        return answers, contributions

    def kept(self, task: Task) -> Ref:
        """What a task saved of its source, once it is finished; it outlives the island, not the node."""
        return self._keeping.pop((task.turn, task.segment))

    def take_up(self, source: SourceId, kept: Ref) -> None:
        """Before the next task; whether it succeeds, that task tells."""
        self._taking = [worker.take_up.remote(source, kept) for worker in self._workers]

    def read(self, checkpoint: str, source: SourceId) -> Ref:
        """What a checkpoint has of a source."""
        return self._workers[0].read.remote(checkpoint, source)

    def write_kept(self, folder: str, source: SourceId, kept: Ref) -> Ref:
        """Answers with the files."""
        return self._workers[0].write_kept.remote(folder, source, kept)

    def write(self, folder: str, source: SourceId, round_: int) -> list[Ref]:
        """Each answers with the files that it wrote of what it exported in that round."""
        return [worker.write.remote(folder, source, round_) for worker in self._workers]

    def finish(self, task: Task, snapshots: Sequence[Ref], folder: str | None, prompt: str) -> Ref:
        """On the evaluator."""
        return self._workers[0].finish.remote(task, snapshots, folder, prompt)

    def broken(self, error: RayError) -> bool:
        """Whether `error` says, or follows from it, that a worker is gone: those left see their connection end."""
        if died(error) or len(self._workers) == 1:
            return died(error)
        pings = [worker.alive.remote() for worker in self._workers]
        answered, silent = ray.wait(pings, num_returns=len(pings), timeout=PING_S)
        try:
            ray.get(answered)
        except RayError:
            return True
        return bool(silent)  # on a node that is gone, say, of which Ray does not know yet

    def kill(self) -> None:
        """End all workers, and free their places."""
        for worker in self._workers:
            ray.kill(worker)
        if self._group is not None:
            remove_placement_group(self._group)
