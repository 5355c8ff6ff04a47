"""The figure of a run's paths: how well each predicts its own documents, and how much it has to read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from diloco.report.charts import NOTE_SIZE, Axis, Chart, Line
from diloco.report.drawing import DASHES, INK, MUTED, SERIES, Key, Panel
from diloco.report.figures import MANY_POINTS, ROUNDS, Figure
from diloco.report.history import Evaluation, History
from diloco.report.paths import Paths
from diloco.report.series import thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHOLE = Key(label="all, routed", colour=INK)
BOLD, THIN = 1.7, 0.7  # lines
MOST_LINES = len(SERIES)  # more paths than colours are drawn as a band
BAR = 0.4  # of the place of a path
PALE = 0.45  # validation beside training


def figure(history: History, paths: Paths) -> Figure:
    """Validation perplexity by path, with the whole and the runs beside; the loads."""
    told = paths.evaluations
    names = list(dict.fromkeys(label for evaluation in told for label in evaluation.beside))
    beside = {
        name: Key(label=f"beside: {name}", colour=_beside_colour(i), dash=1 + i % 2) for i, name in enumerate(names)
    }
    tokens = _tokens(history)
    charts: list[tuple[str, Axis, Sequence[Evaluation], Callable[[Evaluation], float]]] = [
        ("validation perplexity", Axis(label="tokens", unit="", zero=True), told, lambda e: tokens(e.round)),
        ("validation perplexity, newer half", ROUNDS, told[len(told) // 2 :], lambda e: float(e.round)),
    ]
    panels = []
    for title, axis, some, x in charts[: 2 if len(told) > MANY_POINTS else 1]:
        lines = [_line(WHOLE, [(x(e), e.loss) for e in some], BOLD), *_lines(paths, some, x)]
        lines += [_line(key, [(x(e), e.beside.get(name)) for e in some], THIN) for name, key in beside.items()]
        panels.append(Chart(title=title, x=axis, y=PERPLEXITY, lines=lines, tell_last=True).panel())
    panels += [panel] if (panel := _loads(paths)) else []
    return Figure(
        name="paths",
        heading="Paths",
        note="",
        panels=panels,
        keys=[WHOLE, *(line.key for line in _lines(paths, told, lambda e: 0.0)), *beside.values()],
    )


PERPLEXITY = Axis(label="perplexity", log=True)


def colour(paths: Paths, number: int) -> str:
    """Of what is drawn for one path."""
    return SERIES[number] if len(paths.paths) <= MOST_LINES else SERIES[0]


def _beside_colour(index: int) -> str:
    return (MUTED, SERIES[-1], SERIES[4])[index // 2 % 3]


def _tokens(history: History) -> Callable[[int], float]:
    """Those that all paths had trained on after so many rounds."""
    newest = {commit.round: commit.tokens for commit in history.commits}
    rounds = sorted(newest)
    return lambda done: newest[rounds[at - 1]] if (at := bisect_right(rounds, done)) else 0.0


def _lines(paths: Paths, told: Sequence[Evaluation], x: Callable[[Evaluation], float]) -> list[Line]:
    """One for each path; of many, the median and the range."""
    if len(paths.paths) <= MOST_LINES:
        keys = [Key(label=f"path {path.number}", colour=SERIES[path.number]) for path in paths.paths]
        found = [_line(key, [(x(e), e.by_path.get(n)) for e in told], THIN) for n, key in enumerate(keys)]
        return [line for line in found if line.x]
    shown = thin(told, [max(evaluation.by_path.values()) for evaluation in told])
    low, middle, high = (
        [_perplexity(pick(evaluation.by_path.values())) for evaluation in shown] for pick in (min, median, max)
    )
    key = Key(label=f"the median of {len(paths.paths)} paths, and their range", colour=SERIES[0])
    return [Line(key=key, x=[x(e) for e in shown], y=middle, low=low, high=high)]


def _line(key: Key, losses: Sequence[tuple[float, float | None]], weight: float) -> Line:
    known = [(at, _perplexity(loss)) for at, loss in losses if loss is not None]
    known = thin(known, [value for _, value in known])
    return Line(key=key, x=[at for at, _ in known], y=[value for _, value in known], weight=weight)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _loads(paths: Paths) -> Panel | None:
    """Bars; None where no load is known."""
    training, validation = (
        [100 * (share.load or 0.0) for share in shares]
        for shares in ([p.training for p in paths.paths], [p.validation for p in paths.paths])
    )
    if not any(training) and not any(validation):
        return None
    told = "; ".join(
        f"{what} {min(found):.1f} to {max(found):.1f} %"
        for what, found in (("training", training), ("validation", validation))
        if any(found)
    )
    title = "share of the tokens" + (", pale: held out" if any(training) else " held out")
    described = f"Shares of the tokens by path: {told}; a fair share is {100 / len(training):.1f} %."
    return Panel(title=title, description=described, draw=partial(_draw_loads, paths, training, validation))


def _draw_loads(paths: Paths, training: Sequence[float], validation: Sequence[float], axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    places = range(len(training))
    colours = [colour(paths, number) for number in places]
    if any(training):
        axes.bar([place - BAR / 2 for place in places], training, BAR, color=colours)
    axes.bar([place + BAR / 2 for place in places], validation, BAR, color=colours, alpha=PALE)
    fair = 100 / len(training)
    axes.axhline(fair, color=MUTED, linestyle=DASHES[1], linewidth=1.2)
    right = axes.get_yaxis_transform()
    axes.text(1.01, fair, "fair", transform=right, va="center", color=MUTED, size=NOTE_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set(xlabel="path", ylabel="%", xlim=(-0.6, len(training) - 0.4))
    axes.grid(visible=False, axis="x")
