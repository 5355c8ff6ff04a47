"""Runtime `ray_cluster`: islands, evaluator and the shards of the store as Ray actors, on one machine or many.

The driver handles references only. Weights go from actor to actor as flat uint8 buffers; what the driver
fetches are reports, verdicts and statistics.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    Joined,
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
from diloco.runtime.base import Backend, Final, Job, Runtime, by_shard, one_each, placed
from diloco.runtime.ray_actors import spawn_shard
from diloco.runtime.ray_island import RayIsland, shard_nodes
from diloco.runtime.ray_refs import Pending, Ref, cause, died, get, get_all, mistake, raise_errors, short
from diloco.runtime.ray_ring import Part, Puller, Pusher
from diloco.runtime.ray_save import Saver
from diloco.runtime.ray_start import connect, disconnect

MAX_FAILED_STARTS = 3


@dataclass(kw_only=True)
class RayCluster(Runtime):
    """Ray actors: on the cluster at `address` or RAY_ADDRESS where there is one, else on this machine."""

    address: str = ""
    tick_s: float = 1.0  # how often the coordinator hears of the time
    object_store_bytes: int = 0  # where Ray is started here; 0 = what a few rounds need
    slowdown: list[float] = field(default_factory=list)  # seconds to sleep after each inner step, one number an island

    def __post_init__(self) -> None:
        if not self.tick_s > 0:
            raise ValueError(f"runtime.tick_s={self.tick_s} must be positive")
        if self.object_store_bytes != 0 and self.object_store_bytes < 80 << 20:
            raise ValueError(f"runtime.object_store_bytes={self.object_store_bytes} is below 80 MiB; 0 derives it")
        if any(not 0 <= seconds < float("inf") for seconds in self.slowdown):
            raise ValueError(f"runtime.slowdown={self.slowdown} must hold seconds, none of them negative")

    def open(self, job: Job) -> Backend:
        """Connects, or starts Ray; refuses more islands than can be placed."""
        one_each("runtime.slowdown", self.slowdown, job.islands)
        job = replace(job, pauses_s=tuple(self.slowdown))
        ours = connect(job, address=self.address, object_store_bytes=self.object_store_bytes)
        return RayBackend(job, tick_s=self.tick_s, shut_down=ours)


class RayBackend(Backend):
    """The driver's side: references in, events out."""

    def __init__(self, job: Job, *, tick_s: float, shut_down: bool) -> None:
        self._job, self._tick_s, self._shut_down = job, tick_s, shut_down
        self._start_s = time.monotonic()
        self._islands: dict[IslandId, RayIsland] = {}
        self._shards: list[Any] = []
        self._nodes: dict[IslandId, str] = {}
        self._pending = Pending()
        self._events: deque[Event] = deque()
        self._sent: dict[Turn, list[tuple[int, Ref]]] = {}
        self._revived: dict[IslandId, int] = {}  # times since it last finished a task
        self._saver = Saver(self._pending, self._on_saved, moving=job.moving)
        self._interrupted = False

    # --- start ---

    def shapes(self) -> dict[str, Shape]:
        """Starts all actors at once, so that their imports overlap; waits for the evaluator."""
        for index in [EVALUATOR, *range(self._job.islands)]:
            self._islands[IslandId(index)] = RayIsland(self._job, IslandId(index))
        self._shard_nodes = shard_nodes(self._islands, self._job.shards)
        self._shards = [spawn_shard(self._job, node) for node in self._shard_nodes]
        self._pusher = Pusher(self._pending, self._shard_nodes)
        return dict(get(self._islands[EVALUATOR].built[0]))

    def setup(self, modules: Modules) -> None:
        """Tells all islands, and waits until they are ready."""
        self._modules = modules
        self._puller = Puller(self._shards, modules, self._job.codec_down)
        get_all({f"island {i}": island.built for i, island in self._islands.items() if i != EVALUATOR})
        steps_a_round = self._job.steps_a_round(modules)
        get([shard.setup.remote(steps_a_round) for shard in self._shards])
        answers = {island: handle.setup(modules) for island, handle in self._islands.items()}
        self._nodes = {island: get(refs)[0] for island, refs in answers.items()}

    def fill(self, init_from: str) -> Mapping[IslandId, list[ModuleKey]]:
        """The evaluator's weights go to the shards directly."""
        groups = [placed(self._modules, index) for index in range(len(self._shards))]
        parts = self._islands[EVALUATOR].initial(groups, init_from)
        filled = get([shard.fill.remote(part) for shard, part in zip(self._shards, parts, strict=True)])
        digests = {key: digest for part in filled for key, digest in part.items()}
        asked = {number: island.adopt(digests) for number, island in self._islands.items()}
        return {number: get(refs)[0] for number, refs in asked.items()}

    def load(self, checkpoint: str, sources: Mapping[SourceId, int], now_s: float) -> None:
        """Shards and islands read their own files."""
        self._start_s -= now_s
        get([shard.load.remote(checkpoint, placed(self._modules, i)) for i, shard in enumerate(self._shards)])
        count = self._job.islands
        self._saver.load(checkpoint, {source: self._islands[IslandId(i % count)] for source, i in sources.items()})

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
                self._pending.add([self._shards[i].fold.remote(part) for i, part in folds.items()], raise_errors)
            case CommitAll():
                self._puller.renew()
                commits = by_shard(self._modules, command.commits)
                self._pending.add([self._shards[i].commit.remote(part) for i, part in commits.items()], raise_errors)
            case Measure():
                self._pending.add([shard.measure.remote() for shard in self._shards], self._on_measured)
            case Respawn():
                self._respawn(command.island)

    def save(self, root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """In other threads of the actors."""
        self._saver.save(self._shards, self._islands[EVALUATOR], root, name, manifest, keep)

    # --- events ---

    def next_event(self, wake_s: Callable[[], float | None]) -> Event:
        """Waits for the first answer; a Tick when none comes for a while, or up to `wake_s()`."""
        while True:
            if self._interrupted:
                self._interrupted = False
                return Interrupted(now_s=self.now_s())
            if self._events:
                return self._events.popleft()
            wake = wake_s() or math.inf
            if not self._pending.wait(min(self._tick_s, max(0.0, wake - self.now_s()))):
                return Tick(now_s=self.now_s())

    def now_s(self) -> float:
        """Seconds since the backend was made."""
        return time.monotonic() - self._start_s

    def interrupt(self) -> None:
        """Seen at the latest after a tick."""
        self._interrupted = True

    # --- end ---

    def finish(self, present: Run, folder: str | None, prompt: str) -> Final:
        """On the evaluator; only digests and the sample come back."""
        snapshots = self._puller.pull(self._nodes[EVALUATOR], EVALUATOR, present.wants)
        parameters, digest, written = get(self._islands[EVALUATOR].finish(present.task, snapshots, folder, prompt))
        digests = get([shard.outer_digests.remote() for shard in self._shards])
        return Final(
            parameters=parameters,
            weights_sha256=digest,
            outer_digests={k: v for part in digests for k, v in part.items()},
            written=written,
        )

    def close(self) -> None:
        """Ends the actors; a Ray that was started or connected to here ends with them."""
        self._pending.clear()
        for handle in self._islands.values():
            handle.kill()
        for shard in self._shards:
            ray.kill(shard)
        if self._shut_down:
            disconnect()

    # --- inside ---

    def _run(self, command: Run) -> None:
        task = command.task
        if command.take_up:
            self._saver.take_up(task.source, self._islands[task.island])
        shards = {self._modules.shards[task.modules[slot]] for slot in task.send}
        # Made in the order in which they are taken.
        turns = sorted(shards, key=lambda shard: (task.island - 1 - shard) % len(self._shards))
        groups = {n: [s for s in task.send if self._modules.shards[task.modules[s]] == n] for n in turns}
        # A new evaluator has nothing to update; where it takes full values anyway, these are the same objects.
        all_of_it = dict.fromkeys(task.modules.values()) if task.island == EVALUATOR else {}
        spare = self._puller.pull(self._nodes[task.island], task.island, all_of_it)
        snapshots = self._puller.pull(self._nodes[task.island], task.island, command.wants)
        self._submit(task, snapshots, groups, command.ahead, spare)

    def _submit(
        self, task: Task, snapshots: list[Ref], groups: dict[int, list[SlotName]], ahead: bool, spare: list[Ref]
    ) -> None:
        island = self._islands[task.island]
        answers, contributions = island.run(task, snapshots, list(groups.values()), ahead)
        if groups:
            sent = self._sent[task.turn] = list(zip(groups, contributions, strict=True))
            offer = partial(self._pusher.offer, self._parts(sent), self._nodes[task.island])
            self._pending.watch(contributions[0], offer)  # the links need not wait for the report

        def done(found: list[Any], error: RayError | None) -> None:
            if error is not None and not island.broken(error):
                raise mistake(error, answers) from None
            if task.island == EVALUATOR and error is not None:
                if self._islands[EVALUATOR] is island:
                    self._revive(EVALUATOR).setup(self._modules)
                self._submit(task, spare, groups, ahead, spare)
            elif self._islands[task.island] is island:  # else it was replaced, and its work given out again
                now_s = self.now_s()
                if error is None:
                    self._revived.pop(task.island, None)
                if error is None and task.save:
                    self._saver.exported(task, island)
                lost = None if error is None else Lost(now_s=now_s, island=task.island, reason=short(error))
                self._events.append(lost or Finished(now_s=now_s, report=found[-1]))

        self._pending.add(answers, done, at_first_error=True)

    def _push(self, task: Task) -> None:
        def done(answers: list[Any], error: RayError | None) -> None:
            if error is not None and died(error):
                raise RuntimeError(f"a shard of the store is lost ({short(error)}); go on with resume=") from error
            if isinstance(error, ObjectLostError):  # with the node of the island
                self._events.append(Lost(now_s=self.now_s(), island=task.island, reason=short(error)))
            elif error is not None:
                raise cause(error) from None
            else:
                verdicts = tuple(verdict for answer in answers for verdict in answer)
                heard = Received(now_s=self.now_s(), turn=task.turn, verdicts=verdicts, attempt=task.attempt)
                self._events.append(heard)

        sent = self._sent.pop(task.turn)
        self._pusher.push(self._parts(sorted(sent, key=lambda part: part[0])), done)

    def _parts(self, sent: list[tuple[int, Ref]]) -> list[Part]:
        return [(self._shards[shard], self._shard_nodes[shard], ref) for shard, ref in sent]

    def _on_saved(self, path: str, seconds: float, error: str) -> None:
        self._events.append(Saved(now_s=self.now_s(), path=path, seconds=seconds, error=error))

    def _on_measured(self, answers: list[Any], error: RayError | None) -> None:
        raise_errors(answers, error)
        stats = tuple(found for answer in answers for found in answer)
        self._events.append(Committed(now_s=self.now_s(), stats=stats))

    def _revive(self, island: IslandId) -> RayIsland:
        """New actors in the place of those of an island of which one died."""
        self._revived[island] = self._revived.get(island, 0) + 1
        if self._revived[island] > MAX_FAILED_STARTS:
            raise RuntimeError(f"island {island} died {MAX_FAILED_STARTS} times without finishing a task")
        self._saver.forget(self._islands[island])
        self._islands[island].kill()  # what is left of it
        revived = self._islands[island] = RayIsland(self._job, island)
        return revived

    def _respawn(self, island: IslandId) -> None:
        revived = self._revive(island)

        def ready(answers: list[Any], error: RayError | None) -> None:
            if error is not None and not revived.broken(error):
                raise mistake(error, revived.built) from None
            if error is not None:
                return self._respawn(island)
            self._nodes[island] = answers[-1]
            source = SourceId(island)
            # Only now, since older checkpoints are dropped while it starts.
            own = bool(self._saver.newest) and not self._job.moving
            self._pending.add(revived.load(self._saver.newest, source) if own else [], loaded)

        def loaded(answers: list[Any], error: RayError | None) -> None:
            if error is not None or len(set(answers)) > 1:  # a worker died, or that checkpoint was dropped meanwhile
                return self._respawn(island)
            self._events.append(Joined(now_s=self.now_s(), island=island))

        self._pending.add([*revived.built, *reversed(revived.setup(self._modules))], ready, at_first_error=True)
