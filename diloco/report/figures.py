"""Which figures a report has: for one run its own, for several the runs laid over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diloco.formats import format_bytes
from diloco.report import series
from diloco.report.charts import Axis, Chart, Line
from diloco.report.drawing import DASHES, PANEL_INCHES, SERIES, Key, Panel
from diloco.report.history import History, amount
from diloco.report.runs import Run
from diloco.report.series import Point, Spread, Traffic, thin

ROUNDS = Axis(label="rounds", whole=True)
SENT = Axis(label="bytes sent", unit="B", zero=True, log=True)
MANY_POINTS = 5  # of a line
VIRTUAL = "Virtual time: by the clock of runtime local, where islands are as fast as they were set to be."


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Charts that belong together: a section of the page, and a PNG."""

    name: str  # of the PNG, without its ending
    heading: str
    note: str
    panels: Sequence[Panel]
    keys: Sequence[Key]
    inches: tuple[float, float] = PANEL_INCHES  # of a panel


def keys(runs: Sequence[Run]) -> list[Key]:
    """A colour for each run; after eight, another dash."""
    return [Key(label=run.label, colour=_colour(i), dash=i // len(SERIES) % len(DASHES)) for i, run in enumerate(runs)]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All but the timelines. `runs` have begun."""
    found = [_single_losses(runs[0])] if len(runs) == 1 else _compared_losses(runs)
    return [*found, _traffic(runs), _contributions(runs)]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that an axis over so many seconds has, and its seconds."""
    return ("h", 3600.0) if seconds > 3 * 3600 else ("min", 60.0) if seconds > 180 else ("s", 1.0)


def _single_losses(run: Run) -> Figure:
    names = [Key(label="validation", colour=_colour(0)), Key(label="training", colour=_colour(1))]
    points = [series.validation(run.history), series.training(run.history)]
    return Figure(
        name="loss",
        heading="Loss",
        note="Validation: the global weights on held-out text. Training: the islands' own loss on their own text,"
        f" mean over each round.{_on_virtual_time([run])}",
        panels=_losses([run], names, points, "loss", tell_last=True),
        keys=names,
    )


def _compared_losses(runs: Sequence[Run]) -> list[Figure]:
    kinds: list[tuple[str, str, str, Callable[[History], list[Point]]]] = [
        ("comparison", "Validation loss", "The global weights on held-out text, once trained.", _once_trained),
        (
            "training",
            "Training loss",
            "The islands' own loss on their own text, mean over each round.",
            series.training,
        ),
    ]
    return [
        Figure(
            name=name,
            heading=heading,
            note=note + _on_virtual_time(runs),
            panels=_losses(runs, keys(runs), [points(run.history) for run in runs], heading.lower()),
            keys=keys(runs),
        )
        for name, heading, note, points in kinds
    ]


def _once_trained(history: History) -> list[Point]:
    """Without the loss of untrained weights, beside which the differences between long lines could not be seen."""
    points = series.validation(history)
    return [p for p in points if p.tokens > 0] if len(points) > MANY_POINTS else points


def _losses(
    runs: Sequence[Run], names: Sequence[Key], points: Sequence[list[Point]], what: str, *, tell_last: bool = False
) -> list[Panel]:
    """The same losses against tokens, bytes and time, by all clocks that tell something."""
    unit, seconds = time_unit(max((p.time_s for line in points for p in line), default=0.0))
    axes: list[tuple[str, Axis, Callable[[Point], float]]] = [
        ("against tokens", Axis(label="tokens", unit="", zero=True), lambda p: p.tokens),
        ("against bytes sent", SENT, lambda p: p.bytes_sent),
        ("against wall time", Axis(label=f"wall time ({unit})", zero=True), lambda p: p.time_s / seconds),
    ]
    if _on_virtual_time(runs):
        virtual, clock_seconds = time_unit(max((p.clock_s for line in points for p in line), default=0.0))
        axis = Axis(label=f"virtual time ({virtual})", zero=True)
        axes.append(("against virtual time", axis, lambda p: p.clock_s / clock_seconds))
    known = [p.loss for line in points for p in line]
    label = f"{what} (nats/token)" if all(run.config.get("workload") == "causal_lm" for run in runs) else what
    loss = Axis(label=label, span=(min(known), max(known)) if known else None)
    panels = []
    for title, axis, x in axes:
        # What came before the first byte has no place on a scale of bytes.
        lines = [_loss_line(key, [p for p in line if axis is not SENT or p.bytes_sent > 0], x)
                 for key, line in zip(names, points, strict=True)]  # fmt: skip
        mark = _data_parallel(runs) if axis is SENT else None
        panels.append(Chart(title=title, x=axis, y=loss, lines=lines, mark=mark, tell_last=tell_last).panel())
    return panels


def _on_virtual_time(runs: Sequence[Run]) -> str:
    """What is said of it where it tells something; empty where it does not, or not all runs have it."""
    told = all(run.history.virtual for run in runs) and any(run.history.paced for run in runs)
    return f" {VIRTUAL}" if told else ""


def _loss_line(key: Key, points: list[Point], x: Callable[[Point], float]) -> Line:
    points = thin(points, [p.loss for p in points])
    return Line(key=key, x=[x(p) for p in points], y=[p.loss for p in points])


def _data_parallel(runs: Sequence[Run]) -> tuple[float, str] | None:
    """What data parallel would have sent, where that is one figure for all runs."""
    sizes = {amount(run.summary, "bytes_data_parallel") for run in runs}
    size = min(sizes)
    return (size, f"data parallel: {format_bytes(size)} in all") if len(sizes) == 1 and size > 0 else None


def _traffic(runs: Sequence[Run]) -> Figure:
    kinds: list[tuple[str, str, Callable[[Traffic], float]]] = [
        ("up, a round", "bytes from islands to store", lambda t: t.up),
        ("down, a round", "bytes from store to islands", lambda t: t.down),
    ]
    found = {run.label: series.traffic(run.history) for run in runs}
    if any(t.inside for told in found.values() for t in told):
        kinds.append(("inside islands, a round", "bytes between workers", lambda t: t.inside))

    def lines(value: Callable[[Traffic], float]) -> list[Line]:
        return [_traffic_line(key, found[key.label], value) for key in keys(runs)]

    level = _data_parallel(runs)
    total = Axis(label="bytes sent so far", unit="B", log=True)
    panels = [Chart(title="in all", x=ROUNDS, y=total, lines=lines(lambda t: t.total), level=level).panel()]
    panels += [
        Chart(title=title, x=ROUNDS, y=Axis(label=label, unit="B", zero=True), lines=lines(value)).panel()
        for title, label, value in kinds
    ]
    return Figure(
        name="bytes",
        heading="Bytes",
        note="Weights down and pseudo-gradients up, as encoded; of a lone island also what its workers send each other."
        " Evaluation and checkpoints are not counted.",
        panels=panels,
        keys=keys(runs),
    )


def _traffic_line(key: Key, told: list[Traffic], value: Callable[[Traffic], float]) -> Line:
    told = thin(told, [value(t) for t in told])
    return Line(key=key, x=[t.round for t in told], y=[value(t) for t in told])


def _contributions(runs: Sequence[Run]) -> Figure:
    kinds: list[tuple[str, str, Callable[[History], list[Spread]]]] = [
        ("norm of contributions", "norm", series.norms),
        ("cosine between contributions", "cosine", series.cosines),
        ("norm of the outer step", "norm", series.update_norms),
    ]
    panels = []
    if all(run.history.free for run in runs) and not any(c.cosines for run in runs for c in run.history.commits):
        del kinds[1]  # each outer step has a single contribution
    for title, label, spreads in kinds:
        lines = [_spread_line(key, spreads(run.history)) for key, run in zip(keys(runs), runs, strict=True)]
        panels.append(Chart(title=title, x=ROUNDS, y=Axis(label=label, zero=True), lines=lines).panel())
    return Figure(
        name="contributions",
        heading="Contributions",
        note="What the islands sent to each outer step: mean, and with up to three runs the range. A cosine near 1:"
        " they agree; near 0: each learned something else.",
        panels=panels,
        keys=keys(runs),
    )


def _spread_line(key: Key, spreads: list[Spread]) -> Line:
    spreads = thin(spreads, [s.mean for s in spreads])
    return Line(
        key=key,
        x=[s.round for s in spreads],
        y=[s.mean for s in spreads],
        low=[s.least for s in spreads],
        high=[s.most for s in spreads],
    )


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]
