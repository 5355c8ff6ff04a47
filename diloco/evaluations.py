"""Evaluations: the global weights, measured in one go, or path by path and told as one model."""

from __future__ import annotations

from dataclasses import replace

from diloco import records, stopping, tasks
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
        asked = [
            replace(tasks.evaluation(run, index), keep_best=stopping.keep_best(run, index))
            for index in range(len(run.splits))
        ]
        return [Run(task=task, wants=run.evaluator.give(task)) for task in asked]

    def heard(self, report: Report, run: RunView) -> list[Command]:
        """The evaluator is done with one path; what is to be logged once it is with all."""
        round_ = report.task.round
        parts = self._heard[round_]
        parts.append(report)
        best = stopping.note(run, len(parts) - 1, report)
        if len(parts) < len(run.splits):
            return []
        del self._heard[round_]
        whole = report if len(parts) == 1 and best is None else _joined(parts, run)
        run.counters.count_evaluation(round_, whole.metrics)
        return [records.evaluated(whole)]


def _joined(parts: list[Report], run: RunView) -> Report:
    """The mean a token over all paths; a path that was sent nothing has no say.

    With early stopping each path counts as it was after its best round.
    """
    tokens = [part.metrics["eval/tokens"] for part in parts]
    latest = [part.metrics["eval/loss"] for part in parts]
    losses = [run.best[path].loss if path in run.best else loss for path, loss in enumerate(latest)]
    metrics = {"eval/loss": _mean(losses, tokens), "eval/tokens": sum(tokens)}
    if run.best:
        metrics["eval/latest_loss"] = _mean(latest, tokens)
    for path, (loss, count) in enumerate(zip(losses, tokens, strict=True)):
        metrics |= {f"eval/loss/{path}": loss} if count else {}
        metrics[f"eval/load/{path}"] = count / sum(tokens)
        if path in run.best:
            metrics[f"eval/best_round/{path}"] = run.best[path].round
    return replace(parts[-1], metrics=metrics)


def _mean(losses: list[float], tokens: list[float]) -> float:
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True) if count) / sum(tokens)
