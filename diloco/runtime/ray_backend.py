"""The driver's side of a run on Ray: commands become requests to actors, answers become events.

The driver handles references only. Weights go from actor to actor as flat uint8 buffers; what the driver
fetches are reports, verdicts and statistics.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError

from diloco.events import (
    CommitAll,
    Committed,
    Event,
    Finished,
    FoldAll,
    Interrupted,
    Lost,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Saved,
    Tick,
)
from diloco.messages import EVALUATOR, IslandId, ModuleKey, Modules, Shape, SlotName, SourceId, Task, Turn
from diloco.runtime import ray_folder
from diloco.runtime.base import Backend, Final, Job, StoreLost, by_shard, placed
from diloco.runtime.ray_crew import Crew
from diloco.runtime.ray_metrics import RayMetrics
from diloco.runtime.ray_place import Packed, Where
from diloco.runtime.ray_refs import LOST, Pending, Ref, died, get, mistake, raise_errors, short, starting
from diloco.runtime.ray_ring import Puller, Pusher
from diloco.runtime.ray_save import Saver
from diloco.runtime.ray_shards import Shards
from diloco.runtime.ray_start import disconnect


class RayBackend(Backend):
    """The driver's side: references in, events out."""

    def __init__(self, job: Job, *, tick_s: float, shut_down: bool) -> None:
        self._job, self._tick_s, self._shut_down = job, tick_s, shut_down
        self._pending = Pending()
        self._events: deque[Event] = deque()
        self._sent: dict[Turn, list[tuple[int, Ref]]] = {}
        self._saver = Saver(self._pending, self._on_saved, moving=job.moving)
        self._packed = Packed.of(job)
        self._crew = Crew(job, self._packed, self._pending, self._saver, self._events.append)
        self._shards = Shards(job.patience)
        self._interrupted = False
        self._looked_s = 0.0

    # --- start ---

    @starting()
    def shapes(self) -> dict[str, Shape]:
        """Starts all actors at once, so that their imports overlap; waits for the evaluator."""
        self._crew.start()
        self._shards.spawn(self._packed, self._crew.place(), self._job.shards)
        self._pusher = Pusher(self._pending, self._shards.nodes)
        return dict(get(self._crew.handles[EVALUATOR].built[0]))

    @starting()
    def setup(self, modules: Modules) -> None:
        """Tells all islands, and waits until they are ready."""
        self._modules = modules
        self._puller = Puller(self._shards.actors, modules, self._job.codec_down)
        self._crew.record(Where.here(), {"kind": "driver"})
        for index, where in enumerate(self._shards.setup(self._job.steps_a_round(modules))):
            self._crew.record(where, {"kind": "shard", "shard": index})
        self._crew.setup(modules)

    def absent(self) -> frozenset[IslandId]:
        """They are started once there is a place for them."""
        return self._crew.absent()

    @starting()
    def check_folder(self, folder: str) -> None:
        """Asks the islands that are there, if they are on several nodes."""
        there = {where.host: self._crew.handles[island] for island, where in self._crew.where.items()}
        if len(there) > 1:
            ray_folder.check(folder, there)

    @starting()
    def fill(self, init_from: str) -> Mapping[IslandId, list[ModuleKey]]:
        """The evaluator's weights go to the shards directly."""
        groups = [placed(self._modules, index) for index in range(self._job.shards)]
        parts = self._crew.handles[EVALUATOR].initial(groups, init_from)
        filled = get([shard.fill.remote(part) for shard, part in zip(self._shards.actors, parts, strict=True)])
        digests = {key: digest for part in filled for key, digest in part.items()}
        asked = {island: self._crew.handles[island].adopt(digests) for island in self._crew.where}
        return {island: get(refs)[0] for island, refs in asked.items()}

    @starting()
    def load(self, checkpoint: str, sources: Mapping[SourceId, int], now_s: float) -> None:
        """Shards and islands read their own files; an island that is not there yet does so when it comes."""
        self._crew.resumed(now_s)
        get([shard.load.remote(checkpoint, placed(self._modules, i)) for i, shard in enumerate(self._shards.actors)])
        there = sorted(island for island in self._crew.where if island != EVALUATOR)
        whose = {source: there[i % len(there)] if self._job.moving else IslandId(i) for source, i in sources.items()}
        own = {source: self._crew.handles[island] for source, island in whose.items() if island in there}
        self._saver.load(checkpoint, own)

    # --- commands ---

    def carry_out(self, command: Run | Push | FoldAll | CommitAll | Measure | Respawn) -> None:
        """Submits; actors keep the order in which they are asked."""
        match command:
            case Run():
                self._run(command)
            case Push():
                self._push(command.task)
            case FoldAll():
                folds = by_shard(self._modules, command.folds)
                self._pending.add([self._shards.actors[i].fold.remote(part) for i, part in folds.items()], raise_errors)
            case CommitAll():
                self._puller.renew()
                commits = by_shard(self._modules, command.commits)
                self._pending.add(
                    [self._shards.actors[i].commit.remote(part) for i, part in commits.items()], raise_errors
                )
            case Measure():
                self._pending.add([shard.measure.remote() for shard in self._shards.actors], self._on_measured)
            case Respawn():
                self._crew.respawn(command.island)

    def save(self, root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """In other threads of the actors."""
        self._saver.save(self._shards.actors, self._crew.handles[EVALUATOR], root, name, manifest, keep)

    # --- events ---

    def next_event(self, wake_s: Callable[[], float | None]) -> Event:
        """Waits for the first answer; a Tick when none comes for a while, or up to `wake_s()`.

        Raises StoreLost.
        """
        while True:
            if self.now_s() - self._looked_s > self._tick_s:
                self._look()
            if self._interrupted:
                self._interrupted = False
                return Interrupted(now_s=self.now_s())
            if self._events:
                return self._events.popleft()
            wake = wake_s() or math.inf
            try:
                heard = self._pending.wait(min(self._tick_s, max(0.0, wake - self.now_s())))
            except LOST as error:  # of what is no island's: those are replaced
                raise StoreLost(f"a process of the store is gone: {short(error)}") from error
            if not heard:
                return Tick(now_s=self.now_s())

    def now_s(self) -> float:
        """Seconds since the backend was made."""
        return self._crew.now_s()

    def interrupt(self) -> None:
        """Seen at the latest after a tick."""
        self._interrupted = True

    # --- end ---

    def finish(self, present: Run, folder: str | None, prompt: str) -> Final:
        """On the evaluator; only digests and the sample come back. Raises StoreLost."""
        snapshots = self._puller.pull(self._crew.where[EVALUATOR].node, EVALUATOR, present.wants)
        try:
            asked = self._crew.handles[EVALUATOR].finish(present.task, snapshots, folder, prompt)
            parameters, digest, written = get(asked)
            digests = get([shard.outer_digests.remote() for shard in self._shards.actors])
        except LOST as error:
            raise StoreLost(f"a process is gone at the run's end: {short(error)}") from error
        return Final(
            parameters=parameters,
            weights_sha256=digest,
            outer_digests={k: v for part in digests for k, v in part.items()},
            written=written,
        )

    def sinks(self, run: str) -> list[Any]:
        """Ray's own metrics."""
        return [RayMetrics(run)]

    def close(self) -> None:
        """Ends the actors; a Ray that was started or connected to here ends with them."""
        self._pending.clear()
        if ray.is_initialized():
            self._crew.kill()
            self._shards.kill()
        if self._shut_down:
            disconnect()

    # --- inside ---

    def _run(self, command: Run) -> None:
        task = command.task
        if command.take_up:
            self._saver.take_up(task.source, self._crew.handles[task.island])
        shards = {self._modules.shards[task.modules[slot]] for slot in task.send}
        # Made in the order in which they are taken.
        turns = sorted(shards, key=lambda shard: (task.island - 1 - shard) % self._job.shards)
        groups = {n: [s for s in task.send if self._modules.shards[task.modules[s]] == n] for n in turns}
        # A new evaluator has nothing to update; where it takes full values anyway, these are the same objects.
        all_of_it = dict.fromkeys(task.modules.values()) if task.island == EVALUATOR else {}
        node = self._crew.where[task.island].node
        spare = self._puller.pull(node, task.island, all_of_it)
        snapshots = self._puller.pull(node, task.island, command.wants)
        self._submit(task, snapshots, groups, command.ahead, spare)

    def _submit(
        self, task: Task, snapshots: list[Ref], groups: dict[int, list[SlotName]], ahead: bool, spare: list[Ref]
    ) -> None:
        island = self._crew.handles[task.island]
        kind = "evaluation" if task.island == EVALUATOR else "task with weights to fetch" if snapshots else "task"
        self._crew.pulse.begin(task.island, kind, self.now_s(), size=max(task.steps, 1))
        answers, contributions = island.run(task, snapshots, list(groups.values()), ahead)
        if groups:
            sent = self._sent[task.turn] = list(zip(groups, contributions, strict=True))
            node = self._crew.where[task.island].node
            offer = partial(self._pusher.offer, self._shards.parts(sent), node, task.island)
            self._pending.watch(contributions[0], offer)  # the links need not wait for the report

        def done(found: list[Any], error: RayError | None) -> None:
            if error is not None and not island.broken(error):
                raise mistake(error, answers) from None
            if self._crew.handles[task.island] is not island:
                if task.island == EVALUATOR and error is not None:
                    self._submit(task, spare, groups, ahead, spare)
                return  # it was replaced, and its work given out again
            if error is None:
                self._crew.pulse.end(task.island, self.now_s())
                self._crew.well(task.island)
                if task.save:
                    self._saver.exported(task, island)
                self._events.append(Finished(now_s=self.now_s(), report=found[-1]))
            elif task.island == EVALUATOR:
                self._crew.revive_evaluator()
                self._submit(task, spare, groups, ahead, spare)
            else:
                self._lose(task.island, short(error))

        self._pending.add(answers, done, at_first_error=True)

    def _push(self, task: Task) -> None:
        island = self._crew.handles[task.island]

        def done(answers: list[Any], error: RayError | None) -> None:
            if self._crew.handles[task.island] is island:
                self._crew.pulse.end(task.island, self.now_s(), lane="sending")
            if error is not None and died(error):
                raise StoreLost(f"a shard of the store is gone: {short(error)}") from error
            if isinstance(error, ObjectLostError):  # with the node of the island
                if self._crew.handles[task.island] is island:
                    self._lose(task.island, short(error))
            else:
                raise_errors(answers, error)
                verdicts = tuple(verdict for answer in answers for verdict in answer)
                heard = Received(now_s=self.now_s(), turn=task.turn, verdicts=verdicts, attempt=task.attempt)
                self._events.append(heard)

        self._crew.pulse.begin(task.island, "contribution", self.now_s(), lane="sending")
        sent = self._sent.pop(task.turn)
        self._pusher.push(self._shards.parts(sorted(sent, key=lambda part: part[0])), done)

    def _look(self) -> None:
        """Who does not answer, and who makes no progress: each is given up for lost."""
        self._looked_s = self.now_s()
        self._shards.check(self._looked_s)
        for late in self._crew.look():
            self._crew.pulse.drop(late.who)
            self._crew.handles[late.who].kill()  # its answers are errors from now on
            if late.kind == "start" or late.who == EVALUATOR:
                self._crew.warn(f"{self._crew.name(late.who)}: {late.said}; replaced")
            else:
                self._lose(late.who, late.said)
        if not self.relocates and self._crew.leaving.intersection(self._shards.nodes):
            self.relocates = self._interrupted = True  # with a checkpoint of this moment, so that nothing is lost

    def _lose(self, island: IslandId, reason: str) -> None:
        """The coordinator decides what becomes of it. What it was sending is not waited for."""
        self._crew.pulse.drop(island)
        self._pusher.forget(island)
        self._events.append(Lost(now_s=self.now_s(), island=island, reason=reason))

    def _on_saved(self, path: str, seconds: float, error: str) -> None:
        self._events.append(Saved(now_s=self.now_s(), path=path, seconds=seconds, error=error))

    def _on_measured(self, answers: list[Any], error: RayError | None) -> None:
        raise_errors(answers, error)
        stats = tuple(found for answer in answers for found in answer)
        self._events.append(Committed(now_s=self.now_s(), stats=stats))
