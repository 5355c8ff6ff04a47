"""Kills at chosen moments of a run: when a process of it comes to some phase, it ends another one, or itself.

A module of parts of one's own: `--import experiments.ambush`, with DILOCO_AMBUSH=VICTIM:PHASE:ROUND,...@FOLDER in the
environment of all processes. FOLDER holds `runs/`. Each kill is made once; a file there, VICTIM:PHASE:ROUND, has whom.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diloco import checkpoint
from diloco.island import Island
from diloco.messages import Commit, Contribution, Task
from diloco.store import ModuleStore
from experiments import aftermath

VARIABLE = "DILOCO_AMBUSH"
VICTIMS = ("rank0", "rank1", "shard", "driver", "evaluator", "node")
PHASES = ("training", "pushing", "committing", "checkpointing")
ISLAND = 1  # the one of whose workers one is ended


def named(victim: str, phase: str, round_: int) -> str:
    """One kill, as the variable and the files name it."""
    return f"{victim}:{phase}:{round_}"


def lay(victim: str, phase: str, round_: int, folder: Path) -> None:
    """Wait in this process for `phase` of that round."""

    def spring() -> None:
        try:
            made = os.open(folder / named(victim, phase, round_), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        pid = _pid_of(victim, folder / "runs" / "latest")
        os.kill(pid, 0)  # it is there
        os.write(made, str(pid).encode())  # before, since it may be this process
        os.kill(pid, signal.SIGKILL)

    match phase:
        case "training":
            _before(Island, "train", lambda self, task, *rest: _trains(task, round_), spring)
        case "pushing":
            _before(ModuleStore, "push", lambda self, sent: _is_sent(sent, round_), spring)
        case "committing":
            _before(ModuleStore, "commit", lambda self, order: _is_step(order, round_), spring)
        case "checkpointing":
            _before(checkpoint, "write_modules", lambda path, states: f"round-{round_ + 1:06d}" in path, spring)
        case _:
            raise ValueError(f"phase {phase} is unknown; use one of {', '.join(PHASES)}")


def _trains(task: Task, round_: int) -> bool:
    return (task.island, task.round) == (ISLAND, round_) and task.steps > 0


def _is_sent(sent: Contribution, round_: int) -> bool:
    return (sent.island, sent.round) == (ISLAND, round_)


def _is_step(order: Commit, round_: int) -> bool:
    return order.round == round_


def _before(owner: Any, name: str, condition: Callable[..., bool], spring: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def outer(*arguments: Any) -> Any:
        if condition(*arguments):
            spring()
        return inner(*arguments)

    setattr(owner, name, outer)


def _pid_of(victim: str, run: Path) -> int:
    """The newest process of that role, by the run's metrics."""
    told = aftermath.processes(run)
    if victim in ("rank0", "rank1", "node"):
        return int(told["island", ISLAND, int(victim == "rank1")]["raylet" if victim == "node" else "pid"])
    return int([record for (kind, _, _), record in told.items() if kind == victim][-1]["pid"])


if given := os.environ.get(VARIABLE):
    _kills, _, _folder = given.partition("@")
    for _kill in _kills.split(","):
        _victim, _phase, _round = _kill.split(":")
        lay(_victim, _phase, int(_round), Path(_folder))
