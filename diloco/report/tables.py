"""The tables of a report: what came out, where the configurations differ, what it ran on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diloco import rundir
from diloco.formats import format_bytes, format_count, format_duration, format_perplexity, format_reasons
from diloco.report.drawing import Key
from diloco.report.history import number
from diloco.report.html import Cell, table
from diloco.report.runs import Run, best_of, differing, shortened

NONE = "-"
MOST_OF_A_VALUE = 120  # characters of a setting
ENVIRONMENT = ("runtime", "git_commit", "versions", "data_sha256", "weights_sha256")


def against_data_parallel(run: Run) -> str:
    """How many times less, or more, than data parallel would have sent for the same steps."""
    sent, parallel = number(run.summary, "bytes_sent"), number(run.summary, "bytes_data_parallel")
    if not sent or not parallel:
        return NONE
    return f"{parallel / sent:.3g} times less" if sent <= parallel else f"{sent / parallel:.3g} times more"


def loss_text(loss: float | None) -> str:
    """To four places, which tell runs of a sweep apart."""
    return NONE if loss is None else f"{loss:.4f}"


def _plain(key: str) -> Callable[[Run], str]:
    return lambda run: NONE if run.summary.get(key) is None else str(run.summary[key])


def _figure(key: str, form: Callable[[float], str]) -> Callable[[Run], str]:
    return lambda run: NONE if (value := number(run.summary, key)) is None else form(value)


def _contributions(run: Run) -> str:
    told = run.summary.get("contributions")
    return " / ".join(str(told.get(key, NONE)) for key in ("accepted", "rejected", "late", "stale")) if told else NONE


def _members(run: Run) -> str:
    lost, joined = (number(run.summary, key) for key in ("islands_lost", "islands_joined"))
    return NONE if lost is None or joined is None else f"{lost:.0f} / {joined:.0f}"


def _participation(run: Run) -> str:
    """Means over the outer steps: who lived, who took part, and with which share of all data."""
    told = [(c.alive, c.participating, c.weight) for c in run.history.commits]
    known = [(a, p, w) for a, p, w in told if a is not None and p is not None and w is not None]
    if not known or run.history.by_module:
        return NONE
    alive, taking, weight = (sum(values) / len(known) for values in zip(*known, strict=True))
    return f"{alive:.3g} / {taking:.3g} / {100 * weight:.0f} %"


FIGURES: Mapping[str, Callable[[Run], str]] = {
    "validation loss": lambda run: loss_text(run.val_loss),
    "paths": _plain("paths"),
    "dense beside": _figure("dense_val_loss", loss_text),
    "lowest": _figure("best_val_loss", loss_text),
    "before": _figure("initial_val_loss", loss_text),
    "perplexity": lambda run: format_perplexity(run.val_loss) if run.has_perplexity else NONE,
    "reward before": _figure("reward_before", loss_text),
    "reward": _figure("reward_after", loss_text),
    "divergence": _figure("kl", loss_text),
    "bytes sent": _figure("bytes_sent", format_bytes),
    "up": _figure("bytes_up", format_bytes),
    "down": _figure("bytes_down", format_bytes),
    "inside islands": _figure("bytes_inside", format_bytes),
    "data parallel": _figure("bytes_data_parallel", lambda sent: format_bytes(sent) if sent else NONE),
    "against data parallel": against_data_parallel,
    "tokens": _figure("tokens", format_count),
    "tokens/s": _figure("tokens_per_s", format_count),
    "wall time": _figure("wall_s", format_duration),
    "waiting": _figure("waiting_s", format_duration),
    "utilization": _figure("compute_utilization", lambda share: f"{100 * share:.0f} %"),
    "islands": _plain("islands"),
    "workers": _plain("workers"),
    "inner steps": _plain("inner_steps"),
    "rounds": _plain("rounds"),
    "parameters": _figure("parameters", format_count),
    "accepted / rejected / late / stale": _contributions,
    "rejected": lambda run: format_reasons(run.summary.get("rejected_by_reason")) or NONE,
    "lost / joined": _members,
    "alive / participating / weight": _participation,
}


def results(run: Run) -> str:
    """All figures of one run."""
    rows = [[Cell(text=name), Cell(text=text, kind="number")] for name, form in FIGURES.items()
            if (text := form(run)) != NONE]  # fmt: skip
    return table("All figures", ["figure", "value"], rows, kind="pairs")


def comparison(runs: Sequence[Run], keys: Mapping[str, Key]) -> str:
    """A row for each run, with the lowest validation loss marked; figures that none has are left out."""
    best = best_of(runs)
    names = [name for name, form in FIGURES.items() if any(form(run) != NONE for run in runs)]
    rows = []
    for run in runs:
        kind = "best" if run is best else ""
        row = [Cell(text=run.label, kind=kind, key=keys.get(run.label)), status(run)]
        for name in names:
            marked = " (best)" if run is best and name == "validation loss" else ""
            row.append(Cell(text=FIGURES[name](run) + marked, kind=f"number {kind}".strip()))
        rows.append(row)
    return table("What came out of each run", ["run", "status", *names], rows)


def status(run: Run) -> Cell:
    """How it ended."""
    return Cell(text=run.status, kind="good" if run.status == "finished" else "bad")


def settings(run: Run) -> str:
    """The keys of one run that differ from the defaults; empty where it did not say what those were."""
    if run.defaults is None:
        return ""
    rows = [
        [Cell(text=key), Cell(text=_value(run.config.get(key))), Cell(text=_value(default))]
        for key, default in run.defaults.items()
    ]
    return table("Settings that differ from the defaults", ["key", "here", "default"], rows)


def differences(runs: Sequence[Run]) -> str:
    """The keys that are not the same in all runs; empty where there are none."""
    names = differing(runs)
    rows = [
        [Cell(text=run.label), *(Cell(text=_value(run.config[key]) if key in run.config else NONE) for key in names)]
        for run in runs
    ]
    return table("Settings that differ between the runs", ["run", *names], rows) if names else ""


def environment(runs: Sequence[Run]) -> str:
    """Versions and digests: once where all runs agree, else a row for each run."""
    told = [rundir.flat({key: run.summary[key] for key in ENVIRONMENT if run.summary.get(key)}) for run in runs]
    names = list(dict.fromkeys(name for values in told for name in values))
    common = [name for name in names if len({repr(values[name]) for values in told if name in values}) == 1]
    rows = [[Cell(text=_title(name)), Cell(text=next(str(v[name]) for v in told if name in v))] for name in common]
    if len(runs) == 1:
        rows.append([Cell(text="directory"), Cell(text=str(runs[0].directory))])
    tables = [
        table(
            "The same for all runs" if len(runs) > 1 else "Versions, digests, place",
            ["what", "value"],
            rows,
            kind="pairs",
        )
    ]
    if len(runs) > 1:
        others = [name for name in names if name not in common]
        rows = [
            [Cell(text=run.label), *(Cell(text=str(values.get(name, NONE))) for name in others),
             Cell(text=str(run.directory))]
            for run, values in zip(runs, told, strict=True)
        ]  # fmt: skip
        tables.append(table("Each run", ["run", *map(_title, others), "directory"], rows))
    return "\n".join(tables)


def _title(name: str) -> str:
    return name.removeprefix("versions.").replace("_", " ")


def _value(value: Any) -> str:
    return shortened(value if isinstance(value, str) and value else json.dumps(value), MOST_OF_A_VALUE)
