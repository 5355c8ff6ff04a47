"""Placing: what goes where, so that all have about the same to hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from diloco.messages import ModuleKey, Shape


def place(sizes: Mapping[ModuleKey, int], shards: int) -> dict[ModuleKey, int]:
    """Which shard holds each module: the largest first, each to the least loaded."""
    loads = [0] * shards
    placed: dict[ModuleKey, int] = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        shard = loads.index(min(loads))
        loads[shard] += sizes[key]
        placed[key] = shard
    return {key: placed[key] for key in sizes}


def balanced(parameters: Mapping[str, Shape], num_slots: int, unit_of: Callable[[str], str]) -> dict[str, list[str]]:
    """At most `num_slots` slots of about the same size; what has the same unit stays together."""
    sizes: dict[ModuleKey, int] = {}
    for name, shape in parameters.items():
        unit = ModuleKey(unit_of(name))
        sizes[unit] = sizes.get(unit, 0) + math.prod(shape)
    slot_of = place(sizes, num_slots)
    slots: dict[str, list[str]] = {f"whole.{i}": [] for i in range(num_slots)}
    for name in parameters:
        slots[f"whole.{slot_of[ModuleKey(unit_of(name))]}"].append(name)
    return {slot: names for slot, names in slots.items() if names}


def elements(names: Iterable[str], parameters: Mapping[str, Shape]) -> int:
    """How many numbers these parameters are."""
    return sum(math.prod(parameters[name]) for name in names)
