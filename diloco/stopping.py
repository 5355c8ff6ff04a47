"""Early stopping: of each path, the weights of that round count in which it did best on a slice of its own data.

The slice is neither trained on nor told of. Training goes on for all, since others share a path's modules
(arXiv:2403.10616, section 4.3).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from diloco.messages import KeepBest, Report, Task
from diloco.progress import BestRound
from diloco.views import RunView
from diloco.workload import Corpus, Workload


def keep_best(run: RunView, path: int) -> KeepBest | None:
    """What an evaluation of the present weights of a path is asked to keep; nothing without early stopping."""
    if not run.best_folder:
        return None
    known = run.best.get(path)
    below = known.stop_loss if known else math.inf
    return KeepBest(folder=str(folder_of(run.best_folder, path, run.round)), below=below)


def note(run: RunView, path: int, report: Report) -> BestRound | None:
    """A path was evaluated: its best round so far. None without early stopping."""
    if not run.best_folder:
        return None
    loss, stop_loss = report.metrics["eval/loss"], report.metrics["eval/stop_loss"]
    if path not in run.best or stop_loss < run.best[path].stop_loss:
        run.best[path] = BestRound(round=report.task.round, stop_loss=stop_loss, loss=loss)
    return run.best[path]


def folder_of(root: str | Path, path: int, round_: int) -> Path:
    """Where the model of a path after that many rounds is kept."""
    return Path(root) / f"path{path}-round{round_}"


def evaluate(
    workload: Workload, model: nn.Module, corpus: Corpus, task: Task, export: Callable[[Path], None]
) -> dict[str, float]:
    """What the task asks to be measured, under `eval/`; the model is kept if it is the best yet.

    Raises ValueError where the workload tells no loss.
    """
    if task.evaluate is None:
        return {}
    found = workload.evaluate(model, corpus, task.evaluate)
    if "loss" not in found:
        raise ValueError(f"{type(workload).__name__}.evaluate gave {sorted(found)}, and not 'loss'")
    if task.keep_best is not None and found["stop_loss"] < task.keep_best.below:
        write(Path(task.keep_best.folder), export)
    return {f"eval/{name}": value for name, value in found.items()}


def write(folder: Path, export: Callable[[Path], None]) -> None:
    """Have a model exported to `folder`, whole or not at all, in the place of what is there."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    export(temporary)
    temporary.rename(folder)


def prune(root: Path, best: Mapping[int, BestRound], saved: Sequence[int]) -> None:
    """Remove the models that neither the run nor one of its checkpoints can still need.

    A path needs its best, newer ones, which may be about to become that, and of each checkpoint the newest that is not
    after it. `saved`: the rounds of the checkpoints.
    """
    rounds: dict[int, list[int]] = {}
    for folder in root.glob("path*-round*"):
        if not folder.name.endswith(".tmp"):
            number, _, after = folder.name.removeprefix("path").partition("-round")
            rounds.setdefault(int(number), []).append(int(after))
    for path, found in rounds.items():
        own = best[path].round if path in best else -1
        upto = [[round_ for round_ in found if round_ <= checkpoint] for checkpoint in saved]
        needed = {max(rounds) for rounds in upto if rounds}
        for round_ in found:
            if round_ < own and round_ not in needed:
                shutil.rmtree(folder_of(root, path, round_))
