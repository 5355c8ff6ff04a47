"""metrics.jsonl read back: what a report needs of each record, in the order of the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Control characters, lone surrogates and non-characters: neither HTML nor a font has a place for them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
MARKS = ("lost", "joined", "checkpoint", "start")


class Segment(NamedTuple):
    """A finished task of an island; a tuple since there can be a million of them."""

    island: int
    end_s: float  # since the run's start
    seconds: float  # of training
    waiting_s: float  # before it
    tokens: float
    loss: float | None


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


class Evaluation(NamedTuple):
    """The global weights after some rounds."""

    round: int
    time_s: float
    loss: float | None


class Mark(NamedTuple):
    """Something that happened to the run or to one island (-1: to none)."""

    event: str
    time_s: float
    island: int = -1


class Note(NamedTuple):
    """A text that the run wrote: a warning or a sample."""

    round: int | None
    time_s: float
    text: str


@dataclass(kw_only=True)
class History:
    """One run's metrics.jsonl."""

    segments: list[Segment] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    warnings: list[Note] = field(default_factory=list)
    samples: list[Note] = field(default_factory=list)
    start: Mapping[str, Any] = field(default_factory=dict)  # the newest record of this event
    ended: bool = False  # whether the newest start has an end
    wall_s: float = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        event, time_s = record.get("event"), amount(record, "time_s")
        self.wall_s = max(self.wall_s, time_s)
        if event == "segment":
            self.segments.append(_segment(record, time_s))
        elif event == "commit":
            self.commits.append(_commit(record, time_s, len(self.segments)))
        elif event == "evaluation":
            self.evaluations.append(Evaluation(_round(record), time_s, number(record, "eval/loss")))
        elif event == "warning":
            self.warnings.append(_note(record, time_s, "message"))
        elif event == "sample":
            self.samples.append(_note(record, time_s, "text"))
        elif event == "end":
            self.ended = True
        if event in MARKS:
            self.marks.append(Mark(str(event), time_s, int(amount(record, "island")) if "island" in record else -1))
        if event == "start":
            self.start, self.ended = record, False
        if event == "lost":
            island = f"island {record.get('island')} was lost: {record.get('message') or 'no reason is known'}"
            self.warnings.append(Note(number_of_rounds(record), time_s, island))


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
    )


def _commit(record: Mapping[str, Any], time_s: float, segments: int) -> Commit:
    fragments = amount(record, "fragments") or 1.0
    return Commit(
        round=_round(record),
        at=_round(record) - 1 + (amount(record, "fragment") + 1) / fragments,
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
    )


def _numbers(values: object) -> tuple[float, ...]:
    found = values if isinstance(values, list) else []
    return tuple(float(v) for v in found if isinstance(v, int | float) and math.isfinite(v))


def _note(record: Mapping[str, Any], time_s: float, key: str) -> Note:
    return Note(number_of_rounds(record), time_s, str(record.get(key, "")))
