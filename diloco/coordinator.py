"""Coordinator: events in, commands out. A plain state machine without Ray, torch or a clock.

It decides that enough was heard, for all shards of the store at once: a contribution counts on all
shards or on none, a round is committed or it is not, and who contributed is on record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from diloco import folding, hearing, membership, records, saved_view, tasks
from diloco.evaluations import Evaluations
from diloco.events import (
    Command,
    CommitAll,
    Committed,
    Event,
    Finished,
    Interrupted,
    Joined,
    Leaving,
    Log,
    Lost,
    Measure,
    Noticed,
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
from diloco.messages import EVALUATOR, Commit, IslandId, ModuleKey, Task
from diloco.progress import IslandView
from diloco.pushes import Pushes
from diloco.saves import Drain, Saves
from diloco.schedule import NoMore, Schedule, Wait
from diloco.seats import Bench, begin_anew, hand_over, note
from diloco.views import RunView
from diloco.waiting import Waiting
from diloco.watch import Watch

QUEUE_DEPTH = 2  # tasks given to an island at once, so that it never waits for the driver between two


class Coordinator:
    """Owns the `RunView` and updates it event by event; the schedule decides, this carries it out."""

    def __init__(self, *, schedule: Schedule, run: RunView) -> None:
        self.run = run
        self._schedule = schedule
        self._queued = 0  # tasks given out to living islands and not finished
        self._waiting: Waiting[IslandId] = Waiting()
        self._bench = Bench(run, schedule) if run.moving else None
        self._pushes = Pushes()
        self._evaluations = Evaluations()
        self._asked = 0  # measurements that were not answered yet
        self._saves = Saves()
        self._watch = Watch()
        self._draining = Drain.no
        self._stopped = False
        self._now_s = 0.0

    def handle(self, event: Event) -> list[Command]:
        """What to do now. Commands are to be carried out in their order, before the next event is handled."""
        if self._stopped:
            return []
        self._now_s = event.now_s
        look = self._watch.look(event) and not isinstance(event, Started)  # resumed: work is given out first, as before
        late = self._go_on_without_late() if look else []
        match event:
            case Started():
                commands = self._on_started(event)
            case Finished():
                commands = self._on_finished(event)
            case Received():
                commands = self._on_received(event)
            case Committed():
                self._asked -= 1
                commands = [*records.committed(event, self.run), *self._watch.parted(event, self.run)]
            case Saved():
                commands = self._on_saved(event)
            case Lost():
                commands = self._on_lost(event)
            case Joined():
                commands = self._on_joined(event)
            case Leaving():
                commands = [*membership.leave(event, self.run)]
            case Noticed():
                commands = [Log(record={"round": self.run.round, **event.record})]
            case Interrupted():
                self._saves.pausing = self._saves.pausing and self.run.round == self.run.rounds
                if self._draining is Drain.no:
                    self._draining = Drain.tasks
                commands = []
            case Tick():
                commands = [*self._dispatch(self.run.ready(event.now_s)), *self._watch.stalled(event.now_s, self.run)]
        left = [self._on_lost(records.left(i, event.now_s)) for i in membership.departed(self.run, self._pushes)]
        return late + commands + [command for each in left for command in each] + self._settle()

    def wake_s(self) -> float | None:
        """When to be told the time if nothing happens before."""
        if self._stopped or self._draining is not Drain.no:
            return None
        ready_s = [ready_s for ready_s in self.run.gathered.values() if self._now_s < ready_s < math.inf]
        overdue_s = None if membership.too_few(self.run) else self._schedule.overdue_s(self.run)
        return min([*ready_s, *([] if overdue_s is None else [overdue_s])], default=None)

    def _on_started(self, event: Started) -> list[Command]:
        for island in event.absent:
            membership.lose(self.run.islands[island], self.run, self._bench, self._pushes)
        self.run.started(event.now_s)
        due = self.run.eval_due(self.run.round) and self.run.counters.evaluated_round < self.run.round
        evaluation = self._evaluations.begin(self.run) if due else []
        ended = self._commit_ready(self.run.heard()) if event.absent else []
        return [*evaluation, *ended, *self._dispatch(self.run.islands)]

    def _on_finished(self, event: Finished) -> list[Command]:
        report, task = event.report, event.report.task
        if task.island == EVALUATOR:
            return self._evaluations.heard(report, self.run)
        island = self.run.islands[task.island]
        if not island.alive or island.queued == 0:
            return []  # fenced: it was given up for lost, and its work was given out again
        self._queue(island, -1)
        self.run.trained(report, event.now_s)
        waited = self._bench is not None and task.save and self._bench.saved(self.run.sources[task.source])
        commands: list[Command] = [] if task.steps == 0 else [records.segment(report)]
        if "inner/fresh_state" in report.metrics:
            commands.append(records.fresh_state(task, self.run.round))
        if task.send:
            self._pushes.add(task.turn)
            commands.append(Push(task=task))
        elif task.ends:
            commands += self._commit_ready(self.run.drop(task))
        return commands + self._dispatch([task.island, *(self._waiting.all() if waited else [])])

    def _on_received(self, event: Received) -> list[Command]:
        return [command for heard in self._pushes.judged(event) for command in self._arrived(heard)]

    def _arrived(self, event: Received) -> list[Command]:
        source = self.run.sources.get(event.turn.source)
        if source is None or source.attempt != event.attempt or source.has_heard(event.turn):
            return [hearing.unheard(event, source, self.run)]  # its island was given up for lost, or it comes twice
        noted: list[Command] = [*hearing.heard(event, source, self.run, self._schedule)]
        ready = self._gathered(IslandId(source.source)) if self.run.pool else []
        keys = [verdict.module for verdict in event.verdicts]
        commands = self._commit_ready(keys)
        if self._bench and self.run.free and not commands:  # it was refused, and its source waits for no step
            self._bench.stepped(keys)
            ready = self._waiting.on(keys)
        return [*noted, *commands, *folding.due(keys, self.run, self._schedule), *self._dispatch(ready)]

    def _gathered(self, number: IslandId) -> list[IslandId]:
        """Which islands may go on, now that this one, which runs free, may have handed over all it was given."""
        island = self.run.islands[number]
        if not island.alive or not self.run.sources[island.source].idle:
            return []
        return self.run.gather(number, self._schedule.regroup_s(self.run, self._now_s), self._now_s)

    def _on_saved(self, event: Saved) -> list[Command]:
        commands: list[Command] = [records.saved(event, self._saves.round)]
        held = self._saves.written(self.run)
        if held is not None:
            commands += [held, *self._commit_ready(self.run.heard()), *self._dispatch(self.run.islands)]
        elif self._draining is Drain.save and self._saves.pausing:
            self._draining, self._saves.pausing = Drain.no, False
            commands += self._dispatch(self.run.islands)
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
        sources = membership.lose(island, self.run, self._bench, self._pushes)
        if self._bench or self.run.pool:
            again = self._dispatch(self.run.islands)
        else:
            again = self._go_on(list(self.run.path_of(sources[0]).values()), [])
        return [records.lost(event, self.run.round), Respawn(island=event.island), *again]

    def _on_joined(self, event: Joined) -> list[Command]:
        source = membership.join(event.island, self.run)
        if self._bench or self.run.pool:
            free = [event.island] if self._bench else self._gathered(event.island)
            held = self._commit_ready(self.run.heard())  # if there were too few islands
            return [records.joined(event, self.run.round), *held, *self._dispatch(free)]
        keys = list(self.run.path_of(source).values())
        source.round = source.began = 1 + max(self.run.modules[key].round for key in keys)
        return [records.joined(event, self.run.round), *self._go_on(keys, [event.island])]

    def _go_on(self, keys: list[ModuleKey], came: list[IslandId]) -> list[Command]:
        """After somebody left or came: end the rounds that others finished; begin anew those that nobody is left in."""
        idle = [key for key in keys if not self.run.modules[key].awaited]
        empty = [key for key in idle if not self.run.modules[key].heard]
        commands = self._commit_ready([key for key in idle if self.run.modules[key].heard])
        if empty == keys:
            commands += self._commit(begin_anew(self.run, keys))
            self.run.open_rounds(keys, self._now_s)
        return commands + self._dispatch(self.run.islands if idle else came)

    # --- rounds ---

    def _go_on_without_late(self) -> list[Command]:
        """Rounds that have waited long enough end without those that are not there."""
        wake_s = self.wake_s()
        if wake_s is None or wake_s > self._now_s:
            return []
        return self._commit_ready([key for key, m in self.run.modules.items() if m.awaited or m.arrivals])

    def _commit_ready(self, touched: list[ModuleKey]) -> list[Command]:
        if self._saves.held is not None or membership.too_few(self.run):
            return []  # the store is to stay as it is: until it was saved, or enough islands are there
        return self._commit(self._schedule.commits(self.run, touched, self._now_s))

    def _commit(self, commits: list[Commit]) -> list[Command]:
        for key in self.run.hopeless(commits)[:1]:
            self._stopped = True
            reason = f"all {self.run.modules[key].rejected} contributions to round {self.run.round} were rejected"
            return [Stop(status="stopped", reason=f"{reason}; the weights of the round before are kept")]
        late = sorted({(c.round, source) for c in commits for source in self.run.modules[c.module].awaited})
        self.run.commit(commits, self._now_s)
        left_out = [records.left_out(source, round_, self.run.round) for round_, source in late]
        real = tuple(commit for commit in commits if commit.sources)
        outer, measure = ([CommitAll(commits=real)], [Measure()]) if real else ([], [])
        self._asked += len(measure)
        return [*left_out, *outer, *self._round_end([commit.module for commit in commits], measure)]

    def _round_end(self, stepped: list[ModuleKey], measure: list[Measure]) -> list[Command]:
        """What follows an outer step; with what else follows where all modules have ended the present round."""
        if self._bench:
            self._bench.stepped(stepped)
        before, over = self.run.round, self.run.rounds_over()
        if over == before:
            return [*(self._dispatch(self._waiting.on(stepped)) if self._schedule.by_fragment else []), *measure]
        self.run.round, ended = over, range(before + 1, over + 1)
        save: list[Save] = []
        if self.run.pool is None and not self.run.moving:
            save = self._saves.at_round_end(self.run)
        elif any(map(self.run.save_due, ended)) and self._draining is Drain.no:
            self._draining, self._saves.pausing = Drain.tasks, True
        evaluation = self._evaluations.begin(self.run) if any(map(self.run.eval_due, ended)) else []
        return [*self._dispatch(self._waiting.all()), *evaluation, *measure, *save]

    def _dispatch(self, islands: Iterable[IslandId]) -> list[Command]:
        commands: list[Command] = []
        if self._saves.held is not None or self._draining is not Drain.no:
            return commands
        for island in islands:
            view = self.run.islands[island]
            while view.alive and view.queued < QUEUE_DEPTH and not membership.begins_nothing(view, self.run):
                task = (self._bench or self._schedule).next_task(view, self.run, self._now_s)
                if isinstance(task, Wait | NoMore):
                    self._waiting.add(island, task.keys if isinstance(task, Wait) else frozenset())
                    break
                self._waiting.discard(island)
                commands.append(self._give(task, view))
        return commands

    def _give(self, task: Task, island: IslandView) -> Run:
        take_up = self.run.moving and hand_over(self.run.sources[task.source], island)
        self.run.give(task, self._now_s)
        run = Run(task=task, wants=island.give(task), ahead=island.queued > 0, take_up=take_up)
        if self.run.moving:
            note(task, self.run.sources[task.source], island)
        self._queue(island, 1)
        return run

    def _queue(self, island: IslandView, change: int) -> None:
        island.queued += change
        self._queued += change

    def _settle(self) -> list[Command]:
        """The end of the run, or the next step of an interruption, once nothing is under way any more."""
        if self._stopped or self._saves or self._asked or self._evaluations or self._pushes or self._queued:
            return []
        if self.run.round >= self.run.rounds and not self._saves.pausing:
            self._stopped = True
            return [Stop(status="finished")]
        if self._draining is Drain.tasks:
            self._draining = Drain.export
            for task in (asked := tasks.exports(self.run)):
                self._queue(self.run.islands[task.island], 1)
            if asked:
                return [Run(task=task, wants={}) for task in asked]
        if self._draining is Drain.export:
            self._draining = Drain.save
            name = f"round-{self.run.round:06d}" if self._saves.pausing else saved_view.checkpoint_name(self.run)
            return [self._saves.begin(self.run, name, saved_view.to_json(self.run, self._now_s))]
        return []
