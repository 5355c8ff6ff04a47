"""metrics.jsonl read back: what a report needs of each record, in the order of the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

# Control characters, lone surrogates and non-characters: neither HTML nor a font has a place for them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
NOTHING: Mapping[Any, float] = MappingProxyType({})
MARKS = ("lost", "joined", "checkpoint", "start")


class Segment(NamedTuple):
    """A finished task of an island; a tuple since there can be a million of them."""

    island: int
    end_s: float  # since the run's start
    seconds: float  # of training
    waiting_s: float  # before it
    tokens: float
    loss: float | None
    steps: float = 0.0
    clock_s: float = 0.0  # end_s by the clock of the runtime, which may be virtual
    clock_seconds: float | None = None  # the same of seconds; None: the run is older than this figure


class Commit(NamedTuple):
    """An outer step; `round` counts those done, tokens and bytes are the whole run's."""

    round: int
    at: float  # the same, with the fragments that stepped before in the round as a part of one
    time_s: float
    tokens: float
    bytes_up: float
    bytes_down: float
    bytes_inside: float  # between the workers within islands
    bytes_sent: float  # between those who are far apart: of a lone island also its workers
    norms: tuple[float, ...]
    cosines: tuple[float, ...]
    update_norm: float | None
    segments: int  # how many the file had told of by then
    place: tuple[int, int]  # round and fragment: without a barrier there are many of the same
    rounds_over: int  # `round`, but without a barrier that counts the one that is being made
    clock_s: float
    contributors: tuple[int, ...]  # islands
    staleness: tuple[int, ...]  # of each of them
    alive: float | None  # islands that lived by then
    participating: float | None  # of them, those with a part in this step
    weight: float | None  # the share that these have in all the data
    version: int | None = None  # how many outer steps its modules have had


class Evaluation(NamedTuple):
    """The global weights after some rounds."""

    round: int
    time_s: float
    loss: float | None
    clock_s: float = 0.0
    by_path: Mapping[int, float] = NOTHING  # losses, where there are several paths
    loads: Mapping[int, float] = NOTHING  # shares of the validation tokens, by path
    best_rounds: Mapping[int, float] = NOTHING  # with early stopping: after which each path counts
    beside: Mapping[str, float] = NOTHING  # losses of other runs after as many steps, by label
    measures: Mapping[str, float] = NOTHING  # what else the workload told


class Refusal(NamedTuple):
    """A contribution that was too old to count."""

    island: int
    staleness: int
    time_s: float
    clock_s: float


class Mark(NamedTuple):
    """Something that happened to the run or to one island (-1: to none)."""

    event: str
    time_s: float
    island: int = -1
    clock_s: float = 0.0


class Note(NamedTuple):
    """A text that the run wrote: a warning or a sample."""

    round: int | None
    time_s: float
    text: str
    table: Sequence[Mapping[str, str]] = ()  # of a sample: rows with the same keys


@dataclass(kw_only=True)
class History:
    """One run's metrics.jsonl."""

    segments: list[Segment] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    warnings: list[Note] = field(default_factory=list)
    samples: list[Note] = field(default_factory=list)
    start: Mapping[str, Any] = field(default_factory=dict)  # the newest record of this event
    ended: bool = False  # whether the newest start has an end
    wall_s: float = 0.0
    clock_s: float = 0.0

    @property
    def free(self) -> bool:
        """Whether islands ran free of each other: a round had several outer steps, one after the other."""
        versions: dict[tuple[int, int], list[int | None]] = {}
        for commit in self.commits:
            versions.setdefault(commit.place, []).append(commit.version)
        return any(len(found) > 1 and (len(set(found)) > 1 or None in found) for found in versions.values())

    @property
    def by_module(self) -> bool:
        """Whether the modules of a round stepped on contributions of their own: those of the paths through them."""
        return not self.free and len({commit.place for commit in self.commits}) < len(self.commits)

    @property
    def virtual(self) -> bool:
        """Whether the runtime's clock was not that on the wall."""
        return any(s.clock_seconds is not None and s.clock_seconds != s.seconds for s in self.segments)

    @property
    def paced(self) -> bool:
        """Whether the time that matters is that of a virtual clock, by which islands are not all alike."""
        paces = {round(s.clock_seconds / s.steps, 6) for s in self.segments if s.clock_seconds and s.steps}
        return self.virtual and (self.free or len(paces) > 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        event, time_s = record.get("event"), amount(record, "time_s")
        self.wall_s = max(self.wall_s, time_s)
        self.clock_s = clock_s = max(self.clock_s, amount(record, "clock_s"))
        if event == "segment":
            self.segments.append(_segment(record, time_s))
        elif event == "commit":
            self.commits.append(_commit(record, time_s, len(self.segments)))
        elif event == "evaluation":
            self.evaluations.append(_evaluation(record, time_s, clock_s))
        elif event == "stale" and "staleness" in record:
            staleness = int(amount(record, "staleness"))
            self.refusals.append(Refusal(int(amount(record, "island")), staleness, time_s, clock_s))
        elif event == "warning":
            self.warnings.append(_note(record, time_s, "message"))
        elif event == "sample":
            self.samples.append(_note(record, time_s, "text")._replace(table=_rows(record.get("table"))))
        elif event == "end":
            self.ended = True
        if event in MARKS:
            island = int(amount(record, "island")) if "island" in record else -1
            self.marks.append(Mark(str(event), time_s, island, clock_s))
        if event == "start":
            self.start, self.ended = record, False
        if event == "lost":
            text = f"island {record.get('island')} was lost: {record.get('message') or 'no reason is known'}"
            self.warnings.append(Note(number_of_rounds(record), time_s, text))


def read(path: Path) -> History:
    """All whole lines of a metrics.jsonl; one that is being written, or was when its run died, is left out."""
    history = History()
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    history.add(record)
    return history


def printable(text: str) -> str:
    """Text of a run with a replacement for what cannot be shown."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number, else None."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def amount(record: Mapping[str, Any], key: str) -> float:
    """A finite number, else 0."""
    return number(record, key) or 0.0


def number_of_rounds(record: Mapping[str, Any]) -> int | None:
    """The round that a record names, if it names one."""
    found = number(record, "round")
    return None if found is None else int(found)


def _round(record: Mapping[str, Any]) -> int:
    return int(amount(record, "round"))


def _segment(record: Mapping[str, Any], time_s: float) -> Segment:
    return Segment(
        island=int(amount(record, "island")),
        end_s=time_s,
        seconds=amount(record, "seconds"),
        waiting_s=amount(record, "comm/seconds_waiting"),
        tokens=amount(record, "tokens"),
        loss=number(record, "inner/loss"),
        steps=amount(record, "steps"),
        clock_s=amount(record, "clock_s"),
        clock_seconds=number(record, "clock_seconds"),
    )


def _commit(record: Mapping[str, Any], time_s: float, segments: int) -> Commit:
    fragments, rounds = amount(record, "fragments") or 1.0, _round(record)
    return Commit(
        round=rounds,
        at=rounds - 1 + (amount(record, "fragment") + 1) / fragments,
        time_s=time_s,
        tokens=amount(record, "total/tokens"),
        bytes_up=amount(record, "total/bytes_up"),
        bytes_down=amount(record, "total/bytes_down"),
        bytes_inside=amount(record, "total/bytes_inside"),
        bytes_sent=amount(record, "total/bytes_sent"),
        norms=_numbers(record.get("outer/contribution_norms")),
        cosines=_numbers(record.get("outer/cosines")),
        update_norm=number(record, "outer/update_norm"),
        segments=segments,
        place=(rounds, int(amount(record, "fragment"))),
        rounds_over=int(min(rounds, amount(record, "total/rounds"))) if "total/rounds" in record else rounds,
        clock_s=amount(record, "clock_s"),
        contributors=tuple(map(int, _numbers(record.get("outer/contributors")))),
        staleness=tuple(map(int, _numbers(record.get("outer/stalenesses")))),
        alive=number(record, "outer/alive"),
        participating=number(record, "outer/participating"),
        weight=number(record, "outer/weight"),
        version=int(amount(record, "outer/version")) if "outer/version" in record else None,
    )


def _evaluation(record: Mapping[str, Any], time_s: float, clock_s: float) -> Evaluation:
    told = (_below(record, prefix) for prefix in ("eval/loss/", "eval/load/", "eval/best_round/"))
    by_path, loads, best = ({int(path): value for path, value in found.items()} for found in told)
    loss = number(record, "eval/loss")
    more = {name: value for name, value in _below(record, "eval/").items() if name != "loss" and "/" not in name}
    return Evaluation(_round(record), time_s, loss, clock_s, by_path, loads, best, _below(record, "beside/"), more)


def _below(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers under keys that begin so, by the rest of the key."""
    found = {key.removeprefix(prefix): number(record, key) for key in record if key.startswith(prefix)}
    return {key: value for key, value in found.items() if value is not None}


def _rows(table: object) -> list[Mapping[str, str]]:
    return [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []


def _numbers(values: object) -> tuple[float, ...]:
    found = values if isinstance(values, list) else []
    return tuple(float(v) for v in found if isinstance(v, int | float) and math.isfinite(v))


def _note(record: Mapping[str, Any], time_s: float, key: str) -> Note:
    return Note(number_of_rounds(record), time_s, str(record.get(key, "")))
