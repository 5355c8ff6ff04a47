"""Layouts: which parameters form a slot, and which modules fill the slots of a path.

Slots are made of canonical parameter names, never of nn.Modules, and anything but an exact partition
is refused: a parameter in no slot would silently never be synchronised.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from diloco.messages import ModuleKey, Modules, Shape, SlotName
from diloco.placing import balanced, elements, place


@dataclass(kw_only=True)
class Layout(ABC):
    """Fields are settings; `build` does the splitting."""

    def num_paths(self) -> int:
        """How many paths there will be, by the settings alone."""
        return 1

    def check_depth(self, blocks: int) -> None:
        """Raise ValueError where a model of so many blocks cannot be cut so; `build` says the same, but later."""
        return None

    @abstractmethod
    def build(self, parameters: Mapping[str, Shape], shards: int) -> Modules:
        """Slots, paths and the shard of each module, for trainable `parameters` (name -> shape).

        Raises ValueError where the slots are no partition.
        """


@dataclass(kw_only=True)
class Whole(Layout):
    """One path that holds everything. Without `patterns`, one slot for each shard of the store, balanced by size.

    `patterns` are regular expressions over parameter names (`re.search`), one slot each, which must match
    every parameter exactly once.
    """

    patterns: list[str] = field(default_factory=list)
    keep_blocks: bool = False  # without patterns: no block of the model is cut; set where replica=fsdp2

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"layout.patterns: {pattern!r} is no regular expression: {error}") from error

    def build(self, parameters: Mapping[str, Shape], shards: int) -> Modules:
        """One module a slot, each with index 0."""
        if self.patterns:
            names = split(parameters, {f"slot{i}": pattern for i, pattern in enumerate(self.patterns)})
        else:
            names = balanced(parameters, shards, block_of if self.keep_blocks else str)
        return single_path(names, parameters, shards)


class Cut(Enum):
    """How a model is cut into fragments."""

    strided = "strided"  # block i of the model goes to fragment i modulo their number
    sequential = "sequential"  # blocks that follow each other stay together
    balanced = "balanced"  # whole parameters, wherever they lie, so that all fragments have about the same bytes


class Outside(Enum):
    """Where the parameters outside the blocks go: embedding, head, final norm."""

    own = "own"  # each matrix is a fragment; what is no matrix goes with the last of them
    balanced = "balanced"  # to the fragments of blocks, the largest to the smallest


@dataclass(kw_only=True)
class Fragments(Layout):
    """Streaming DiLoCo's fragments (arXiv:2501.18512, section 2.2): slots that are exchanged one after the other.

    Each fragment is spread over all shards of the store, so that its exchange uses the links of all of them.
    """

    layers_per_fragment: int = 3  # transformer blocks
    cut: Cut = Cut.strided
    count: int = 0  # fragments in place of layers_per_fragment; cut=balanced needs it
    outside: Outside = Outside.own
    keep_blocks: bool = False  # the parts of a fragment cut no block; set where replica=fsdp2

    def __post_init__(self) -> None:
        self.cut, self.outside = Cut(self.cut), Outside(self.outside)  # config.yaml has their names
        if self.layers_per_fragment < 1:
            raise ValueError(f"layout.layers_per_fragment={self.layers_per_fragment} must be at least 1")
        if self.count < 0:
            raise ValueError(f"layout.count={self.count} must not be negative (0 = derived from layers_per_fragment)")
        if self.cut is Cut.balanced and not self.count:
            raise ValueError("layout.cut=balanced needs to know into how many fragments: give layout.count")

    def build(self, parameters: Mapping[str, Shape], shards: int) -> Modules:
        """One module a slot; a fragment has as many slots as there are shards, if it has parameters enough."""
        groups = self._groups(parameters)
        slots: dict[str, list[str]] = {}
        placed: dict[ModuleKey, int] = {}
        turns: list[tuple[SlotName, ...]] = []
        loads = [0] * shards
        for fragment, names in groups.items():
            own = {name: parameters[name] for name in names}
            parts = list(balanced(own, shards, block_of if self.keep_blocks else str).values())
            named = {fragment if len(parts) == 1 else f"{fragment}.part{i}": part for i, part in enumerate(parts)}
            sizes = {slot: elements(part, parameters) for slot, part in named.items()}
            free = sorted(range(shards), key=loads.__getitem__)  # no two parts of a fragment on one shard
            for slot, shard in zip(sorted(sizes, key=lambda slot: -sizes[slot]), free, strict=False):
                placed[ModuleKey(f"{slot}/0")] = shard
                loads[shard] += sizes[slot]
            slots |= named
            turns.append(tuple(SlotName(slot) for slot in named))
        check_partition(slots, parameters)
        return Modules(
            slots={SlotName(slot): tuple(names) for slot, names in slots.items()},
            paths=({SlotName(slot): ModuleKey(f"{slot}/0") for slot in slots},),
            shards={ModuleKey(f"{slot}/0"): placed[ModuleKey(f"{slot}/0")] for slot in slots},
            fragments=tuple(turns),
        )

    def _groups(self, parameters: Mapping[str, Shape]) -> dict[str, list[str]]:
        if self.cut is Cut.balanced:
            if self.count > len(parameters):
                raise ValueError(f"layout.count={self.count} is more than the model's {len(parameters)} parameters")
            groups = balanced(parameters, self.count, block_of if self.keep_blocks else str)
            return {f"balanced.{i}": names for i, names in enumerate(groups.values())}
        return fragments(
            parameters,
            layers_per_fragment=self.layers_per_fragment,
            strided=self.cut is Cut.strided,
            count=self.count,
            spread_outside=self.outside is Outside.balanced,
        )


def single_path(slots: Mapping[str, Sequence[str]], parameters: Mapping[str, Shape], shards: int) -> Modules:
    """Modules for a model that all sources share: module `slot/0` for each slot, on the least loaded shard.

    Raises ValueError where `slots` do not partition `parameters`.
    """
    check_partition(slots, parameters)
    path = {SlotName(slot): ModuleKey(f"{slot}/0") for slot in slots}
    sizes = {path[SlotName(slot)]: elements(names, parameters) for slot, names in slots.items()}
    return Modules(
        slots={SlotName(slot): tuple(names) for slot, names in slots.items()},
        paths=(path,),
        shards=place(sizes, shards),
    )


def split(parameters: Mapping[str, Shape], patterns: Mapping[str, str]) -> dict[str, list[str]]:
    """Parameter names by slot: slot -> regular expression (`re.search`), in the model's order within a slot.

    Raises ValueError naming the parameters that no pattern takes, or that several take.
    """
    slots: dict[str, list[str]] = {slot: [] for slot in patterns}
    for name in parameters:
        for slot, pattern in patterns.items():
            if re.search(pattern, name):
                slots[slot].append(name)
    check_partition(slots, parameters)
    return slots


def fragments(
    parameters: Mapping[str, Shape],
    *,
    layers_per_fragment: int = 3,
    strided: bool = True,
    count: int = 0,
    spread_outside: bool = False,
) -> dict[str, list[str]]:
    """Fragments of Streaming DiLoCo (arXiv:2501.18512, section 2.2): blocks by their number, the rest by its size.

    A block's number is the first number in its parameters' names (`model.layers.7.mlp...` is block 7).
    With P fragments of blocks (`count`, or as many as `layers_per_fragment` gives), strided puts block i in fragment
    i mod P; otherwise consecutive blocks stay together. Of the parameters outside the blocks (embedding, final norm,
    head) each matrix is a fragment of its own, and what is no matrix goes with the last of them; `spread_outside`
    gives them to the fragments of blocks instead, the largest first, each to the smallest.
    Raises ValueError where there are no blocks, or fewer than fragments.
    """
    if layers_per_fragment < 1:
        raise ValueError(f"layers_per_fragment={layers_per_fragment} must be at least 1")
    blocks: dict[int, list[str]] = {}
    rest: list[str] = []
    for name in parameters:
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        (rest if number is None else blocks.setdefault(number, [])).append(name)
    if not blocks:
        raise ValueError("the model has no numbered blocks to cut into fragments; use layout=whole")
    num_fragments = count or math.ceil(len(blocks) / layers_per_fragment)
    if num_fragments > len(blocks):
        raise ValueError(f"layout.count={count} fragments are more than the model's {len(blocks)} blocks; use fewer")
    slots: dict[str, list[str]] = {f"blocks.{i}": [] for i in range(num_fragments)}
    for position, number in enumerate(sorted(blocks)):
        together = position // layers_per_fragment if not count else position * count // len(blocks)
        slots[f"blocks.{position % num_fragments if strided else together}"] += blocks[number]
    slots = _spread(slots, rest, parameters) if spread_outside else slots | _outside(rest, parameters)
    check_partition(slots, parameters)
    return slots


def _outside(names: Sequence[str], parameters: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Each matrix for itself, in the model's order; the rest with the last one."""
    own: list[list[str]] = [[name] for name in names if len(parameters[name]) > 1]
    rest = [name for name in names if len(parameters[name]) <= 1]
    if rest and own:
        own[-1] += rest
    elif rest:
        own.append(rest)
    return {f"outside.{i}": group for i, group in enumerate(own)}


def _spread(
    slots: Mapping[str, list[str]], names: Sequence[str], parameters: Mapping[str, Shape]
) -> dict[str, list[str]]:
    """`slots` with these parameters added, the largest first, each to the smallest."""
    found = {slot: list(own) for slot, own in slots.items()}
    for name in sorted(names, key=lambda name: -math.prod(parameters[name])):
        smallest = min(found, key=lambda slot: elements(found[slot], parameters))
        found[smallest].append(name)
    order = {name: i for i, name in enumerate(parameters)}
    return {slot: sorted(own, key=order.__getitem__) for slot, own in found.items()}


def block_of(name: str) -> str:
    """The block that a parameter lies in: its name up to the first number; "" outside the blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def check_blocks(modules: Modules) -> None:
    """Raise ValueError where the slots cut a block, or what lies outside the blocks: FSDP2 gathers each as one."""
    slot_of: dict[str, tuple[SlotName, str]] = {}
    for slot, names in modules.slots.items():
        for name in names:
            first_slot, first = slot_of.setdefault(block_of(name), (slot, name))
            if first_slot != slot:
                block = block_of(name) or "what lies outside the blocks"
                raise ValueError(
                    f"replica=fsdp2 gathers {block} as one, and the layout cuts it: {first} is in slot {first_slot},"
                    f" {name} in {slot}; let one pattern take both, or use replica=ddp"
                )


def check_partition(slots: Mapping[str, Sequence[str]], parameters: Mapping[str, Shape]) -> None:
    """Raise ValueError unless every parameter is in exactly one slot and no slot is empty."""
    counts = dict.fromkeys(parameters, 0)
    for slot, names in slots.items():
        if not names:
            raise ValueError(f"slot {slot} takes no parameter; remove it or mend its pattern")
        unknown = [name for name in names if name not in counts]
        if unknown:
            raise ValueError(f"slot {slot} names {_some(unknown)}, which the model has not")
        for name in names:
            counts[name] += 1
    missing = [name for name, count in counts.items() if count == 0]
    twice = [name for name, count in counts.items() if count > 1]
    if missing:
        raise ValueError(f"no slot takes {_some(missing)}; every trainable parameter must be in exactly one slot")
    if twice:
        raise ValueError(f"more than one slot takes {_some(twice)}; every parameter must be in exactly one slot")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
