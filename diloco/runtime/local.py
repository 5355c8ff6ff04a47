"""Runtime `local`: everything in one process under a virtual clock; deterministic, also when islands are unequal."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diloco import checkpoint as ckpt
from diloco.events import (
    CommitAll,
    Committed,
    Event,
    Finished,
    FoldAll,
    Interrupted,
    Joined,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Saved,
    Tick,
)
from diloco.island import Island
from diloco.messages import (
    EVALUATOR,
    Contribution,
    IslandId,
    ModuleKey,
    Modules,
    Shape,
    Snapshot,
    SourceId,
    State,
    Task,
    Turn,
    Written,
)
from diloco.runtime.base import LOADED, Backend, Final, Job, Runtime, one_each, placed
from diloco.starting import StartingValues
from diloco.workers import World


@dataclass(kw_only=True)
class Local(Runtime):
    """One process. Islands take turns in the order of a virtual clock; each does the joint batch of its workers."""

    seconds_per_step: list[float] = field(default_factory=list)  # virtual, one number an island; empty = 1 for all
    latency_s: float = 0.0  # virtual, of a message between the driver and an island or a shard of the store, one way
    mbits_per_s: list[float] = field(default_factory=list)  # virtual, of each island's link, each way; empty = no limit

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"runtime.latency_s={self.latency_s} must not be negative")
        if any(not seconds > 0 for seconds in self.seconds_per_step):
            raise ValueError(f"runtime.seconds_per_step={self.seconds_per_step} must hold positive numbers")
        if any(not rate > 0 for rate in self.mbits_per_s):
            raise ValueError(f"runtime.mbits_per_s={self.mbits_per_s} must hold positive numbers; inf = no limit")

    def open(self, job: Job) -> Backend:
        """Checks that there is a speed and a link for each island."""
        one_each("runtime.seconds_per_step", self.seconds_per_step, job.islands)
        one_each("runtime.mbits_per_s", self.mbits_per_s, job.islands)
        if job.gpus_per_worker > 0 and not torch.cuda.is_available():
            raise ValueError(f"gpus_per_worker={job.gpus_per_worker:g}: there is no CUDA device here; use 0")
        return LocalBackend(job, self)


@dataclass(kw_only=True)
class Link:
    """One way of an island's connection, virtual: one message after the other."""

    bytes_per_s: float
    free_s: float = 0.0  # when the last message is through

    def through_s(self, begin_s: float, size_bytes: int) -> float:
        """When a message that is there at `begin_s` has been sent; an empty one waits for nothing."""
        if size_bytes == 0:
            return begin_s
        self.free_s = max(begin_s, self.free_s) + size_bytes / self.bytes_per_s
        return self.free_s


class LocalBackend(Backend):
    """Islands and shards as plain objects; a heap of what happens when."""

    def __init__(self, job: Job, settings: Local) -> None:
        self._job, self._latency_s = job, settings.latency_s
        islands = [*map(IslandId, range(job.islands)), EVALUATOR]
        seconds = settings.seconds_per_step or [1.0] * job.islands
        most = settings.mbits_per_s or [math.inf] * job.islands
        self._seconds_per_step = dict(zip(islands, [*seconds, 0.0], strict=True))
        rates = dict(zip(islands, [*most, math.inf], strict=True))
        self._up = {island: Link(bytes_per_s=rate * 1e6 / 8) for island, rate in rates.items()}
        self._down = {island: Link(bytes_per_s=rate * 1e6 / 8) for island, rate in rates.items()}
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(job.threads_per_worker)
        self._islands: dict[IslandId, Island] = {}
        self._frozen: dict[tuple[SourceId, int], State] = {}  # by source and round
        self._keeping: dict[tuple[Turn, int], State] = {}  # where sources move: by turn and segment
        self._exported: dict[SourceId, int] = {}  # for the next checkpoint: of which round
        self._kept: dict[SourceId, State] = {}  # where sources move: of each, when its last task ended
        self._sent: dict[Turn, list[Contribution]] = {}
        self._free_at_s: dict[IslandId, float] = {}  # when an island is done with what it was given
        self._begun: set[IslandId] = set()  # that had a task
        self._clock_s = 0.0
        self._events: list[tuple[float, int, Event | Callable[[], Event]]] = []
        self._count = itertools.count()
        self._interrupted = False

    def shapes(self) -> dict[str, Shape]:
        """Makes the evaluator."""
        self._corpus = self._job.corpus()
        self._islands[EVALUATOR] = self._make_island()
        return self._islands[EVALUATOR].shapes()

    def setup(self, modules: Modules) -> None:
        """Makes islands and shards."""
        self._modules, steps_a_round = modules, self._job.steps_a_round(modules)
        self._islands |= {IslandId(index): self._make_island() for index in range(self._job.islands)}
        for island in self._islands.values():
            island.setup(modules)
        self._shards = [self._job.make_store() for _ in range(self._job.shards)]
        for shard in self._shards:
            shard.setup(steps_a_round)

    def fill(self, init_from: str) -> Mapping[IslandId, list[ModuleKey]]:
        """From the evaluator's fresh model."""
        starting = StartingValues(init_from, self._modules) if init_from else None
        digests: dict[ModuleKey, str] = {}
        for index, shard in enumerate(self._shards):
            keys = placed(self._modules, index)
            digests |= shard.fill(self._islands[EVALUATOR].initial(keys, starting.of(keys) if starting else None))
        return {number: island.adopt(digests) for number, island in self._islands.items()}

    def load(self, checkpoint: str, sources: Mapping[SourceId, int], now_s: float) -> None:
        """Reads every file at once."""
        self._clock_s = now_s
        for index, shard in enumerate(self._shards):
            shard.load_state(ckpt.read_modules(checkpoint, placed(self._modules, index)))
        for source, island in sources.items():
            state = ckpt.read_source(checkpoint, source)
            if state is not None and self._job.moving:
                self._kept[source] = state
            elif state is not None:
                self._islands[IslandId(island)].load(source, state)
                self._frozen[source, LOADED] = state  # it may have no more to do before the next checkpoint
                self._exported[source] = LOADED

    def carry_out(self, command: Run | Push | FoldAll | CommitAll | Measure | Respawn) -> None:
        """Does it now; what it leads to happens when the virtual clock says."""
        match command:
            case Run():
                if command.take_up:
                    self._islands[command.task.island].load(command.task.source, self._kept[command.task.source])
                self._run(command.task, command.wants)
            case Push():
                self._push(command.task)
            case FoldAll():
                for fold in command.folds:
                    self._shards[self._modules.shards[fold.module]].fold(fold)
            case CommitAll():
                for commit in command.commits:
                    self._shards[self._modules.shards[commit.module]].commit(commit)
            case Measure():
                stats = [found for shard in self._shards for found in shard.measure()]
                self._later(self._latency_s * 2, lambda: Committed(now_s=self._clock_s, stats=tuple(stats)))
            case Respawn():
                self._islands[command.island] = self._make_island()
                self._islands[command.island].setup(self._modules)
                self._later(0.0, Joined(now_s=self._clock_s, island=command.island))

    def save(self, root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """Writes at once."""
        start_s = time.perf_counter()
        folder = ckpt.CheckpointFolder(root)
        files: dict[str, str] = {}
        exported = {source: self._frozen.pop((source, round_)) for source, round_ in self._exported.items()}
        exported |= self._kept
        self._exported.clear()
        error, path = "", f"{root}/{name}"
        try:
            folder.begin(name)
            for shard in self._shards:
                files |= ckpt.write_modules(folder.temporary(name), shard.state())
            for source, state in exported.items():
                files |= ckpt.write_source(folder.temporary(name), source, state)
        except OSError as problem:
            error = str(problem)

        def complete() -> Event:
            problem = folder.conclude(name, manifest, files, keep=keep, error=error)
            seconds = time.perf_counter() - start_s
            return Saved(now_s=self._clock_s, path=path, seconds=seconds, error=problem)

        self._later(0.0, complete)

    def next_event(self, wake_s: Callable[[], float | None]) -> Event:
        """The earliest event; moves the clock to it."""
        if self._interrupted:
            self._interrupted = False
            return Interrupted(now_s=self._clock_s)
        wake = wake_s()
        if wake is not None and (not self._events or wake < self._events[0][0]):
            self._clock_s = max(self._clock_s, wake)
            return Tick(now_s=self._clock_s)
        assert self._events, "the run waits for something that will never happen"
        self._clock_s, _, event = heapq.heappop(self._events)
        if isinstance(event, Finished) and event.report.task.save:
            self._may_be_written(event.report.task)
        return event() if callable(event) else event

    def now_s(self) -> float:
        """Virtual seconds."""
        return self._clock_s

    def interrupt(self) -> None:
        """Takes effect before the next event."""
        self._interrupted = True

    def finish(self, present: Run, folder: str | None, prompt: str) -> Final:
        """On the evaluator."""
        evaluator = self._islands[EVALUATOR]
        evaluator.install(self._pull(present.wants), present.task.install)
        if folder is not None:
            evaluator.write_model(Path(folder))
        digests = {name: digest for shard in self._shards for name, digest in shard.outer_digests().items()}
        return Final(
            parameters=evaluator.num_parameters(),
            weights_sha256=evaluator.weights_sha256(),
            outer_digests=digests,
            written=evaluator.written(prompt) if folder is not None else Written(),
        )

    def close(self) -> None:
        """Gives torch its threads back."""
        torch.set_num_threads(self._threads_before)

    def _make_island(self) -> Island:
        device = torch.device("cuda" if self._job.gpus_per_worker > 0 else "cpu")
        return self._job.make_island(self._corpus, World(device=device))

    def _run(self, task: Task, wants: Mapping[ModuleKey, int | None]) -> None:
        snapshots = self._pull(wants)
        with torch.random.fork_rng():  # an island seeds the generator, which here is the user's own
            report, contributions = self._islands[task.island].run(task, snapshots)
        if task.send:
            self._sent[task.turn] = contributions
        if task.save:
            state = self._islands[task.island].export(task.source, sheds=task.sheds)
            if self._job.moving:
                self._keeping[task.turn, task.segment] = state
            else:
                self._frozen[task.source, task.round] = state
        speed = self._seconds_per_step[task.island]
        free_s = self._free_at_s.get(task.island, 0.0)
        there_s = self._down[task.island].through_s(self._clock_s, report.bytes_down) + self._latency_s
        start_s = max(there_s, free_s)
        self._free_at_s[task.island] = start_s + speed * task.steps
        heard_s = self._free_at_s[task.island] + self._latency_s
        # Waiting is virtual too: islands that take turns in one process always wait for each other.
        waiting_s = start_s - free_s if task.island in self._begun else 0.0
        report = replace(report, waiting_s=waiting_s, clock_s=speed * task.steps)
        self._begun.add(task.island)
        self._later(heard_s - self._clock_s, Finished(now_s=heard_s, report=report))

    def _pull(self, wants: Mapping[ModuleKey, int | None]) -> list[Snapshot]:
        snapshots = []
        for index, shard in enumerate(self._shards):
            snapshots += shard.pull({key: have for key, have in wants.items() if self._modules.shards[key] == index})
        return snapshots

    def _may_be_written(self, task: Task) -> None:
        """What a task saved is for the checkpoints after its end, in the place of what there was of its source."""
        if self._job.moving:
            self._kept[task.source] = self._keeping.pop((task.turn, task.segment))
            return
        if self._exported.get(task.source, task.round) != task.round:
            del self._frozen[task.source, self._exported[task.source]]
        self._exported[task.source] = task.round

    def _push(self, task: Task) -> None:
        sent = self._sent.pop(task.turn)
        verdicts = tuple(self._shards[self._modules.shards[c.module]].push(c) for c in sent)
        sent_s = self._up[task.island].through_s(self._clock_s, sum(c.payload.nbytes for c in sent))
        heard_s = sent_s + 2 * self._latency_s
        event = Received(now_s=heard_s, turn=task.turn, verdicts=verdicts, attempt=task.attempt)
        self._later(heard_s - self._clock_s, event)

    def _later(self, delay_s: float, event: Event | Callable[[], Event]) -> None:
        heapq.heappush(self._events, (self._clock_s + delay_s, next(self._count), event))
