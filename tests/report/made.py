"""Directories of runs as train.py leaves them, with figures that can be checked by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = """\
choices:
  workload: causal_lm
  inner: adamw
name: {name}
islands: 2
rounds: 2
inner:
  lr: {lr}
  beta1: 0.9
"""


def start(time_s: float = 1.0, **more: Any) -> dict[str, Any]:
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    return {"time_s": time_s, "event": "start", "round": 0, "git_commit": "c0ffee", "versions": versions, **more}


def segment(time_s: float, island: int, loss: float | None, **more: Any) -> dict[str, Any]:
    keys = {"event": "segment", "round": 0, "island": island, "tokens": 100, "seconds": 1.0}
    return {"time_s": time_s, **keys, "inner/loss": loss, "comm/seconds_waiting": 0.0, **more}


def commit(time_s: float, done: int, *, inside: int | None = None, **more: Any) -> dict[str, Any]:
    totals = {"total/tokens": 200 * done, "total/bytes_up": 1000 * done, "total/bytes_down": 3000 * done}
    totals |= {"total/bytes_sent": (4000 + (inside or 0)) * done}
    totals |= {} if inside is None else {"total/bytes_inside": inside * done}
    outer = {"outer/update_norm": 0.5, "outer/contribution_norms": [1.0, 3.0], "outer/cosines": [0.25]}
    return {"time_s": time_s, "event": "commit", "round": done, **outer, **totals, **more}


def evaluation(time_s: float, done: int, loss: float | None) -> dict[str, Any]:
    return {"time_s": time_s, "event": "evaluation", "round": done, "eval/loss": loss}


def records(final: float = 6.0) -> list[dict[str, Any]]:
    """Two rounds of two islands, in the order in which the coordinator writes them."""
    return [
        start(defaults={"inner.lr": 0.0004, "rounds": 10}),
        evaluation(1.5, 0, 8.0),
        segment(3.0, 0, 7.0, tokens=100),
        segment(3.0, 1, 8.0, tokens=300),
        evaluation(4.0, 1, 7.0),
        commit(3.5, 1),
        segment(6.0, 0, 6.0, **{"comm/seconds_waiting": 0.5}),
        segment(6.5, 1, 7.0, **{"comm/seconds_waiting": 9.0}),
        commit(7.0, 2),
        evaluation(8.0, 2, final),
        {"time_s": 8.5, "event": "checkpoint", "round": 2, "path": "x", "seconds": 0.1},
        {"time_s": 9.0, "event": "sample", "round": 2, "text": "once upon a time"},
        {"time_s": 9.0, "event": "end", "round": 2, "status": "finished"},
    ]


def summary(name: str, loss: float = 6.0, **more: Any) -> dict[str, Any]:
    sent = {"bytes_up": 2000, "bytes_down": 6000, "bytes_sent": 8000, "bytes_data_parallel": 80_000}
    counts = {"islands": 2, "inner_steps": 5, "rounds": 2, "tokens": 400, "wall_s": 9.0, "tokens_per_s": 44.4}
    losses = {"initial_val_loss": 8.0, "val_loss": loss, "best_val_loss": loss}
    environment = {"runtime": "local", "git_commit": "c0ffee", "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    return {"name": name, "status": "finished", "reason": "", **counts, **losses, **sent, **environment, **more}


def write_run(
    folder: Path,
    told: Sequence[Mapping[str, Any]] | None = None,
    *,
    name: str = "made",
    lr: float = 0.001,
    summed: Mapping[str, Any] | None = None,
) -> Path:
    """A finished run, or with `told` one of these records; with a summary only if it is given or they end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = records() if told is None else told
    (folder / "config.yaml").write_text(CONFIG.format(name=json.dumps(name), lr=lr))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    ended = any(record["event"] == "end" for record in found)
    if summed is not None or ended:
        (folder / "summary.json").write_text(json.dumps(summed or summary(name)))
    return folder


def write_sweep(folder: Path) -> Path:
    """Three members: the second is the best, the third refused to begin and has no directory."""
    rows = []
    for number, loss in enumerate((6.0, 5.0)):
        member = f"{number}_inner.lr=0.00{number + 1}"
        write_run(folder / member, records(loss), lr=(number + 1) / 1000, summed=summary("made", loss))
        rows.append({"inner.lr": f"0.00{number + 1}", "directory": member, "status": "finished", "reason": ""})
    rows.append(
        {"inner.lr": "-1", "directory": "2_inner.lr=-1", "status": "failed", "reason": "inner.lr=-1: too small"}
    )
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "latest").symlink_to(rows[1]["directory"])
    return folder


def step(time_s: float, round_: int, clock_s: float, island: int, stale: int, **more: Any) -> dict[str, Any]:
    """An outer step on a single contribution, of two islands without a barrier."""
    outer = {"outer/contributors": [island], "outer/stalenesses": [stale], "outer/cosines": []}
    outer |= {"outer/contribution_norms": [2.0], "outer/alive": 2, "outer/participating": 1, "outer/weight": 0.5}
    return {**commit(time_s, round_), **outer, "clock_s": clock_s, **more}


def task(time_s: float, island: int, clock_s: float, clock_seconds: float, **more: Any) -> dict[str, Any]:
    """Five steps by a virtual clock."""
    return segment(time_s, island, 6.0, steps=5, clock_s=clock_s, clock_seconds=clock_seconds, **more)


def free_records() -> list[dict[str, Any]]:
    """Two rounds of two islands of which one is at a third of the other's speed, each contribution a step."""
    return [
        start(),
        {**evaluation(1.5, 0, 8.0), "clock_s": 0.0},
        task(3.0, 0, 5.0, 5.0),
        step(3.0, 1, 5.0, 0, 0, **{"total/tokens": 100, "total/rounds": 0}),
        task(3.0, 0, 11.0, 5.0, **{"comm/seconds_waiting": 1.0}),
        step(4.0, 1, 11.0, 0, 0, **{"total/tokens": 200, "total/rounds": 0}),
        task(4.0, 1, 15.0, 15.0),
        {**evaluation(4.5, 1, 7.0), "clock_s": 15.0},
        step(4.5, 1, 15.0, 1, 2, **{"total/tokens": 300, "total/rounds": 1}),
        task(5.0, 0, 16.0, 5.0),
        step(5.0, 2, 16.0, 0, 1, **{"total/tokens": 400, "total/rounds": 1}),
        task(6.0, 1, 30.0, 15.0),
        {"time_s": 6.0, "event": "stale", "round": 1, "island": 1, "staleness": 5, "message": "old", "clock_s": 30.0},
        task(6.5, 0, 32.0, 5.0, **{"comm/seconds_waiting": 11.0}),
        step(6.5, 2, 32.0, 0, 0, **{"total/tokens": 500, "total/rounds": 2}),
        {**evaluation(7.0, 2, 6.0), "clock_s": 32.0},
        {"time_s": 7.0, "event": "checkpoint", "round": 2, "path": "x", "seconds": 0.1, "clock_s": 32.0},
        {"time_s": 8.0, "event": "end", "round": 2, "status": "finished"},
    ]


LEVELS = [(first, second) for first in range(2) for second in range(2)]


def modules(rows: Sequence[tuple[int, ...]] = LEVELS) -> list[dict[str, str]]:
    """The modules of paths that share what is outside of their levels."""
    return [
        {"shared": "shared/0", **{f"level{level}": f"level{level}/{module}" for level, module in enumerate(row)}}
        for row in rows
    ]


def routing(paths: int = 4) -> dict[str, Any]:
    """Path p trains on 10 (p + 1) documents, half of them of a domain that is nearly its own."""
    by_path = []
    for path in range(paths):
        domains = [{"name": f"domain-{path}", "documents": 5 * path + 5, "share": 0.5, "of_domain": 0.875}]
        domains += [{"name": "all", "documents": path + 1, "share": 0.1, "of_domain": 0.2 + path / 1000}]
        typical = [{"domain": f"domain-{path}", "text": f"typical of {path}, {rank}"} for rank in ("first", "second")]
        by_path.append({"domains": domains, "typical": typical})
    total = paths * (paths + 1) / 2
    training = {
        "documents": [10 * (path + 1) for path in range(paths)],
        "load": [round((path + 1) / total, 4) for path in range(paths)],
        "purity": 0.5,
        "concentration": 0.75,
    }
    validation = {"documents": [path + 1 for path in range(paths)], "load": [1 / paths] * paths}
    validation |= {"purity": 0.4, "concentration": 0.6}
    return {"router": "kmeans", "warnings": [], "training": training, "validation": validation, "by_path": by_path}


def evaluated(time_s: float, done: int, perplexities: Sequence[float], **beside: float) -> dict[str, Any]:
    """The evaluation of paths with these perplexities; the whole is the mean loss, for they are equally large."""
    losses = [math.log(perplexity) for perplexity in perplexities]
    told = {f"eval/loss/{path}": loss for path, loss in enumerate(losses)}
    told |= {f"eval/load/{path}": 1 / len(losses) for path in range(len(losses))}
    told |= {f"beside/{label}": math.log(perplexity) for label, perplexity in beside.items()}
    return {**evaluation(time_s, done, sum(losses) / len(losses)), **told}


def routed_records(number: int = 4, rounds: int = 6, **begun: Any) -> list[dict[str, Any]]:
    """Paths whose perplexity falls from 400 to a hundredth of itself and more; two modules, each of half of them."""
    told = [start(**begun), evaluated(1.5, 0, [400.0] * number, dense=400.0)]
    for done in range(1, rounds + 1):
        half = [list(range(number // 2)), list(range(number // 2, number))]
        for module, contributors in enumerate(half):
            outer = {"outer/contributors": contributors, "outer/stalenesses": [0] * len(contributors)}
            outer |= {"outer/version": done, "outer/alive": 2, "outer/participating": len(contributors)}
            outer |= {"outer/contribution_norms": [1.0 + module, 2.0 + module], "outer/weight": 0.5}
            told.append({**commit(2.0 * done, done), **outer})
        told.append(evaluated(2.0 * done, done, [(4.0 + path) * rounds / done for path in range(number)], dense=9.0))
    return [*told, {"time_s": 20.0, "event": "end", "round": rounds, "status": "finished"}]


def write_routed(folder: Path, paths: int = 4, *, rows: Sequence[tuple[int, ...]] = LEVELS, **more: Any) -> Path:
    """A finished run of several paths, exported, on documents of several domains."""
    told = routed_records(paths)
    newest = next(record["eval/loss"] for record in reversed(told) if record["event"] == "evaluation")
    known = {"paths": paths, "routed_val_loss": newest, "dense_val_loss": 2.125, "data": {"routing": routing(paths)}}
    run = write_run(folder, told, summed=summary("made", newest, **{**known, **more}))
    (folder / "export").mkdir()
    (folder / "export" / "paths.json").write_text(json.dumps({"paths": modules(rows)}))
    return run
