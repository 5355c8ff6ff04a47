"""Who contributed how often, how stale, and with what weight: the figures and the table of runs without a barrier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diloco.formats import format_count, format_duration
from diloco.report import series
from diloco.report.charts import Axis, Chart, Line
from diloco.report.drawing import MUTED, SERIES, Key
from diloco.report.figures import ROUNDS, Figure, keys, time_unit
from diloco.report.history import Commit, History
from diloco.report.html import Cell, table
from diloco.report.runs import Run
from diloco.report.series import thin

REFUSED = "refused"


class Contribution(NamedTuple):
    """One of an island, when it counted or was refused."""

    island: int
    time_s: float
    clock_s: float
    staleness: int


def contributions(history: History) -> list[Contribution]:
    """All that counted, in order; one that is in several fragments counts once in each."""
    return [
        Contribution(island, commit.time_s, commit.clock_s, staleness)
        for commit in history.commits
        for island, staleness in zip(commit.contributors, commit.staleness, strict=False)
    ]


def told(history: History) -> bool:
    """Whether there is anything to tell that a barrier does not say already."""
    return history.free or bool(history.refusals) or any(any(commit.staleness) for commit in history.commits)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Staleness where there is any, and participation where it is not always that of all."""
    found = [_staleness(runs)] if any(told(run.history) for run in runs) else []
    return found + ([_participation(runs)] if any(_uneven(run.history) for run in runs) else [])


def _uneven(history: History) -> bool:
    if history.by_module:
        return False  # who contributes are paths, to their own modules alone
    known = [(c.alive, c.participating) for c in history.commits if c.alive is not None]
    return history.free and bool(known) or any(alive != taking for alive, taking in known) or len(set(known)) > 1


def _staleness(runs: Sequence[Run]) -> Figure:
    virtual = all(run.history.virtual for run in runs) and any(run.history.paced for run in runs)
    unit, seconds = time_unit(max(run.history.clock_s if virtual else run.history.wall_s for run in runs))
    time = Axis(label=f"{'virtual' if virtual else 'wall'} time ({unit})", zero=True)

    def when(one: Contribution) -> float:
        return (one.clock_s if virtual else one.time_s) / seconds

    groups = _by_island(runs[0]) if len(runs) == 1 else _by_run(runs)
    dots, sums = [], []
    for key, found in groups:
        shown = thin(found, [one.staleness for one in found])
        dots.append(_dots(key, shown, when, "o"))
        counted = thin(list(enumerate(found, 1)), range(len(found)))
        sums.append(Line(key=key, x=[when(one) for _, one in counted], y=[float(count) for count, _ in counted]))
    refused = [Contribution(r.island, r.time_s, r.clock_s, r.staleness) for run in runs for r in run.history.refusals]
    names = [key for key, _ in groups]
    if refused:
        names.append(Key(label=REFUSED, colour=MUTED, box=True))
        dots.append(_dots(names[-1], thin(refused, [one.staleness for one in refused]), when, "x"))
    staleness = Axis(label="versions", zero=True, whole=True)
    count = Axis(label="contributions", zero=True, whole=True)
    return Figure(
        name="staleness",
        heading="Staleness",
        note="A contribution's staleness is how many versions of the global weights were made between those that it"
        " started from and its own outer step.",
        panels=[
            Chart(title="staleness of each contribution", x=time, y=staleness, lines=dots).panel(),
            Chart(title="contributions so far", x=time, y=count, lines=sums).panel(),
        ],
        keys=names,
    )


def _by_island(run: Run) -> list[tuple[Key, list[Contribution]]]:
    """Of many islands all in one: there are not as many colours."""
    found = contributions(run.history)
    islands = sorted({one.island for one in found})
    if len(islands) > len(SERIES):
        return [(Key(label="all islands", colour=SERIES[0], box=True), found)]
    return [
        (Key(label=f"island {island}", colour=SERIES[i], box=True), [one for one in found if one.island == island])
        for i, island in enumerate(islands)
    ]


def _by_run(runs: Sequence[Run]) -> list[tuple[Key, list[Contribution]]]:
    return [(key, contributions(run.history)) for key, run in zip(keys(runs), runs, strict=True)]


def _dots(key: Key, found: Sequence[Contribution], when: Callable[[Contribution], float], marker: str) -> Line:
    return Line(key=key, x=[when(one) for one in found], y=[float(one.staleness) for one in found], dots=marker)


def _participation(runs: Sequence[Run]) -> Figure:
    islands, share = Axis(label="islands", zero=True, whole=True), Axis(label="share", zero=True, span=(0.0, 1.0))
    kinds: list[tuple[str, Axis, Callable[[History], list[tuple[float, float | None]]]]] = [
        ("alive", islands, lambda history: _by_step(history, lambda c: c.alive)),
        ("participating in a step", islands, lambda history: _by_step(history, lambda c: c.participating)),
        ("participating in a round", islands, in_rounds),
        ("contributing weight", share, lambda history: _by_step(history, lambda c: c.weight)),
    ]
    if not any(run.history.free for run in runs):
        del kinds[2]  # a round has one step
    panels = []
    for title, label, values in kinds:
        lines = [_line(key, values(run.history)) for key, run in zip(keys(runs), runs, strict=True)]
        panels.append(Chart(title=title, x=ROUNDS, y=label, lines=lines).panel())
    return Figure(
        name="participation",
        heading="Participation",
        note="Who lives need not take part. Of each outer step: islands that lived; those that had a part in it; the"
        " examples behind these, as a share of the examples behind all.",
        panels=panels,
        keys=keys(runs),
    )


def in_rounds(history: History) -> list[tuple[float, float | None]]:
    """How many islands had a part in any of the outer steps of each round."""
    found: dict[int, set[int]] = {}
    for commit in history.commits:
        found.setdefault(commit.round, set()).update(commit.contributors)
    return [(float(round_), float(len(islands))) for round_, islands in sorted(found.items())]


def _by_step(history: History, value: Callable[[Commit], float | None]) -> list[tuple[float, float | None]]:
    return [(at, value(commit)) for at, commit in series.places(history)]


def _line(key: Key, values: list[tuple[float, float | None]]) -> Line:
    found = [(at, value) for at, value in values if value is not None]
    found = thin(found, [known for _, known in found])
    return Line(key=key, x=[at for at, _ in found], y=[known for _, known in found])


def by_island(run: Run) -> str:
    """A table with a row for each island of one run; empty where a barrier makes all alike."""
    history = run.history
    if not told(history):
        return ""
    bars = series.timeline(history)
    found = contributions(history)
    steps, tokens, rows = Counter[int](), Counter[int](), []
    for segment in history.segments:
        steps[segment.island] += int(segment.steps)
        tokens[segment.island] += int(segment.tokens)
    for island in sorted({one.island for one in found} | set(bars.islands)):
        own = [one.staleness for one in found if one.island == island]
        refused = sum(refusal.island == island for refusal in history.refusals)
        cells = [
            format_count(steps[island]),
            format_count(tokens[island]),
            str(len(own)),
            f"{100 * len(own) / len(found):.0f} %" if found else "-",
            f"{sum(own) / len(own):.1f}" if own else "-",
            str(max(own)) if own else "-",
            str(refused),
            *(format_duration(_seconds(kind, island, bars)) for kind in (bars.training, bars.waiting)),
        ]
        rows.append([Cell(text=f"island {island}"), *(Cell(text=text, kind="number") for text in cells)])
    clock = "virtual time" if bars.virtual else "wall time"
    names = ["steps", "tokens", "contributions", "share", "mean staleness", "highest", REFUSED, "trained", "waited"]
    return table(f"What each island did; trained and waited in {clock}", ["island", *names], rows)


def _seconds(kind: Sequence[series.Bar], island: int, bars: series.Timeline) -> float:
    return sum((b.end_s - b.begin_s) * (b.share if bars.step_s else 1.0) for b in kind if b.island == island)
