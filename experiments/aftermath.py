"""What faults cost a run, by its metrics: rounds, islands, and how long it took to go on."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diloco import rundir

if TYPE_CHECKING:
    from experiments.chaos import Act

TAIL_BYTES = 1 << 16
FATAL = ("kill", "node")  # of an island
GOES_ON, GONE = "goes on", "is gone"  # what a run without an end may be


def records(run: Path, *events: str) -> Iterator[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far, of these events or of all."""
    with suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        for line in file:
            with suppress(ValueError):  # the last one may be half there
                record: dict[str, Any] = json.loads(line)
                if not events or record["event"] in events:
                    yield record


def newest(run: Path) -> list[dict[str, Any]]:
    """The last of them; few, since this is asked again and again."""
    return rundir.last_records(run, tail_bytes=TAIL_BYTES)


def processes(run: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """By kind (island, shard, evaluator, driver), number and rank: what was told last of the run's processes on Ray."""
    found = {}
    for record in records(run, "process"):
        kind = record["kind"]
        found[kind, record.get(kind, 0), record.get("rank", 0)] = record
    return found


class History:
    """The lines of a run with the time of day at which each was written."""

    def __init__(self, run: Path) -> None:
        self.lines: list[tuple[float, dict[str, Any]]] = []
        offset_s = 0.0
        for record in records(run):
            if record["event"] == "start":  # one for each process that drove the run
                offset_s = record["unix_s"] - record["time_s"]
            self.lines.append((offset_s + record["time_s"], record))

    def first(self, after_s: float, event: str, island: int | None = None) -> tuple[float, dict[str, Any]] | None:
        """The first line of an event after some time, of an island (an outer step: with a part of it) or of any."""
        for at_s, record in self.lines:
            of = (None, record.get("island"), *record.get("outer/contributors", ()))
            if at_s > after_s and record["event"] == event and island in of:
                return at_s, record
        return None

    def next_commit_s(self, after_s: float) -> float | None:
        """Seconds until the next outer step is told of."""
        found = self.first(after_s, "commit")
        return None if found is None else found[0] - after_s

    def back_s(self, after_s: float, island: int) -> float | None:
        """Seconds until an island contributes again by a process that is newer. None where it does not, or has none.

        A process rather than `joined`: where the whole run returned to a checkpoint meanwhile, nobody has joined.
        """
        begun = self.first(after_s, "process", island)
        back = begun and self.first(begun[0], "commit", island)
        return None if back is None else back[0] - after_s


def went_on(run: Path, acts: Sequence[Act]) -> bool:
    """Whether all islands that were ended contribute again, and an outer step came after the last fault."""
    history = History(run)
    ended = [act for act in acts if act.kind in FATAL and act.island is not None]
    return not acts or (
        history.next_commit_s(acts[-1].unix_s) is not None
        and all(history.back_s(act.unix_s, act.island) is not None for act in ended[-3:] if act.island is not None)
    )


def told(run: Path, acts: Sequence[Act], begun_s: float, *, there: bool) -> dict[str, Any]:
    """The figures of a report. `there`: whether the process that drives the run is, where the run has no end yet."""
    history = History(run)
    ended = [(act, act.island) for act in acts if act.kind in FATAL and act.island is not None]
    commits = [history.next_commit_s(act.unix_s) for act in acts]
    back = [history.back_s(act.unix_s, island) for act, island in ended]
    events = Counter(record["event"] for at_s, record in history.lines if at_s >= begun_s)
    summary: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        if (run / "summary.json").stat().st_mtime > begun_s:  # and not of an earlier end of the same run
            summary = json.loads((run / "summary.json").read_text())
    return {
        "faults": dict(Counter(act.kind for act in acts)),
        "islands_lost": events["lost"],
        "islands_joined": events["joined"],
        "commits": events["commit"],
        "rounds_again": summary.get("rounds_again"),
        "recoveries": summary.get("recoveries"),
        "status": summary.get("status", GOES_ON if there else GONE),
        "next_commit_s": _spread(commits),
        "no_commit_after": sum(seconds is None for seconds in commits),
        "contributes_again_s": _spread(back),
        "not_back": sum(seconds is None for seconds in back),
    }


def _spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    known = [each for each in seconds if each is not None]
    if not known:
        return None
    return {"median": round(statistics.median(known), 2), "most": round(max(known), 2), "seen": len(known)}


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report, to be read."""

    def spread(name: str) -> str:
        found = report[name]
        return "-" if found is None else f"{found['median']:.1f} s in the median, {found['most']:.1f} s at most"

    faults = ", ".join(f"{count} {kind}" for kind, count in report["faults"].items()) or "none"
    none = f"; {report['missed']} more found nobody" if report["missed"] else ""
    after = f"; none after {report['no_commit_after']} of them" if report["no_commit_after"] else ""
    resume = "; diloco train resume=RUN goes on with it" if report["status"] == GONE else ""
    return [
        f"faults                   {faults}{none}",
        f"islands lost, joined     {report['islands_lost']}, {report['islands_joined']}",
        f"outer steps meanwhile    {report['commits']}",
        f"until the next one       {spread('next_commit_s')}{after}",
        f"until one contributes    {spread('contributes_again_s')}; not seen again: {report['not_back']}",
        f"returns to checkpoints   {_or_not_yet(report['recoveries'])}",
        f"rounds trained again     {_or_not_yet(report['rounds_again'])}",
        f"the run                  {report['status']}{resume}",
    ]


def _or_not_yet(value: object) -> str:
    return "in summary.json at the run's end" if value is None else str(value)
