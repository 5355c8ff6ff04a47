"""The timeline of a run's islands: when each trained and waited, what befell it, and what the run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from diloco.formats import format_duration
from diloco.report import drawing, series
from diloco.report.drawing import DASHES, GRID, INK, MUTED, SERIES, Key, Panel
from diloco.report.figures import VIRTUAL, Figure, time_unit
from diloco.report.history import Evaluation, History, Mark
from diloco.report.runs import Run
from diloco.report.series import Bar, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING = Key(label="training", colour=SERIES[0], box=True)
WAITING = Key(label="waiting", colour=drawing.WAITING, box=True)
WIDTH_INCHES = 12.5
MOST_ROW_NAMES = 16
MOST_TICKS = 300  # marks in one row
HEIGHT = 0.74  # of a bar, in rows
EVENTS = {"lost": ("X", SERIES[1]), "joined": ("^", SERIES[2])}  # marker and colour


def timeline(run: Run, name: str) -> Figure | None:
    """The run's timeline, or None before the first task."""
    bars = series.timeline(run.history)
    if not bars.islands:
        return None
    rows = len(bars.islands) + 2
    inches = (WIDTH_INCHES, min(0.9 + 0.32 * rows, 2.5 + 0.13 * rows))
    panel = Panel(title="", description=_describe(run, bars), draw=partial(_draw, run.history, bars))
    notes = [f"The height of a bar is its share of {bars.step_s:.3g} seconds."] if bars.step_s else []
    notes += [VIRTUAL] if bars.virtual else []
    return Figure(
        name=name, heading=run.label, note=" ".join(notes), panels=[panel], keys=[TRAINING, WAITING], inches=inches
    )  # fmt: skip


def _describe(run: Run, bars: Timeline) -> str:
    told = []
    for what, found in ("trained", bars.training), ("waited", bars.waiting):
        seconds = sum((bar.end_s - bar.begin_s) * (bar.share if bars.step_s else 1.0) for bar in found)
        told.append(f"{what} for {format_duration(seconds)}")
    events = [mark.event for mark in run.history.marks]
    told += [f"{events.count(event)} {event}" for event in EVENTS if event in events]
    clock = "by the virtual clock" if bars.virtual else "in sum"
    return f"Timeline of {len(bars.islands)} islands: {clock} they {', '.join(told)}."


def _draw(history: History, bars: Timeline, axes: Axes) -> None:
    end_s = history.clock_s if bars.virtual else history.wall_s
    unit, seconds = time_unit(end_s)
    row = {island: number for number, island in enumerate(bars.islands)}
    for key, found in (WAITING, bars.waiting), (TRAINING, bars.training):
        _draw_bars(axes, found, row, key.colour, seconds)
    last = len(bars.islands)
    ticks = {
        last: [_when(e, bars) / seconds for e in history.evaluations],
        last + 1: [_when(m, bars) / seconds for m in history.marks if m.event == "checkpoint"],
    }
    for number, times in ticks.items():
        shown = series.thin(times, times, MOST_TICKS)
        axes.plot(shown, [number] * len(shown), linestyle="", marker="|", color=INK, markersize=7)
    for mark in history.marks:
        if mark.event in EVENTS and mark.island in row:
            marker, colour = EVENTS[mark.event]
            at = _when(mark, bars) / seconds, row[mark.island]
            axes.plot(*at, marker, color=colour, markeredgecolor=drawing.PAPER, markersize=10)
    for mark in [mark for mark in history.marks if mark.event == "start"][1:]:
        axes.axvline(_when(mark, bars) / seconds, color=MUTED, linestyle=DASHES[1], linewidth=1.2)
    every = -(-len(bars.islands) // MOST_ROW_NAMES)
    named = {number: f"island {island}" for island, number in row.items() if number % every == 0}
    named |= {last: "evaluations", last + 1: "checkpoints"}
    axes.set_yticks(list(named), list(named.values()))
    axes.set_ylim(last + 1.6, -0.6)
    axes.set_xlim(0, end_s / seconds or 1.0)
    axes.set_xlabel(f"{'virtual' if bars.virtual else 'wall'} time ({unit})")
    axes.grid(visible=False, axis="y")
    axes.axhline(last - 0.5, color=GRID, linewidth=1)


def _when(told: Evaluation | Mark, bars: Timeline) -> float:
    return told.clock_s if bars.virtual else told.time_s


def _draw_bars(axes: Axes, bars: Sequence[Bar], row: dict[int, int], colour: str, seconds: float) -> None:
    """One path for all bars: thousands of elements would make the page heavy."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not bars:
        return
    corners: list[tuple[float, float]] = []
    for bar in bars:
        bottom = row[bar.island] + HEIGHT / 2 - HEIGHT * bar.base  # rows count downwards
        top = bottom - HEIGHT * bar.share
        begin, end = bar.begin_s / seconds, bar.end_s / seconds
        corners += [(begin, bottom), (end, bottom), (end, top), (begin, top), (begin, bottom)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(bars)
    axes.add_patch(PathPatch(Path(corners, codes), facecolor=colour, edgecolor="none"))
