"""What is drawn, as numbers: pure functions from a history to points and bars."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from diloco.report.history import Commit, History, Segment

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
    clock_s: float = 0.0


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
    virtual: bool = False  # by the runtime's clock, not that on the wall


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
            at = evaluation.time_s, evaluation.loss, evaluation.clock_s
            points.append(Point(evaluation.round, tokens, bytes_sent, *at))
    return points


def training(history: History) -> list[Point]:
    """The islands' own losses: the mean over the tokens of all tasks reported since the commit before.

    Without a barrier: since the round before, for a single contribution is of one island, on text of its own.
    """
    points, begin = [], 0
    for commit in {commit.place: commit for commit in history.commits}.values():
        told = [(s.loss, s.tokens) for s in history.segments[begin : commit.segments] if s.loss is not None]
        begin = commit.segments
        tokens = sum(weight for _, weight in told)
        if tokens > 0:
            loss = sum(loss * weight for loss, weight in told) / tokens
            points.append(Point(commit.round, commit.tokens, commit.bytes_sent, commit.time_s, loss, commit.clock_s))
    return points


def traffic(history: History) -> list[Traffic]:
    """What each round sent; one that has several commits counts once, and rounds without any have equal parts."""
    newest = {commit.round: commit for commit in history.commits}
    found, last, before = [], 0, (0.0, 0.0, 0.0)
    for round_, commit in sorted(newest.items()):
        now = (commit.bytes_up, commit.bytes_down, commit.bytes_inside)
        parts = [(new - old) / max(1, round_ - last) for new, old in zip(now, before, strict=True)]
        found.append(Traffic(round_, commit.bytes_sent, *parts))
        last, before = round_, now
    return found


def norms(history: History) -> list[Spread]:
    """Norms of the contributions to each outer step."""
    return _spreads(history, lambda commit: commit.norms)


def cosines(history: History) -> list[Spread]:
    """Cosines between any two contributions to each outer step."""
    return _spreads(history, lambda commit: commit.cosines)


def update_norms(history: History) -> list[Spread]:
    """Norm of each outer step; where modules step apart, the mean and the range over them."""
    return _spreads(history, lambda commit: () if commit.update_norm is None else (commit.update_norm,))


def places(history: History) -> list[tuple[float, Commit]]:
    """Where on an axis of rounds each outer step stands: those of the same round and fragment have equal parts of it.

    With a barrier there is one, which stands at its end.
    """
    many = Counter(commit.place for commit in history.commits)
    seen: Counter[tuple[int, int]] = Counter()
    found = []
    for commit in history.commits:
        seen[commit.place] += 1
        missing = 1 - seen[commit.place] / many[commit.place]
        found.append((commit.at - missing, commit))
    return found


def timeline(history: History) -> Timeline:
    """A bar for each task and each wait before one; for very many, the shares of equal steps of time."""
    islands = tuple(sorted({segment.island for segment in history.segments}))
    virtual = history.paced
    training, waiting = _bars([_by_clock(segment) for segment in history.segments] if virtual else history.segments)
    if len(training) + len(waiting) <= MOST_BARS:
        bars = {"training": tuple(training), "waiting": tuple(waiting)}
        return Timeline(islands=islands, **bars, step_s=0.0, virtual=virtual)
    steps = max(50, MOST_BARS // (2 * len(islands)))
    step_s = max(bar.end_s for bar in training) / steps
    trained, waited = _shares(training, step_s), _shares(waiting, step_s)
    low = [Bar(i, n * step_s, (n + 1) * step_s, 0.0, share) for (i, n), share in sorted(trained.items())]
    high = [
        Bar(i, n * step_s, (n + 1) * step_s, base := trained.get((i, n), 0.0), min(share, 1.0 - base))
        for (i, n), share in sorted(waited.items())
    ]
    return Timeline(islands=islands, training=tuple(low), waiting=tuple(high), step_s=step_s, virtual=virtual)


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


def _spreads(history: History, values: Callable[[Commit], tuple[float, ...]]) -> list[Spread]:
    """Of the outer steps one by one, or where the modules of a round step apart, of all of them together."""
    if not history.by_module:
        return [_spread(at, found) for at, commit in places(history) if (found := values(commit))]
    together: dict[tuple[int, int], list[Commit]] = {}
    for commit in history.commits:
        together.setdefault(commit.place, []).append(commit)
    told = [(commits[0].at, [v for commit in commits for v in values(commit)]) for commits in together.values()]
    return [_spread(at, found) for at, found in sorted(told) if found]


def _spread(round_: float, values: Sequence[float]) -> Spread:
    return Spread(round_, sum(values) / len(values), min(values), max(values))


def _by_clock(segment: Segment) -> Segment:
    return segment._replace(end_s=segment.clock_s, seconds=segment.clock_seconds or 0.0)


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
