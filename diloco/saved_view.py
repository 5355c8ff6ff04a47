"""What a checkpoint keeps of a `RunView`: progress, not settings; as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from diloco.counters import Counters
from diloco.messages import ModuleKey, Settled, SourceId
from diloco.progress import SourceView, Work
from diloco.views import Arrival, ModuleView, RunView


def checkpoint_name(run: RunView) -> str:
    """`round-000005` between rounds; with the furthest step where some sources are within one."""
    steps = max(s.done if s.round == run.round else run.inner_steps for s in run.sources.values())
    between = all(source.done == 0 and source.round == run.round for source in run.sources.values())
    return f"round-{run.round:06d}" + ("" if between else f"-steps-{steps:06d}")


def to_json(run: RunView) -> dict[str, Any]:
    """As it is now."""
    return {
        "round": run.round,
        "sources": [asdict(source) for source in run.sources.values()],
        "modules": {key: _module_json(module) for key, module in run.modules.items()},
        "counters": asdict(run.counters),
    }


def at_round_end(run: RunView) -> dict[str, Any]:
    """As it was when all modules had ended the last round, and no one had begun the next.

    Sources that were given tasks of the next round meanwhile stand before its first step there: what an island
    exports of a source is of that step, too.
    """
    saved = {**to_json(run), "counters": asdict(run.counters.minus(run.ahead))}
    if any(module.round != run.round for module in run.modules.values()):
        return saved  # paths that are further
    sources = []
    for source in run.sources.values():
        before = replace(source)
        if source.round < run.round:  # late: what its island has is of no round's end
            before.lose()
        elif source.round == run.round and source.done:
            before.restart(source.start)
        sources.append(asdict(before))
    modules = {}
    for key, module in run.modules.items():
        awaited = module.awaited | module.arrivals.keys()
        modules[key] = _module_json(ModuleView(version=module.version, round=module.round, awaited=awaited))
    return {**saved, "sources": sources, "modules": modules}


def load(run: RunView, saved: Mapping[str, Any]) -> None:
    """Take back what was saved, for the islands that there are now."""
    run.round = saved["round"]
    run.counters = Counters(**saved["counters"])
    run.sources = {}
    for entry in saved["sources"]:
        settled = [Settled(**told) for told in entry["settled"]]
        work = [Work(**begun) for begun in entry["work"]]
        run.sources[entry["source"]] = SourceView(**{**entry, "settled": settled, "work": work})
    for key, entry in saved["modules"].items():
        arrivals = {SourceId(int(s)): Arrival(**arrival) for s, arrival in entry["arrivals"].items()}
        awaited = {SourceId(source) for source in entry["awaited"]}
        run.modules[ModuleKey(key)] = ModuleView(**{**entry, "awaited": awaited, "arrivals": arrivals})
    run.place_sources(len(run.islands))


def _module_json(module: ModuleView) -> dict[str, Any]:
    return {**asdict(module), "awaited": sorted(module.awaited)}
