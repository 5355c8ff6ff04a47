"""An objective by its name and settings, as a configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from diloco.workloads.objectives import OBJECTIVES, Objective


def chosen_objective(name: str, settings: Mapping[str, object]) -> Objective:
    """The objective `workload.objective` with `workload.settings`. Raises ValueError for what there is not."""
    known = OBJECTIVES.get(name)
    if known is None:
        raise ValueError(f"workload.objective={name} is unknown: choose {', '.join(OBJECTIVES)}")
    names = sorted(field.name for field in fields(known))
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(
            f"workload.settings has {unknown[0]}, which workload.objective={name} has not: it has "
            f"{', '.join(names) or 'none'}"
        )
    return known(**settings)
