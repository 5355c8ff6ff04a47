"""What the summary needs of the whole history of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diloco.messages import Reason, Report


@dataclass(kw_only=True)
class Counters:
    """What the summary needs of the whole history of a run, also over resumes."""

    tokens: int = 0  # behind committed contributions only
    outer_steps: int = 0
    accepted: int = 0
    rejected: int = 0
    rejected_by_reason: dict[str, int] = field(default_factory=dict)  # of those that there were
    late: int = 0
    stale: int = 0
    islands_lost: int = 0
    islands_joined: int = 0
    recoveries: int = 0  # returns to a checkpoint, since the store or the driver was lost
    rounds_again: int = 0  # rounds that were committed and then lost with it
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_inside: int = 0  # between the workers of islands
    bytes_sent: int = 0  # between those who are far apart: up and down, and between the workers of a lone island
    inner_steps: int = 0  # finished, over all islands
    inner_s: float = 0.0  # spent in them, by the runtime's clock
    waiting_s: float = 0.0
    train_s: float = 0.0  # wall seconds from the first task to the last event, kept by who drives the run
    clock_s: float = 0.0  # the same by the runtime's clock, which may be virtual
    initial_val_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluated_round: int = -1
    initial_measures: dict[str, float] = field(default_factory=dict)  # what else the workload told of them
    measures: dict[str, float] = field(default_factory=dict)

    def count(self, report: Report, *, lone: bool) -> None:
        """An island's finished task; `lone`: there is no other."""
        self.inner_steps += report.task.steps
        self.inner_s += report.clock_s
        self.waiting_s += report.waiting_s
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.bytes_inside += report.bytes_inside
        self.bytes_sent += report.bytes_up + report.bytes_down + (report.bytes_inside if lone else 0)

    def reject(self, reason: Reason) -> None:
        """A contribution is bad."""
        self.rejected += 1
        self.rejected_by_reason[reason.value] = 1 + self.rejected_by_reason.get(reason.value, 0)

    def minus(self, ahead: Counters) -> Counters:
        """As they were before the tasks that are counted in `ahead`."""
        added = ("inner_steps", "inner_s", "waiting_s", "bytes_up", "bytes_down", "bytes_inside", "bytes_sent")
        return replace(self, **{name: vars(self)[name] - vars(ahead)[name] for name in added})

    def count_evaluation(self, round_: int, metrics: Mapping[str, float]) -> None:
        """What the evaluator found of the global weights after `round_` rounds: "eval/loss", and more."""
        told = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        loss = told.pop("loss")
        if round_ > self.evaluated_round:  # a new evaluator may be asked again in another order
            self.val_loss, self.measures, self.evaluated_round = loss, told, round_
        if round_ == 0:
            self.initial_val_loss, self.initial_measures = loss, told
        self.best_val_loss = loss if self.best_val_loss is None else min(loss, self.best_val_loss)
