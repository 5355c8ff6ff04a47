"""What a checkpoint keeps of a `RunView`: progress, not settings; as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from diloco import seats
from diloco.counters import Counters
from diloco.messages import IslandId, ModuleKey, Settled, SourceId
from diloco.pool import Pool, Stretch
from diloco.progress import Arrival, BestRound, ModuleView, SourceView, Work
from diloco.views import RunView


def checkpoint_name(run: RunView) -> str:
    """`round-000005` between rounds; with the furthest step where some sources are within one."""
    if run.pool is not None:
        return (
            f"round-{run.round:06d}-steps-{run.pool.done - run.round * run.inner_steps * len(run.shard_examples):06d}"
        )
    steps = max(s.done if s.round == run.round else run.inner_steps for s in run.sources.values())
    between = all(source.done == 0 and source.round == run.round for source in run.sources.values())
    return f"round-{run.round:06d}" + ("" if between else f"-steps-{steps:06d}")


def to_json(run: RunView, now_s: float = 0.0) -> dict[str, Any]:
    """As it is now, by the runtime's clock."""
    return {
        "now_s": now_s,
        "holds": {number: island.holds for number, island in run.islands.items()},
        "turn_ends_s": run.turn_ends_s,
        "round_ends_s": run.round_ends_s,
        "pushes_s": list(run.pushes_s),
        "pool": None if run.pool is None else asdict(run.pool),
        "gathered": {island: ready_s if ready_s < math.inf else None for island, ready_s in run.gathered.items()},
        "round": run.round,
        "sources": [asdict(source) for source in run.sources.values()],
        "modules": {key: _module_json(module) for key, module in run.modules.items()},
        "counters": asdict(run.counters),
        "norms": {key: list(logs) for key, logs in run.norms.logs.items()},
        "best": {path: asdict(best) for path, best in run.best.items()},
    }


def at_round_end(run: RunView) -> dict[str, Any]:
    """As it was when all modules had ended the last round, and no one had begun the next.

    Sources that were given tasks of the next round meanwhile stand before its first step there: what an island
    exports of a source is of that step, too.
    """
    saved = {**to_json(run), "counters": asdict(run.counters.minus(run.ahead))}
    if any(module.round != run.round for module in run.modules.values()):
        return {**saved, "holds": {}}  # paths that are further
    sources = []
    for source in run.sources.values():
        before = replace(source)
        if source.round < run.round:  # late: what its island has is of no round's end
            before.lose()
        elif source.round == run.round and source.done:
            before.restart(source.start)
        before.heard = min(before.heard, [before.attempt, run.round])  # what it has sent of the next one comes again
        sources.append(asdict(before))
    modules = {}
    for key, module in run.modules.items():
        awaited = module.awaited | {source for _, source in module.arrivals}
        modules[key] = _module_json(ModuleView(version=module.version, round=module.round, awaited=awaited))
    return {**saved, "sources": sources, "modules": modules, "holds": {}}


def load(run: RunView, saved: Mapping[str, Any]) -> None:
    """Take back what was saved, for the islands that there are now."""
    run.round = saved["round"]
    run.counters = Counters(**saved["counters"])
    run.norms.logs = {ModuleKey(key): list(logs) for key, logs in saved["norms"].items()}
    run.best = {int(path): BestRound(**best) for path, best in saved["best"].items()}
    run.sources = {}
    for entry in saved["sources"]:
        settled = [Settled(**told) for told in entry["settled"]]
        work = [Work(**begun) for begun in entry["work"]]
        by_fragment = {name: {int(k): v for k, v in entry[name].items()} for name in ("sent", "got")}
        run.sources[entry["source"]] = SourceView(**{**entry, "settled": settled, "work": work, **by_fragment})
    for key, entry in saved["modules"].items():
        arrivals = {(round_, SourceId(s)): Arrival(**arrival) for round_, s, arrival in entry["arrivals"]}
        awaited = {SourceId(source) for source in entry["awaited"]}
        run.modules[ModuleKey(key)] = ModuleView(**{**entry, "awaited": awaited, "arrivals": arrivals})
    if run.pool is not None and saved["pool"] is not None:
        returned = [Stretch(**stretch) for stretch in saved["pool"]["returned"]]
        run.pool = Pool(**{**saved["pool"], "returned": returned})
        run.pool.left = run.total_steps - run.pool.done - sum(s.steps for s in returned) - run.pool.under_way
    run.turn_ends_s = {int(turn): end_s for turn, end_s in saved["turn_ends_s"].items()}
    run.round_ends_s = saved["round_ends_s"]
    run.pushes_s.extend(saved["pushes_s"])
    waiting = {IslandId(int(i)): math.inf if ready_s is None else ready_s for i, ready_s in saved["gathered"].items()}
    run.gathered = {island: ready_s for island, ready_s in waiting.items() if island < len(run.islands)}
    seats.place(run, len(run.islands))
    for number, held in saved["holds"].items():
        if int(number) in run.islands and not run.moving:
            run.islands[IslandId(int(number))].holds = dict(held)


def _module_json(module: ModuleView) -> dict[str, Any]:
    arrivals = [(round_, source, asdict(arrival)) for (round_, source), arrival in module.arrivals.items()]
    return {**asdict(replace(module, arrivals={})), "awaited": sorted(module.awaited), "arrivals": arrivals}
