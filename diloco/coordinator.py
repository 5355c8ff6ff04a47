"""Coordinator: events in, commands out. A plain state machine without Ray, torch or a clock.

It decides that enough was heard, for all shards of the store at once: a contribution counts on all
shards or on none, a round is committed or it is not, and who contributed is on record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum

from diloco import records
from diloco.events import (
    Command,
    CommitAll,
    Committed,
    Event,
    Finished,
    Interrupted,
    Joined,
    Log,
    Lost,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Save,
    Saved,
    Started,
    Stop,
    Tick,
)
from diloco.messages import EVALUATOR, IslandId, ModuleKey, Report, SourceId, Task
from diloco.schedule import NoMore, Schedule, Wait
from diloco.views import Arrival, IslandView, ModuleView, RunView

STALL_S = 120.0  # without any event but ticks, before the coordinator says who is awaited
QUEUE_DEPTH = 2  # tasks given to an island at once, so that it never waits for the driver between two


class Drain(Enum):
    """How far an interruption has come."""

    no = "no"
    tasks = "tasks"  # no new work; what was given out is finished
    export = "export"  # islands copy what belongs to their sources
    save = "save"  # the checkpoint is written


class Coordinator:
    """Owns the `RunView` and updates it event by event; the schedule decides, this carries it out."""

    def __init__(self, *, schedule: Schedule, run: RunView) -> None:
        self.run = run
        self._schedule = schedule
        self._queued = 0  # tasks given out to living islands and not finished
        self._pushing: set[tuple[SourceId, int]] = set()  # handed to the store, not judged yet
        self._asked = 0  # evaluations and measurements that were not answered yet
        self._saving = False
        self._saving_round = 0  # rounds in the checkpoint being written
        self._held = False  # a checkpoint is due while the last one is still being written
        self._draining = Drain.no
        self._stopped = False
        self._now_s = 0.0
        self._heard_s, self._patience_s = 0.0, STALL_S

    def handle(self, event: Event) -> list[Command]:
        """What to do now. Commands are to be carried out in their order, before the next event is handled."""
        if self._stopped:
            return []
        self._now_s = event.now_s
        if not isinstance(event, Tick):
            self._heard_s, self._patience_s = event.now_s, STALL_S
        match event:
            case Started():
                commands = self._on_started(event)
            case Finished():
                commands = self._on_finished(event)
            case Received():
                commands = self._on_received(event)
            case Committed():
                self._asked -= 1
                commands = [records.committed(event, self.run.counters)] if event.stats else []
            case Saved():
                commands = self._on_saved(event)
            case Lost():
                commands = self._on_lost(event)
            case Joined():
                commands = self._on_joined(event)
            case Interrupted():
                if self._draining is Drain.no:
                    self._draining = Drain.tasks
                commands = []
            case Tick():
                commands = self._on_tick(event)
        return commands + self._settle()

    # --- events ---

    def _on_started(self, event: Started) -> list[Command]:
        commands: list[Command] = []
        if self.run.eval_due(self.run.round) and self.run.counters.evaluated_round < self.run.round:
            commands.append(self._evaluation())
        return commands + self._dispatch(self.run.islands)

    def _on_finished(self, event: Finished) -> list[Command]:
        report, task = event.report, event.report.task
        if task.island == EVALUATOR:
            return [self._evaluated(report)]
        island = self.run.islands[task.island]
        source = self.run.sources[task.source]
        if not island.alive or island.queued == 0:
            return []  # fenced: it was given up for lost, and its work was given out again
        self._queue(island, -1)
        source.trained(report)
        self.run.counters.count(report, lone=len(self.run.islands) == 1)
        commands: list[Command] = [] if task.steps == 0 else [records.segment(report)]
        if "inner/fresh_state" in report.metrics:
            commands.append(records.fresh_state(task, self.run.round))
        if task.send:
            self._pushing.add((task.source, task.round))
            commands.append(Push(task=task))
        elif task.last:
            keys = [key for key in task.modules.values() if self.run.modules[key].round == task.round]
            for key in keys:
                self._heard(key, source.source).dropped += 1
            commands += self._commit_ready(keys)
        return commands + self._dispatch([task.island])

    def _on_received(self, event: Received) -> list[Command]:
        self._pushing.discard((event.source, event.round))
        keys = [verdict.module for verdict in event.verdicts]
        source = self.run.sources.get(event.source)
        modules = [self.run.modules[key] for key in keys]
        awaited = all(m.round == event.round and event.source in m.awaited for m in modules)
        if source is None or source.attempt != event.attempt or not awaited:
            self.run.counters.late += 1
            return [records.late(event, self.run.round)]
        tokens = source.hand_over(event.round)
        bad = [verdict for verdict in event.verdicts if not verdict.good]
        commands: list[Command] = []
        source.settled = [*source.settled, (event.round, not bad)]
        examples, norm = float(self.run.shard_examples[source.shard]), math.hypot(*[v.norm for v in event.verdicts])
        arrival = Arrival(examples=examples, tokens=tokens, norm=norm)
        for module in modules:
            module.awaited.discard(source.source)
            if bad:
                module.rejected += 1
            else:
                module.arrivals[source.source] = arrival
        if bad:
            self.run.counters.rejected += 1
            commands.append(records.rejected(event, bad[0], self.run.round))
        return commands + self._commit_ready(keys)

    def _on_saved(self, event: Saved) -> list[Command]:
        self._saving = False
        commands: list[Command] = [records.saved(event, self._saving_round)]
        if self._held:
            self._held = False
            save = self._save()
            commands += [*self._dispatch(self.run.islands), save]
        elif self._draining is Drain.save:
            self._stopped = True
            reason = f"could not write a checkpoint: {event.error}" if event.error else ""
            commands.append(Stop(status="interrupted", reason=reason))
        return commands

    def _on_lost(self, event: Lost) -> list[Command]:
        island = self.run.islands[event.island]
        if not island.alive:
            return []
        self.run.counters.islands_lost += 1
        self._queue(island, -island.queued)
        island.alive = False
        source = self.run.sources[island.source]
        self._pushing -= {(source.source, work.round) for work in source.work}
        source.lose()
        keys = list(self.run.path_of(source).values())
        for key in keys:
            self._heard(key, source.source)
        return [records.lost(event, self.run.round), Respawn(island=event.island), *self._go_on(keys, [])]

    def _on_joined(self, event: Joined) -> list[Command]:
        self.run.counters.islands_joined += 1
        island = self.run.islands[event.island]
        island.alive = True
        source = self.run.sources[island.source]
        keys = list(self.run.path_of(source).values())
        source.round = 1 + max(self.run.modules[key].round for key in keys)
        return [records.joined(event, self.run.round), *self._go_on(keys, [event.island])]

    def _go_on(self, keys: list[ModuleKey], came: list[IslandId]) -> list[Command]:
        """After somebody left or came: end the rounds that others finished; begin anew those that nobody is left in."""
        idle = [key for key in keys if not self.run.modules[key].awaited]
        self.run.open_rounds([key for key in idle if not self.run.modules[key].heard])
        commands = self._commit_ready([key for key in idle if self.run.modules[key].heard])
        return commands + self._dispatch(self.run.islands if idle else came)

    def _on_tick(self, event: Tick) -> list[Command]:
        """A barrier that stalls says who has not arrived."""
        if event.now_s - self._heard_s < self._patience_s:
            return []
        self._patience_s *= 2
        awaited = sorted({source for module in self.run.modules.values() for source in module.awaited})
        return [records.stalled(event.now_s - self._heard_s, awaited, self.run.round)]

    # --- rounds ---

    def _commit_ready(self, touched: list[ModuleKey]) -> list[Command]:
        commits = self._schedule.commits(self.run, touched, self._now_s)
        for commit in commits:
            module = self.run.modules[commit.module]
            if not commit.sources and module.rejected:
                self._stopped = True
                reason = f"all {module.rejected} contributions to round {module.round} were rejected"
                return [Stop(status="stopped", reason=f"{reason}; the weights of the round before are kept")]
        self.run.commit(commits)
        real = tuple(commit for commit in commits if commit.sources)
        outer = [CommitAll(commits=real)] if real else []
        measure = [Measure()] if real else []
        self._asked += len(measure)
        if not commits or min(module.round for module in self.run.modules.values()) <= self.run.round:
            return [*outer, *measure]
        self.run.round += 1
        due = self.run.save_due(self.run.round)
        self._held = due and self._saving  # until the earlier checkpoint is written, so that memory stays bounded
        save = [self._save()] if due and not self._held else []  # keeps what is known before work is given out
        evaluation = [self._evaluation()] if self.run.eval_due(self.run.round) else []
        return [*outer, *self._dispatch(self.run.islands), *evaluation, *measure, *save]

    def _heard(self, key: ModuleKey, source: SourceId) -> ModuleView:
        """Do not await `source` for the module's present round any more."""
        module = self.run.modules[key]
        module.awaited.discard(source)
        return module

    # --- tasks ---

    def _dispatch(self, islands: Iterable[IslandId]) -> list[Command]:
        commands: list[Command] = []
        if self._held or self._draining is not Drain.no:
            return commands
        for island in islands:
            view = self.run.islands[island]
            while view.alive and view.queued < QUEUE_DEPTH:
                task = self._schedule.next_task(view, self.run, self._now_s)
                if isinstance(task, Wait | NoMore):
                    break
                commands.append(self._give(task, view))
        return commands

    def _give(self, task: Task, island: IslandView) -> Run:
        self._queue(island, 1)
        self.run.sources[task.source].give(task)
        return Run(task=task, wants={task.modules[slot]: None for slot in task.install})

    def _queue(self, island: IslandView, change: int) -> None:
        island.queued += change
        self._queued += change

    def _evaluation(self) -> Run:
        self._asked += 1
        task = self.run.bare_task(EVALUATOR, next(iter(self.run.sources.values())))
        versions = {slot: self.run.modules[key].version for slot, key in task.modules.items()}
        task = replace(task, install=versions, evaluate="validation")
        return Run(task=task, wants={key: None for key in task.modules.values()})

    def _save(self) -> Save:
        self._saving, self._saving_round = True, self.run.round
        return Save(name=self.run.checkpoint_name(), view=self.run.to_json())

    def _settle(self) -> list[Command]:
        """The end of the run, or the next step of an interruption, once nothing is under way any more."""
        if self._stopped or self._saving or self._held or self._asked or self._pushing or self._queued:
            return []
        if self.run.round >= self.run.rounds:
            self._stopped = True
            return [Stop(status="finished")]
        if self._draining is Drain.tasks:
            self._draining = Drain.export
            alive = [island for island in self.run.islands.values() if island.alive]
            tasks = [self.run.bare_task(island.island, self.run.sources[island.source]) for island in alive]
            for island in alive:
                self._queue(island, 1)
            return [Run(task=replace(task, save=True), wants={}) for task in tasks]
        if self._draining is Drain.export:
            self._draining = Drain.save
            return [self._save()]
        return []

    def _evaluated(self, report: Report) -> Log:
        self._asked -= 1
        self.run.counters.count_evaluation(report.task.round, report.metrics["eval/loss"])
        return records.evaluated(report)
