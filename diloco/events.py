"""What the coordinator hears and what it asks for: frozen records, without behaviour.

Each event carries `now_s`, the time on the clock of the runtime (virtual in runtime `local`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from diloco.messages import Commit, CommitStats, Fold, IslandId, ModuleKey, Report, Task, Turn, Verdict


@dataclass(frozen=True, kw_only=True)
class Started:
    """The store is filled and the islands are ready, but for those that are `absent`."""

    now_s: float
    absent: frozenset[IslandId] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """An island, or the evaluator, finished a task."""

    now_s: float
    report: Report


@dataclass(frozen=True, kw_only=True)
class Received:
    """The store judged all parts of one source's contribution."""

    now_s: float
    turn: Turn
    verdicts: tuple[Verdict, ...]
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What the commits of a round looked like; arrives some time after they were asked for."""

    now_s: float
    stats: tuple[CommitStats, ...]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is complete, or could not be written."""

    now_s: float
    path: str
    seconds: float
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """An island is gone."""

    now_s: float
    island: IslandId
    reason: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """An island is ready: respawned, or new."""

    now_s: float
    island: IslandId


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """An island's node has announced that it goes away: the island is to end its round, and gets no other."""

    now_s: float
    island: IslandId


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """Something to be logged that the runtime has found out."""

    now_s: float
    record: Mapping[str, object]  # a line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """The user wants the run to stop in a way that it can be resumed."""

    now_s: float


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Nothing else happened for a while."""

    now_s: float


Event: TypeAlias = (
    Started | Finished | Received | Committed | Saved | Lost | Joined | Leaving | Noticed | Interrupted | Tick
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Have `task.island` run the task, with these modules pulled for it: key -> the version it already has.

    None: whatever it has, it gets full values. What it is to install of other modules it has.
    """

    task: Task
    wants: Mapping[ModuleKey, int | None]
    ahead: bool = False  # the island is busy: what is pulled may come meanwhile
    take_up: bool = False  # first the island becomes the task's source, as what was kept of it last


@dataclass(frozen=True, kw_only=True)
class Push:
    """Hand what this task contributed to the store; answered by `Received`."""

    task: Task


@dataclass(frozen=True, kw_only=True)
class FoldAll:
    """Add up what has come so far for steps that are not due yet, before anything that is asked for later."""

    folds: tuple[Fold, ...]


@dataclass(frozen=True, kw_only=True)
class CommitAll:
    """Take these outer steps, before anything that is asked for later."""

    commits: tuple[Commit, ...]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Tell what the last commits looked like, off the way of the round; answered by `Committed`."""


@dataclass(frozen=True, kw_only=True)
class Save:
    """Write a checkpoint of the store as it is now and of each source as last exported; answered by `Saved`."""

    name: str
    view: Mapping[str, Any]  # RunView.to_json()


@dataclass(frozen=True, kw_only=True)
class Respawn:
    """Start this island anew; answered by `Joined`."""

    island: IslandId


@dataclass(frozen=True, kw_only=True)
class Log:
    """One line of metrics.jsonl."""

    record: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run is over: status finished, stopped (by its own rule) or interrupted."""

    status: str
    reason: str = ""


Command: TypeAlias = Run | Push | FoldAll | CommitAll | Measure | Save | Respawn | Log | Stop
