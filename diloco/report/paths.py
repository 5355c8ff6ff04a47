"""What is known of each path of a run: its modules, what the router sends to it, how well it predicts that."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diloco.report.history import Evaluation, number
from diloco.report.runs import Run

SHARED = "shared"


class Share(NamedTuple):
    """Documents that come to a path, and their share of all tokens."""

    documents: int | None = None
    load: float | None = None


class Domain(NamedTuple):
    """A domain that a path trains on."""

    name: str
    share: float  # of the path's documents
    of_domain: float  # of the domain's documents, the share that this path has


class Document(NamedTuple):
    """How a document begins."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Path:
    """One of several paths of a run."""

    number: int
    modules: Sequence[str]  # in the order of Paths.levels
    training: Share
    validation: Share
    first: float | None  # validation loss of the untrained path
    newest: float | None
    best_round: int | None  # after which it counts, with early stopping
    domains: Sequence[Domain]
    typical: Sequence[Document]


@dataclass(frozen=True, kw_only=True)
class Paths:
    """All paths of a run, and the router."""

    levels: Sequence[str]  # slots of which paths have different modules, fragments taken together
    sizes: Sequence[int]  # how many modules each of them has
    shared: bool  # whether all paths have a module in common
    paths: Sequence[Path]
    router: str  # empty where it is not known
    purity: tuple[float, float] | None  # in training and validation; None where there is one domain
    concentration: tuple[float, float] | None
    evaluations: Sequence[Evaluation]  # those that tell of paths


def paths_of(run: Run) -> Paths | None:
    """None where the run has not several."""
    if not run.modules:
        return None
    rows = [{slot.partition(".")[0]: module for slot, module in row.items()} for row in run.modules]
    slots = list(rows[0])
    used = {slot: list(dict.fromkeys(row.get(slot, "") for row in rows)) for slot in slots}
    levels = [slot for slot in slots if len(used[slot]) > 1]
    routing = _routing(run)
    told = [evaluation for evaluation in run.history.evaluations if evaluation.by_path]
    found = [
        _path(index, [row.get(level, "").rpartition("/")[2] for level in levels], routing, told)
        for index, row in enumerate(rows)
    ]
    known = len({domain.name for path in found for domain in path.domains}) > 1
    purity, concentration = (_both(routing, name) if known else None for name in ("purity", "concentration"))
    return Paths(
        levels=levels,
        sizes=[len(used[level]) for level in levels],
        shared=len(levels) < len(slots),
        paths=found,
        router=str(routing.get("router", "")),
        purity=purity,
        concentration=concentration,
        evaluations=told,
    )


def spoken(level: str) -> str:
    """The name of a level as it reads in a table: `level 0`."""
    return re.sub(r"(\D)(\d+)$", r"\1 \2", level)


def _routing(run: Run) -> Mapping[str, Any]:
    """What the run's data says of it at its end, or said at its start."""
    data = run.summary.get("data")
    found = data.get("routing") if isinstance(data, dict) else run.history.start.get("routing")
    return found if isinstance(found, dict) else {}


def _path(index: int, modules: Sequence[str], routing: Mapping[str, Any], told: Sequence[Evaluation]) -> Path:
    losses = [evaluation.by_path[index] for evaluation in told if index in evaluation.by_path]
    validation = _share(routing, "validation", index)
    if validation.load is None and told:
        validation = Share(None, told[-1].loads.get(index))
    of_path = _item(routing.get("by_path"), index) or {}
    return Path(
        number=index,
        modules=modules,
        training=_share(routing, "training", index),
        validation=validation,
        first=told[0].by_path.get(index) if told and told[0].round == 0 else None,
        newest=losses[-1] if losses else None,
        best_round=int(told[-1].best_rounds[index]) if told and index in told[-1].best_rounds else None,
        domains=[Domain(str(d["name"]), float(d["share"]), float(d["of_domain"])) for d in of_path.get("domains", [])],
        typical=[Document(str(d["domain"]), str(d["text"])) for d in of_path.get("typical", [])],
    )


def _share(routing: Mapping[str, Any], kind: str, index: int) -> Share:
    part = routing.get(kind, {})
    return Share(_item(part.get("documents"), index), _item(part.get("load"), index))


def _item(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and index < len(values) else None


def _both(routing: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    found = [number(routing.get(kind, {}), name) for kind in ("training", "validation")]
    return None if found[0] is None or found[1] is None else (found[0], found[1])
