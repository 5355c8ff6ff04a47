"""Evaluations: the global weights, measured in one go, or path by path and told as one model."""

from __future__ import annotations

from dataclasses import replace

from diloco import records, tasks
from diloco.events import Command, Run
from diloco.messages import Report
from diloco.views import RunView


class Evaluations:
    """Those that were asked for and not told yet."""

    def __init__(self) -> None:
        self._heard: dict[int, list[Report]] = {}  # by round, in order of path

    def __bool__(self) -> bool:
        return bool(self._heard)

    def begin(self, run: RunView) -> list[Run]:
        """Measure the present weights, of all paths that there are splits for."""
        self._heard[run.round] = []
        asked = [tasks.evaluation(run, index) for index in range(len(run.splits))]
        return [Run(task=task, wants=run.evaluator.give(task)) for task in asked]

    def heard(self, report: Report, run: RunView) -> list[Command]:
        """The evaluator is done with one path; what is to be logged once it is with all."""
        round_ = report.task.round
        parts = self._heard[round_]
        parts.append(report)
        if len(parts) < len(run.splits):
            return []
        del self._heard[round_]
        whole = report if len(parts) == 1 else _joined(parts)
        run.counters.count_evaluation(round_, whole.metrics["eval/loss"])
        return [records.evaluated(whole)]


def _joined(parts: list[Report]) -> Report:
    """The mean a token over all paths; a path that was sent nothing has no say."""
    losses = [part.metrics["eval/loss"] for part in parts]
    tokens = [part.metrics["eval/tokens"] for part in parts]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True) if count) / sum(tokens)
    by_path = {
        f"eval/loss/{index}": loss for index, (loss, count) in enumerate(zip(losses, tokens, strict=True)) if count
    }
    loads = {f"eval/load/{index}": count / sum(tokens) for index, count in enumerate(tokens)}
    return replace(parts[-1], metrics={"eval/loss": mean, "eval/tokens": sum(tokens), **by_path, **loads})
