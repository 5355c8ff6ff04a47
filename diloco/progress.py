"""How far one source, one module and one island is: plain data, without the settings of the run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from diloco.messages import IslandId, ModuleKey, Report, Settled, ShardId, SourceId, Task, Turn
from diloco.pool import Stretch

LEAST_PACE_S = 1e-9  # so that one can divide by it
REMEMBERED_PACES = 9  # tasks by which a source's speed is told
TOLD_ROUNDS = 2  # for how many rounds the fate of a contribution is told: longer than any install takes


@dataclass(kw_only=True)
class Work:
    """The steps of a turn that a source has begun and not handed over: what is lost with its island."""

    round: int
    fragment: int
    shard: ShardId
    start: int  # the source's position at their first
    steps: int = 0  # given out of them so far
    ended_s: float = 0.0  # when the last of them was heard of
    tokens: int = 0  # trained on so far

    @property
    def stretch(self) -> Stretch:
        """The data behind it."""
        return Stretch(shard=self.shard, first_step=self.start, steps=self.steps)


@dataclass(kw_only=True)
class SourceView:
    """Where one source stands: the next task to give out, and what it has not handed over."""

    source: SourceId
    shard: ShardId
    path: int = 0
    island: IslandId | None = None  # where sources move: which one has it
    last: IslandId | None = None  # which one had it
    loose: bool = False  # its last task saves what belongs to it, so that its island may go on without it
    saving: int = 0  # tasks that are to save it and have not done so yet
    kept: bool = False  # what belongs to it was saved when a task of it ended, for the next island
    held: dict[ModuleKey, int] = field(default_factory=dict)  # the versions that its island had with its last task
    began: int = 0  # the first round that it takes part in
    whole: bool = True  # its island has nothing of it: the next task installs all slots
    round: int = 0
    segment: int = 0
    done: int = 0  # steps of the present round that were given out
    position: int = 0  # steps of its shard that were given out
    start: int = 0  # its position at the first step of the present round
    round_steps: int = 0  # of the present round in all, once it has begun
    attempt: int = 0  # how often its work was lost
    work: list[Work] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)  # its newest that was judged: attempt, round, fragment
    free_s: float = 0.0  # when it is expected to be through with what it was given
    ahead: int = 0  # steps that it was given and has not finished
    taken: int = 0  # steps that it was given in all
    sent: dict[int, int] = field(default_factory=dict)  # by fragment: `taken` when it was last to be sent
    got: dict[int, int] = field(default_factory=dict)  # by fragment: `taken` when it was last installed
    broken: bool = False  # its last contribution was not finite: it is to start afresh
    paces_s: list[float] = field(default_factory=list)  # seconds a step of its last tasks
    pace_s: float | None = None  # in their median, so that one slow one changes nothing; None = nothing was seen yet

    def give(self, task: Task) -> None:
        """Move on past a task that was given out."""
        if task.segment == 0:
            self.round, self.start, self.round_steps = task.round, task.first_step, task.round_steps
            self.shard, self.position = task.shard, task.first_step
        if not self.work or (self.work[-1].round, self.work[-1].fragment) != (task.round, task.fragment):
            self.work.append(Work(round=task.round, fragment=task.fragment, shard=task.shard, start=task.first_step))
        self.whole = False
        self.broken = self.broken and not task.fresh
        self.work[-1].steps += task.steps
        self.position += task.steps
        self.taken += task.steps
        self.ahead += task.steps
        self.done += task.steps
        self.segment += 1
        if task.last:
            self.round, self.segment, self.done = self.round + 1, 0, 0

    def trained(self, report: Report, now_s: float) -> None:
        """A task of its present work is finished."""
        self.ahead -= report.task.steps
        if report.task.steps:
            self.paces_s = [*self.paces_s, report.clock_s / report.task.steps][-REMEMBERED_PACES:]
            self.pace_s = max(statistics.median(self.paces_s), LEAST_PACE_S)
        for work in self.work:
            if (work.round, work.fragment) == (report.task.round, report.task.fragment):
                work.tokens += report.tokens
                work.ended_s = now_s

    def hand_over(self, round_: int, fragment: int) -> list[Work]:
        """The work up to a turn, dropped ones included, has left the island. Returns it."""
        gone = [work for work in self.work if (work.round, work.fragment) <= (round_, fragment)]
        self.work = self.work[len(gone) :]
        return gone

    def settle(self, settled: Settled) -> None:
        """Remember what became of a contribution, to be told with each task for a while."""
        self.settled = [s for s in self.settled if s.round > settled.round - TOLD_ROUNDS] + [settled]

    def has_heard(self, turn: Turn) -> bool:
        """Whether its contribution of this turn, or of a later one, was judged: they are so in their order."""
        return [self.attempt, turn.round, turn.fragment] <= self.heard

    @property
    def idle(self) -> bool:
        """It was given whole rounds, and all of them were handed over."""
        return self.segment == 0 and not self.work

    def unfinished(self) -> list[Stretch]:
        """The data of all that it was given and has not handed over, the rest of its present round included."""
        stretches = [work.stretch for work in self.work]
        if stretches and self.segment:
            last = stretches[-1]
            stretches[-1] = replace(last, steps=self.start + self.round_steps - last.first_step)
        return stretches

    def refused(self, round_: int, fragment: int) -> bool:
        """Whether its contribution of that turn was refused."""
        return any((s.round, s.fragment, s.accepted) == (round_, fragment, False) for s in self.settled)

    def lose(self) -> None:
        """Its island is gone, and what was not handed over will be given out again."""
        self.restart(self.work[0].start if self.work else self.position)
        self.whole, self.saving = True, 0
        self.attempt += 1

    def restart(self, position: int) -> None:
        """Stand before the first step of a round again, at this position in the data."""
        self.position = self.start = position
        self.work, self.segment, self.done, self.ahead = [], 0, 0, 0


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A sound contribution that waits for its commit; one record for all modules that it is to."""

    examples: float  # its weight
    tokens: int  # trained on for it
    norm: float  # over all those modules
    staleness: int = 0  # versions that they took while it was made, when it arrived
    steps: int = 0  # trained since those modules were installed
    now_s: float = 0.0  # when it arrived


Arrivals: TypeAlias = dict[tuple[int, SourceId], Arrival]  # by the source's round, and the source


@dataclass(kw_only=True)
class ModuleView:
    """What is known of one module."""

    version: int = 0  # outer steps taken
    round: int = 0  # the round that its next commit belongs to
    awaited: set[SourceId] = field(default_factory=set)  # who takes part in that round and was not heard yet
    arrivals: Arrivals = field(default_factory=dict)
    folded: int = 0  # of those who are planned, in order, so many were heard and their contributions added up
    rejected: int = 0  # contributions to that round that were refused
    dropped: int = 0  # contributions to that round that the schedule left out

    @property
    def heard(self) -> bool:
        """Whether anybody has finished the present round."""
        return bool(self.arrivals or self.rejected or self.dropped)


@dataclass(kw_only=True)
class BestRound:
    """With early stopping: the round after which a path did best on the slice of its data that is kept for this."""

    round: int
    stop_loss: float  # on that slice
    loss: float  # on what is held out, with the same weights


@dataclass(kw_only=True)
class IslandView:
    """One island now, or the evaluator; not checkpointed, since islands come and go."""

    island: IslandId
    source: SourceId
    alive: bool = True
    trains: SourceId | None = None  # where sources move: of which it had a task last
    queued: int = 0  # tasks given out and not finished
    holds: dict[ModuleKey, int] = field(default_factory=dict)  # the versions that it has installed

    def give(self, task: Task) -> dict[ModuleKey, int | None]:
        """What is to be pulled for a task: what it does not hold, as updates on what it does."""
        asked = {task.modules[slot]: version for slot, version in task.install.items()}
        wants = {key: self.holds.get(key) for key, version in asked.items() if self.holds.get(key) != version}
        self.holds |= asked
        if len(self.holds) > len(task.modules):  # a slot holds one module, or several that are alike from the start
            path = set(task.modules.values())
            refilled = {key.rpartition("/")[0] for key in wants}
            self.holds = {k: v for k, v in self.holds.items() if k in path or k.rpartition("/")[0] not in refilled}
        return wants
