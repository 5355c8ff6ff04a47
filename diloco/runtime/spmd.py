"""Runtime `spmd`: the same training without Ray, by processes that a launcher such as torchrun starts, or this one.

All processes carry out the same orders in the same order, so that only schedules where all islands wait for each other
can run. Rank 0 drives: it has the coordinator, gives orders over plain connections, and works like the others.
Contributions and snapshots go from island to island; rank 0 sees reports and verdicts only.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diloco.events import (
    CommitAll,
    Committed,
    Event,
    Finished,
    FoldAll,
    Interrupted,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
)
from diloco.island import Island
from diloco.messages import EVALUATOR, IslandId, ModuleKey, Modules, Report, Shape, SourceId, Written
from diloco.runtime.base import LOADED, Abandoned, Backend, Final, Job, Runtime
from diloco.runtime.spmd_hub import Hub
from diloco.runtime.spmd_member import Member
from diloco.runtime.spmd_orders import Adopt, Answer, Build, Command, Fill, Finish, Go, Hello, Load, Order, SetUp, Write
from diloco.runtime.spmd_save import Saving
from diloco.runtime.spmd_serve import serve, serve_spawned
from diloco.runtime.spmd_start import Place, Roster, call, launched, receive, spawn
from diloco.schedule import Barrier, Schedule


@dataclass(kw_only=True)
class Spmd(Runtime):
    """One process a worker, started by torchrun or the like, else by this one on this machine."""

    waits_for_all = True

    timeout_s: float = 1800.0  # of one exchange between islands; training, evaluation and saving may take longer

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"runtime.timeout_s={self.timeout_s} must be positive")

    def suited(self, schedule: Schedule) -> Schedule:
        """Only a barrier: all processes wait for each other."""
        if type(schedule) is not Barrier:
            raise ValueError(
                f"schedule={type(schedule).__name__} does not run on runtime=spmd, whose processes wait for each other;"
                " use schedule=barrier, or runtime=ray_cluster or local"
            )
        return schedule

    def follow(self, workers: tuple[int, ...]) -> Mapping[str, Any] | None:
        """As any rank but 0 of a launcher's processes."""
        place = launched(sum(workers))
        if place is None or place.rank == 0:
            return None
        try:
            meeting, connection = call(place)
        except (dist.DistError, OSError, EOFError) as error:
            raise Abandoned(f"rank 0 is gone, or was never there ({str(error).splitlines()[0]})") from error
        return serve(connection, meeting, place)

    def open(self, job: Job) -> Backend:
        """Checks what a launcher started, and that there are GPUs enough for what is spawned here."""
        place = launched(sum(job.workers))
        if job.gpus_per_worker > 0:
            needed = job.gpus_per_worker * sum(job.workers) if place is None else job.gpus_per_worker
            if torch.cuda.device_count() < needed:
                raise ValueError(
                    f"gpus_per_worker={job.gpus_per_worker:g} needs {needed:g} GPU(s) on this machine, which has"
                    f" {torch.cuda.device_count()}; use fewer workers, or torchrun on more machines"
                )
        if job.workers[0] > 1 and dist.is_initialized():
            raise ValueError(
                f"workers={job.workers[0]} needs torch's default process group, which this process has already;"
                " destroy it before, or use one worker an island"
            )
        return SpmdBackend(job, place, self.timeout_s)


class SpmdBackend(Backend):
    """Rank 0: collects what the coordinator asks for, has all processes do it at once, and tells what came of it."""

    def __init__(self, job: Job, place: Place | None, timeout_s: float) -> None:
        self._job, self._place, self._timeout_s = job, place, timeout_s
        self._start_s = time.monotonic()
        self._hub: Hub | None = None
        self._member: Member | None = None
        self._commands: list[Command] = []  # not carried out yet
        self._queued = Counter[IslandId]()  # tasks that were asked for and not reported
        self._events: deque[Event] = deque()
        self._exported: dict[SourceId, int] = {}  # for the next checkpoint: of which round
        self._saving: Saving | None = None
        self._interrupted = False
        self._concluded = False

    # --- start ---

    def shapes(self) -> dict[str, Shape]:
        """Starts the others, or waits for them."""
        roster = Roster(self._job.workers)
        party = receive(self._place) if self._place else spawn(roster.size, serve_spawned)
        self._hub = Hub(party, roster)
        hello = Hello(job=self._job, timeout_s=self._timeout_s)
        self._hub.tell(hello)
        self._member = Member(hello, party.meeting, self._place or Place())
        self._evaluator: Island = self._member.make_evaluator()
        self._hub.answers()
        self._together(Build())
        return self._evaluator.shapes()

    def setup(self, modules: Modules) -> None:
        """Tells all."""
        self._modules = modules
        self._together(SetUp(modules))

    def fill(self, init_from: str) -> Mapping[IslandId, list[ModuleKey]]:
        """From the evaluator's fresh model."""
        assert self._member is not None
        self._member.make_initial(init_from)
        digests = {key: digest for answer in self._together(Fill()) for key, digest in answer.filled.items()}
        answers = self._together(Adopt(digests))
        return {island: held for answer in answers for island, held in answer.held.items()}

    def load(self, checkpoint: str, sources: Mapping[SourceId, int], now_s: float) -> None:
        """Each reads its own files."""
        self._start_s -= now_s
        for answer in self._together(Load(checkpoint=checkpoint, sources=sources)):
            self._exported |= dict.fromkeys(answer.loaded, LOADED)

    # --- commands ---

    def carry_out(self, command: Run | Push | FoldAll | CommitAll | Measure | Respawn) -> None:
        """Kept until the next event is asked for."""
        assert not isinstance(command, Respawn | FoldAll), "no island is ever lost alone, and all contribute at once"
        if isinstance(command, Run):
            self._queued[command.task.island] += 1
        self._commands.append(command)

    def save(self, root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """Each process writes its share in another thread."""
        assert self._saving is None
        self._saving = Saving(root, name, manifest, keep=keep, shares=sum(self._job.workers))
        exported, self._exported = self._exported, {}
        if self._saving.begin():
            self._commands.append(Write(folder=self._saving.folder, sources=exported))
        else:
            self._events.append(self._saving.end(self.now_s()))
            self._saving = None

    # --- events ---

    def next_event(self, wake_s: Callable[[], float | None]) -> Event:
        """What came of the last orders; gives the next ones once all of that was told."""
        while True:
            if self._interrupted:
                self._interrupted = False
                return Interrupted(now_s=self.now_s())
            if self._events:
                event = self._events.popleft()
                if isinstance(event, Finished) and event.report.task.save:
                    self._exported[event.report.task.source] = event.report.task.round
                return event
            self._go()

    def now_s(self) -> float:
        """Seconds since the backend was made."""
        return time.monotonic() - self._start_s

    def interrupt(self) -> None:
        """Seen after the present segment."""
        self._interrupted = True

    # --- end ---

    def finish(self, present: Run, folder: str | None, prompt: str) -> Final:
        """On the evaluator."""
        answers = self._together(Finish(wants=present.wants))
        self._evaluator.install(answers[0].values, present.task.install)
        if folder is not None:
            self._evaluator.write_model(Path(folder))
        return Final(
            parameters=self._evaluator.num_parameters(),
            weights_sha256=self._evaluator.weights_sha256(),
            outer_digests={name: digest for answer in answers for name, digest in answer.digests.items()},
            written=self._evaluator.written(prompt) if folder is not None else Written(),
        )

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """They end by themselves."""
        assert self._hub is not None
        self._hub.end(summary)
        self._concluded = True

    def close(self) -> None:
        """Ends the others."""
        if self._hub is not None:
            if not self._concluded:
                self._hub.end(None)
            self._hub.close(at_once=not self._concluded)
        if self._member is not None:
            self._member.close()

    # --- inside ---

    def _together(self, order: Order) -> list[Answer]:
        """Have all processes do the same; their answers by rank."""
        assert self._hub is not None and self._member is not None
        self._hub.tell(order)
        try:
            own = self._member.carry_out(order)
        except Exception:
            self._hub.blame()  # what broke here may have broken elsewhere first
            raise
        return [own, *self._hub.answers()]

    def _go(self) -> None:
        commands, self._commands = tuple(self._commands), []
        idle = not commands and not self._queued.total()
        assert not idle or self._saving, "the run waits for something that will never happen"
        answers = self._together(Go(commands=commands, write=idle))
        now_s = self.now_s()
        for number, command in enumerate(commands):
            match command:
                case Push():
                    found = [v for answer in answers for judged, v in answer.verdicts if judged == number]
                    order = {command.task.modules[slot]: place for place, slot in enumerate(command.task.send)}
                    verdicts = tuple(sorted(found, key=lambda verdict: order[verdict.module]))
                    turn, attempt = command.task.turn, command.task.attempt
                    self._events.append(Received(now_s=now_s, turn=turn, verdicts=verdicts, attempt=attempt))
                case Measure():
                    stats = tuple(found for answer in answers for found in answer.stats)
                    self._events.append(Committed(now_s=now_s, stats=stats))
        reports: list[Report] = [report for answer in answers for report in answer.reports]
        for report in sorted(reports, key=lambda report: (report.task.island == EVALUATOR, report.task.island)):
            self._queued[report.task.island] -= 1
            self._events.append(Finished(now_s=now_s, report=report))
        for files, error in [written for answer in answers for written in answer.written]:
            assert self._saving is not None
            if self._saving.add(files, error):
                self._events.append(self._saving.end(self.now_s()))
                self._saving = None
