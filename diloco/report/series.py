"""What is drawn, as numbers: pure functions from a history to points and bars."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from diloco.report.history import History, Segment

MOST_POINTS = 600  # of a line
MOST_BARS = 6000  # of a timeline
WAITING_BAR = (0.35, 0.3)  # base and share: thinner than training, also told apart without colour

T = TypeVar("T")


class Point(NamedTuple):
    """A loss, and what it had taken to come there."""

    round: int
    tokens: float
    bytes_sent: float
    time_s: float
    loss: float


class Traffic(NamedTuple):
    """Bytes up to the end of a round, and of that round alone."""

    round: int
    total: float
    up: float
    down: float
    inside: float


class Spread(NamedTuple):
    """Several values of one outer step; of fragments each has its part of a round."""

    round: float
    mean: float
    least: float
    most: float


class Bar(NamedTuple):
    """A stretch of an island's time: a bar of height `share` over `base`, where a row has height 1."""

    island: int
    begin_s: float
    end_s: float
    base: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When which island trained and when it waited."""

    islands: tuple[int, ...]
    training: tuple[Bar, ...]
    waiting: tuple[Bar, ...]
    step_s: float  # 0, or the bars are shares of steps of so many seconds


def validation(history: History) -> list[Point]:
    """The losses of the global weights; tokens and bytes are those of the newest commit of so many rounds."""
    newest = {commit.round: commit for commit in history.commits}
    rounds = sorted(newest)
    points = []
    for evaluation in history.evaluations:
        if evaluation.loss is not None:
            done = bisect_right(rounds, evaluation.round)
            commit = newest[rounds[done - 1]] if done else None
            tokens, bytes_sent = (commit.tokens, commit.bytes_sent) if commit else (0.0, 0.0)
            points.append(Point(evaluation.round, tokens, bytes_sent, evaluation.time_s, evaluation.loss))
    return points


def training(history: History) -> list[Point]:
    """The islands' own losses: the mean over the tokens of all tasks reported since the commit before."""
    points, begin = [], 0
    for commit in history.commits:
        told = [(s.loss, s.tokens) for s in history.segments[begin : commit.segments] if s.loss is not None]
        begin = commit.segments
        tokens = sum(weight for _, weight in told)
        if tokens > 0:
            loss = sum(loss * weight for loss, weight in told) / tokens
            points.append(Point(commit.round, commit.tokens, commit.bytes_sent, commit.time_s, loss))
    return points


def traffic(history: History) -> list[Traffic]:
    """What each round sent; one that has several commits counts once."""
    newest = {commit.round: commit for commit in history.commits}
    found, before = [], (0.0, 0.0, 0.0)
    for round_, commit in sorted(newest.items()):
        now = (commit.bytes_up, commit.bytes_down, commit.bytes_inside)
        found.append(Traffic(round_, commit.bytes_sent, *(new - old for new, old in zip(now, before, strict=True))))
        before = now
    return found


def norms(history: History) -> list[Spread]:
    """Norms of the contributions to each outer step."""
    return [_spread(commit.at, commit.norms) for commit in history.commits if commit.norms]


def cosines(history: History) -> list[Spread]:
    """Cosines between any two contributions to each outer step."""
    return [_spread(commit.at, commit.cosines) for commit in history.commits if commit.cosines]


def update_norms(history: History) -> list[Spread]:
    """Norm of each outer step."""
    return [_spread(c.at, (c.update_norm,)) for c in history.commits if c.update_norm is not None]


def timeline(history: History) -> Timeline:
    """A bar for each task and each wait before one; for very many, the shares of equal steps of time."""
    islands = tuple(sorted({segment.island for segment in history.segments}))
    training, waiting = _bars(history.segments)
    if len(training) + len(waiting) <= MOST_BARS:
        return Timeline(islands=islands, training=tuple(training), waiting=tuple(waiting), step_s=0.0)
    steps = max(50, MOST_BARS // (2 * len(islands)))
    step_s = max(bar.end_s for bar in training) / steps
    trained, waited = _shares(training, step_s), _shares(waiting, step_s)
    low = [Bar(i, n * step_s, (n + 1) * step_s, 0.0, share) for (i, n), share in sorted(trained.items())]
    high = [
        Bar(i, n * step_s, (n + 1) * step_s, base := trained.get((i, n), 0.0), min(share, 1.0 - base))
        for (i, n), share in sorted(waited.items())
    ]
    return Timeline(islands=islands, training=tuple(low), waiting=tuple(high), step_s=step_s)


def thin(items: Sequence[T], values: Iterable[float], most: int = MOST_POINTS) -> list[T]:
    """At most `most` of the items, in order: of equal stretches the lowest and highest value, so that peaks stay."""
    values = list(values)
    if len(items) <= most:
        return list(items)
    stretches, keep = most // 2 - 1, {0, len(items) - 1}
    for number in range(stretches):
        stretch = range(number * len(items) // stretches, (number + 1) * len(items) // stretches)
        keep |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return [items[index] for index in sorted(keep)]


def _spread(round_: float, values: Sequence[float]) -> Spread:
    return Spread(round_, sum(values) / len(values), min(values), max(values))


def _bars(segments: Sequence[Segment]) -> tuple[list[Bar], list[Bar]]:
    """Training ends when the report comes, and waiting comes before it; none begins before the last one's end."""
    training, waiting = [], []
    until: dict[int, float] = {}
    for segment in segments:
        free_s = until.get(segment.island, 0.0)
        begin_s = max(segment.end_s - segment.seconds, free_s)
        wait_s = max(begin_s - segment.waiting_s, free_s)
        if begin_s > wait_s:
            waiting.append(Bar(segment.island, wait_s, begin_s, *WAITING_BAR))
        if segment.end_s > begin_s:
            training.append(Bar(segment.island, begin_s, segment.end_s))
        until[segment.island] = segment.end_s
    return training, waiting


def _shares(bars: Iterable[Bar], step_s: float) -> dict[tuple[int, int], float]:
    """(island, step) -> the share of the step that bars fill."""
    found: dict[tuple[int, int], float] = {}
    for bar in bars:
        for step, seconds in _cut(bar, step_s):
            found[bar.island, step] = found.get((bar.island, step), 0.0) + seconds / step_s
    return found


def _cut(bar: Bar, step_s: float) -> Iterator[tuple[int, float]]:
    step = math.floor(bar.begin_s / step_s)
    while step * step_s < bar.end_s:
        seconds = min(bar.end_s, (step + 1) * step_s) - max(bar.begin_s, step * step_s)
        if seconds > 0:
            yield step, seconds
        step += 1
