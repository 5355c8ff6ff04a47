"""What else a workload measures: reward, divergence, accuracy and the like over rounds, and a table of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diloco.formats import format_loss
from diloco.report.charts import Axis, Chart, Line
from diloco.report.drawing import Key
from diloco.report.figures import ROUNDS, Figure, keys
from diloco.report.history import amount, number
from diloco.report.html import Cell, table
from diloco.report.runs import Run

# metric of `Workload.evaluate` -> how its axis reads; the others are in metrics.jsonl only
SHOWN = {
    "reward": "mean reward",
    "kl": "divergence (nats)",
    "accuracy": "pairs told apart",
    "margin": "margin (nats or score)",
    "length": "tokens an answer",
    "diversity": "different pairs of tokens",
}
ARROW = " \N{RIGHTWARDS ARROW} "


def figures(runs: Sequence[Run]) -> list[Figure]:
    """One with a panel for each metric that a run has; none where all have losses alone."""
    told = {name: _lines(runs, name) for name in SHOWN}
    panels = [
        Chart(title=name, x=ROUNDS, y=Axis(label=SHOWN[name]), lines=lines).panel()
        for name, lines in told.items()
        if any(line.y for line in lines)
    ]
    front = [_over(key, run) for key, run in zip(keys(runs), runs, strict=True)]
    if any(line.x for line in front):
        x, y = Axis(label=SHOWN["kl"], zero=True), Axis(label=SHOWN["reward"])
        panels.insert(0, Chart(title="reward over divergence", x=x, y=y, lines=front).panel())
    if not panels:
        return []
    note = (
        "Of the global weights on held-out rows. A policy that is paid for a while drifts from where it began: compare"
        " rewards at equal divergence, and read the samples."
    )
    return [Figure(name="measures", heading="Measures", note=note, panels=panels, keys=keys(runs))]


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Reward and divergence at a glance."""
    after = number(run.summary, "reward_after")
    if after is None:
        return []
    before, moved = (format_loss(number(run.summary, key)) for key in ("reward_before", "kl"))
    return [("reward", f"{before}{ARROW}{format_loss(after)}", f"{moved} nats from the reference")]


def samples(rows: Sequence[Mapping[str, str]]) -> str:
    """What the model wrote, side by side with what it wrote before."""
    head = list(rows[0])
    return table("Samples", head, [[Cell(text=str(row.get(name, ""))) for name in head] for row in rows], kind="pairs")


def _lines(runs: Sequence[Run], name: str) -> list[Line]:
    found = []
    for key, run in zip(keys(runs), runs, strict=True):
        points = [(e.round, e.measures[name]) for e in run.history.evaluations if name in e.measures]
        found.append(Line(key=key, x=[float(x) for x, _ in points], y=[y for _, y in points]))
    return found


def _over(key: Key, run: Run) -> Line:
    told = [e.measures for e in run.history.evaluations if "kl" in e.measures and "reward" in e.measures]
    return Line(key=key, x=[amount(one, "kl") for one in told], y=[amount(one, "reward") for one in told])
