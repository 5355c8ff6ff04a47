"""How far one source is: what it was given, what it has not handed over, and what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field

from diloco.messages import Report, Settled, ShardId, SourceId, Task

TOLD_ROUNDS = 2  # for how many rounds the fate of a contribution is told: longer than any install takes


@dataclass(kw_only=True)
class Work:
    """The steps of a turn that a source has begun and not handed over: what is lost with its island."""

    round: int
    fragment: int
    start: int  # the source's position at their first
    tokens: int = 0  # trained on so far


@dataclass(kw_only=True)
class SourceView:
    """Where one source stands: the next task to give out, and what it has not handed over."""

    source: SourceId
    shard: ShardId
    path: int = 0
    began: int = 0  # the first round that it takes part in
    whole: bool = True  # its island has nothing of it: the next task installs all slots
    round: int = 0
    segment: int = 0
    done: int = 0  # steps of the present round that were given out
    position: int = 0  # steps of its shard that were given out
    start: int = 0  # its position at the first step of the present round
    attempt: int = 0  # how often its work was lost
    work: list[Work] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)

    def give(self, task: Task) -> None:
        """Move on past a task that was given out."""
        if task.segment == 0:
            self.round, self.start = task.round, task.first_step
        if not self.work or (self.work[-1].round, self.work[-1].fragment) != (task.round, task.fragment):
            self.work.append(Work(round=task.round, fragment=task.fragment, start=task.first_step))
        self.whole = False
        self.position += task.steps
        self.done += task.steps
        self.segment += 1
        if task.last:
            self.round, self.segment, self.done = self.round + 1, 0, 0

    def trained(self, report: Report) -> None:
        """A task of its present work is finished."""
        for work in self.work:
            if (work.round, work.fragment) == (report.task.round, report.task.fragment):
                work.tokens += report.tokens

    def hand_over(self, round_: int, fragment: int) -> int:
        """The work up to a turn, dropped ones included, has left the island. Returns the tokens behind it."""
        gone = [work for work in self.work if (work.round, work.fragment) <= (round_, fragment)]
        self.work = self.work[len(gone) :]
        return sum(work.tokens for work in gone)

    def settle(self, settled: Settled) -> None:
        """Remember what became of a contribution, to be told with each task for a while."""
        self.settled = [s for s in self.settled if s.round > settled.round - TOLD_ROUNDS] + [settled]

    def refused(self, round_: int, fragment: int) -> bool:
        """Whether its contribution of that turn was refused."""
        return any((s.round, s.fragment, s.accepted) == (round_, fragment, False) for s in self.settled)

    def lose(self) -> None:
        """Its island is gone, and what was not handed over will be given out again."""
        self.restart(self.work[0].start if self.work else self.position)
        self.whole = True
        self.attempt += 1

    def restart(self, position: int) -> None:
        """Stand before the first step of a round again, at this position in the data."""
        self.position = self.start = position
        self.work, self.segment, self.done = [], 0, 0
