"""What rank 0 of runtime `spmd` asks of all processes, and what they answer: frozen records, without tensors.

But for `Answer.values`, which stays on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from diloco.events import CommitAll, Measure, Push, Run
from diloco.messages import CommitStats, IslandId, ModuleKey, Modules, Report, Snapshot, SourceId, Verdict
from diloco.runtime.base import Job


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first order: what is to be run."""

    job: Job
    timeout_s: float


@dataclass(frozen=True)
class Build:
    """Meet the others, and make the island."""


@dataclass(frozen=True)
class SetUp:
    """Learn the layout."""

    modules: Modules


@dataclass(frozen=True)
class Fill:
    """Take the starting values that rank 0 sends."""


@dataclass(frozen=True)
class Adopt:
    """Tell which modules, of these digests, are there already."""

    digests: Mapping[ModuleKey, str]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Read from a checkpoint what belongs here; `sources`: source -> island."""

    checkpoint: str
    sources: Mapping[SourceId, int]


@dataclass(frozen=True, kw_only=True)
class Write:
    """Write what belongs here into a checkpoint, as it is now; of each source what it exported in that round."""

    folder: str
    sources: Mapping[SourceId, int]


Command: TypeAlias = Run | Push | CommitAll | Measure | Write


@dataclass(frozen=True, kw_only=True)
class Go:
    """Carry out these in their order, then do the first task that waits. `write`: wait for checkpoints."""

    commands: tuple[Command, ...]
    write: bool


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Send rank 0 what its evaluator lacks, and tell the digests of the outer state."""

    wants: Mapping[ModuleKey, int | None]


Order: TypeAlias = Build | SetUp | Fill | Adopt | Load | Go | Finish


@dataclass(kw_only=True)
class Answer:
    """What came of an order here."""

    filled: dict[ModuleKey, str] = field(default_factory=dict)  # digests
    held: dict[IslandId, list[ModuleKey]] = field(default_factory=dict)
    loaded: list[SourceId] = field(default_factory=list)
    verdicts: list[tuple[int, Verdict]] = field(default_factory=list)  # of which command
    stats: list[CommitStats] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    written: list[tuple[dict[str, str], str]] = field(default_factory=list)  # files and what went wrong, by checkpoint
    values: list[Snapshot] = field(default_factory=list)  # on rank 0
    digests: dict[str, str] = field(default_factory=dict)
