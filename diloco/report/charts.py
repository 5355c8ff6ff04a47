"""A chart: lines over an axis each with a unit and a scale, drawn and told in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from diloco.formats import format_bytes, format_count
from diloco.report.drawing import DASHES, MUTED, Key, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

FEW_POINTS = 40  # up to so many are drawn as dots too
DENSE_POINTS = 200  # from here on the line is thin
FEW_LINES = 3  # up to so many have their range drawn too
MOST_TOLD = 12  # lines that the description names
NOTE_SIZE = 10  # of text among the lines, in points
DECADE = 10.0  # a log scale needs at least so large a ratio


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is measured, and how its ticks read."""

    label: str
    unit: str | None = None  # B for bytes, "" for counts, None for plain numbers
    whole: bool = False  # whole numbers only
    zero: bool = False  # begins at 0, or below
    log: bool = False  # where the values span a decade
    span: tuple[float, float] | None = None  # at least these values have room


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values in order of x, and the range of those that each is the mean of, where there is one."""

    key: Key
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: str = ""  # a marker: then there are only these, without a line
    weight: float = 1.0  # how much thicker than others; thinner ones have no dots


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One small chart."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    mark: tuple[float, str] | None = None  # a value of x to compare with, and what it is
    level: tuple[float, str] | None = None  # the same for y
    tell_last: bool = False  # write its last value at the end of the first line

    def panel(self) -> Panel:
        """The chart as something to draw."""
        return Panel(title=self.title, description=describe(self), draw=partial(draw, self))


def draw(chart: Chart, axes: Axes) -> None:
    """Draw on `axes` all but the title and the legend."""
    marked = [] if chart.mark is None else [chart.mark[0]]
    levels = [] if chart.level is None else [chart.level[0]]
    _scale(axes, "x", chart.x, [x for line in chart.lines for x in line.x] + marked)
    _scale(axes, "y", chart.y, [y for line in chart.lines for y in line.y] + levels)
    axes.margins(x=0.03, y=0.07)
    for line in chart.lines:
        _draw_line(line, axes, with_range=sum(bool(line.low) for line in chart.lines) <= FEW_LINES)
    if chart.tell_last and chart.lines[0].x:
        _tell_last(chart, chart.lines[0], axes)
    if chart.mark is not None:
        axes.axvline(chart.mark[0], color=MUTED, linestyle=DASHES[1], linewidth=1.2)
        _write(axes, chart.mark[1], (chart.mark[0], 0.98), axes.get_xaxis_transform(), offset=(-3, 0), rotation=90)
    if chart.level is not None:
        axes.axhline(chart.level[0], color=MUTED, linestyle=DASHES[1], linewidth=1.2)
        _write(axes, chart.level[1], (0.99, chart.level[0]), axes.get_yaxis_transform(), offset=(0, -3))
    if not any(line.x for line in chart.lines):
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set(xticks=[], yticks=[])
    if chart.y.span is not None:
        axes.update_datalim([(axes.dataLim.x0, y) for y in chart.y.span], updatex=False)
        axes.autoscale_view()
    if chart.x.zero and axes.get_xscale() == "linear":
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    if chart.y.zero and axes.get_yscale() == "linear":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def describe(chart: Chart) -> str:
    """The chart in words: where each line begins and ends."""
    told = []
    for line in [line for line in chart.lines if line.x][:MOST_TOLD]:
        if line.dots:
            mean, most = (_value(chart.y, value) for value in (sum(line.y) / len(line.y), max(line.y)))
            told.append(f"{line.key.label}: {len(line.x)}, mean {mean}, at most {most}")
            continue
        ends = [f"{_value(chart.y, line.y[i])} at {_value(chart.x, line.x[i])}" for i in (0, -1)]
        told.append(f"{line.key.label}: from {ends[0]} to {ends[1]}")
    more = len(chart.lines) - MOST_TOLD
    told += [f"and {more} more lines"] if more > 0 else []
    told += [f"{chart.mark[1]} is marked"] if chart.mark is not None else []
    told += [f"{chart.level[1]} is marked"] if chart.level is not None else []
    return f"{chart.y.label} against {chart.x.label}. {'; '.join(told) or 'Nothing yet'}."


def _draw_line(line: Line, axes: Axes, *, with_range: bool) -> None:
    if line.dots:
        axes.plot(line.x, line.y, color=line.key.colour, linestyle="", marker=line.dots, alpha=0.7)
        return
    dots = "o" if len(line.x) <= FEW_POINTS and line.weight >= 1 else ""
    width = line.weight * (1.8 if len(line.x) <= DENSE_POINTS else 1.0)
    (drawn,) = axes.plot(line.x, line.y, color=line.key.colour, linestyle=DASHES[line.key.dash], linewidth=width)
    drawn.set(marker=dots, zorder=2 + line.weight / 10)  # thick ones on top
    if line.low and with_range:
        axes.fill_between(line.x, line.low, line.high, color=line.key.colour, alpha=0.18, linewidth=0)


def _write(
    axes: Axes, text: str, at: tuple[float, float], where: Transform, *, offset: tuple[float, float], rotation: int = 0
) -> None:
    """Text left of and below a place, at a distance in points."""
    axes.annotate(
        text,
        at,
        xycoords=where,
        xytext=offset,
        textcoords="offset points",
        ha="right",
        va="top",
        rotation=rotation,
        size=NOTE_SIZE,
    )


def _tell_last(chart: Chart, line: Line, axes: Axes) -> None:
    axes.annotate(
        _value(chart.y, line.y[-1]),
        (line.x[-1], line.y[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=line.key.colour,
        size=NOTE_SIZE,
    )


def _scale(axes: Axes, which: Literal["x", "y"], axis: Axis, values: Sequence[float]) -> None:
    """Label, scale and ticks of one axis for these values."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    positive = [value for value in values if value > 0]
    ratio = max(positive) / min(positive) if positive else 1.0
    log = axis.log and ratio >= DECADE
    plot_axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log", nonpositive="mask")
        subs = (1.0, 2.0, 5.0) if ratio < DECADE**1.5 else (1.0, 3.0) if ratio < DECADE**3 else (1.0,)
        plot_axis.set_major_locator(LogLocator(subs=subs))
        plot_axis.set_minor_locator(NullLocator())
        plot_axis.set_major_formatter("{x:g}")  # not powers of ten
    else:
        plot_axis.set_major_locator(MaxNLocator(nbins=6, integer=axis.whole, steps=[1, 2, 2.5, 5, 10]))
    if axis.unit is not None:
        plot_axis.set_major_formatter(EngFormatter(axis.unit))
    plot_axis.set_label_text(f"{axis.label}, log scale" if log else axis.label)


def _value(axis: Axis, value: float) -> str:
    if axis.unit is None:
        return f"{value:.4g}"
    return format_bytes(value) if axis.unit == "B" else format_count(value)
