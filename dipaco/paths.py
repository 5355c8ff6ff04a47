"""Paths: a model cut into levels, several modules for each level, and which module of each a path goes through."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diloco.layout import Layout, block_of, check_partition
from diloco.messages import ModuleKey, Modules, Shape, SlotName
from diloco.placing import balanced, elements, place

SHARED, PRIVATE = "shared", "private"


@dataclass(kw_only=True)
class Paths(Layout):
    """DiPaCo's modules (arXiv:2403.10616, section 2.2): level l has `levels[l]` of them, a path one of each level.

    Levels are consecutive blocks of the model, evenly many or from `first_blocks` on. There are as many paths as
    combinations, the last level's module changing fastest: with levels [2, 2] path 1 is (0, 1). A `table` names the
    modules of each path instead. What lies outside the blocks (embedding, final norm, head) is shared by all paths.
    Parameters that match one of the regular expressions in `private` are each path's own: `layout.private=['.']` with
    one level is a flat mixture, which shares nothing.

    With `fragments` the blocks of each level are dealt to so many fragments, which are exchanged one after the other.
    """

    levels: list[int] = field(default_factory=lambda: [2, 2])  # modules of each; 1 = shared by all paths
    first_blocks: list[int] = field(default_factory=list)  # of the levels after the first; empty = evenly
    table: list[list[int]] = field(default_factory=list)  # a row for each path: its module of each level
    private: list[str] = field(default_factory=list)
    fragments: int = 1

    def __post_init__(self) -> None:
        if not self.levels or any(count < 1 for count in self.levels):
            raise ValueError(
                f"layout.levels={self.levels}: name one or more levels, each with at least 1 module (1 = all share it)"
            )
        if self.first_blocks and len(self.first_blocks) != len(self.levels) - 1:
            raise ValueError(
                f"layout.first_blocks={self.first_blocks} must name the first block of each level after the first:"
                f" {len(self.levels) - 1} for layout.levels={self.levels} (the first level begins with block 0)"
            )
        if any(a >= b for a, b in itertools.pairwise([0, *self.first_blocks])):
            raise ValueError(f"layout.first_blocks={self.first_blocks} must rise from above 0: no level is empty")
        if self.fragments < 1:
            raise ValueError(f"layout.fragments={self.fragments} must be at least 1")
        for pattern in self.private:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"layout.private: {pattern!r} is no regular expression: {error}") from error
        self._check_table()

    def num_paths(self) -> int:
        """Rows of the table, or all combinations."""
        return len(self.table) or math.prod(self.levels)

    def rows(self) -> list[tuple[int, ...]]:
        """By path: its module of each level."""
        return [tuple(row) for row in self.table] or list(itertools.product(*map(range, self.levels)))

    def check_depth(self, blocks: int) -> None:
        """At least one block for each level, and for each fragment."""
        self._levels_of([str(block) for block in range(blocks)])

    def build(self, parameters: Mapping[str, Shape], shards: int) -> Modules:
        """A slot for each level, for what is shared and what is private, and for each fragment of these.

        With many shards, several for a level, so that its modules are spread over all of them.
        """
        fragment_of, kinds = self._cut(parameters)
        slots: dict[str, list[str]] = {}
        for name in parameters:
            kind, fragment = kinds[name], fragment_of[name]
            slots.setdefault(kind if self.fragments == 1 else f"{kind}.fragment{fragment}", []).append(name)
        slots = self._spread(slots, parameters, shards)
        check_partition(slots, parameters)
        rows = self.rows()
        paths = tuple({SlotName(slot): _key(slot, path, row) for slot in slots} for path, row in enumerate(rows))
        sizes = {slot: elements(names, parameters) for slot, names in slots.items()}
        # A module has to do with each path through it: by that, not by memory, are shards equally busy.
        sent = Counter(key for path in paths for key in path.values())
        turns = [
            tuple(SlotName(slot) for slot, names in slots.items() if fragment_of[names[0]] == fragment)
            for fragment in range(self.fragments)
        ]
        return Modules(
            slots={SlotName(slot): tuple(names) for slot, names in slots.items()},
            paths=paths,
            shards=place({key: count * sizes[key.rpartition("/")[0]] for key, count in sent.items()}, shards),
            fragments=tuple(turns),
        )

    def _spread(
        self, slots: Mapping[str, list[str]], parameters: Mapping[str, Shape], shards: int
    ) -> dict[str, list[str]]:
        """Slots whose modules would have more to do than a shard's fair share, in parts of whole blocks."""
        rows = self.rows()
        fair = len(rows) * elements(parameters, parameters) / shards
        found: dict[str, list[str]] = {}
        for slot, names in slots.items():
            paths = max(Counter(_key(slot, path, row) for path, row in enumerate(rows)).values())
            wanted = math.ceil(paths * elements(names, parameters) / fair)
            parts = list(balanced({name: parameters[name] for name in names}, wanted, block_of).values())
            found |= {slot if len(parts) == 1 else f"{slot}.part{i}": part for i, part in enumerate(parts)}
        return found

    def _cut(self, parameters: Mapping[str, Shape]) -> tuple[dict[str, int], dict[str, str]]:
        """Of each parameter: its fragment, and the kind of slot that it belongs to."""
        blocks = list(dict.fromkeys(block for block in map(block_of, parameters) if block))
        level_of = self._levels_of(blocks)
        patterns = [re.compile(pattern) for pattern in self.private]
        unused = [p.pattern for p in patterns if not any(p.search(name) for name in parameters)]
        if unused:
            raise ValueError(f"layout.private: {unused[0]!r} matches no parameter, such as {next(iter(parameters))}")
        fragment_of, kinds = {}, {}
        for name in parameters:
            block = block_of(name)
            own = any(pattern.search(name) for pattern in patterns)
            kinds[name] = PRIVATE if own else level_of.get(block, SHARED)
            fragment_of[name] = blocks.index(block) % self.fragments if block else self.fragments - 1
        return fragment_of, kinds

    def _levels_of(self, blocks: Sequence[str]) -> dict[str, str]:
        """The level of each block."""
        count = len(self.levels)
        if self.fragments > max(len(blocks), 1):
            raise ValueError(f"layout.fragments={self.fragments} are more than the model's {len(blocks)} blocks")
        if len(blocks) < count or (self.first_blocks and self.first_blocks[-1] >= len(blocks)):
            first = f" and layout.first_blocks={self.first_blocks}" if self.first_blocks else ""
            raise ValueError(
                f"layout.levels={self.levels}{first} do not cover the model's {len(blocks)} blocks, at least one each;"
                " use fewer levels, or a deeper model"
            )
        firsts = [0, *self.first_blocks] if self.first_blocks else [len(blocks) * i // count for i in range(count)]
        return {
            block: f"level{level}"
            for level, (first, end) in enumerate(zip(firsts, [*firsts[1:], len(blocks)], strict=True))
            for block in blocks[first:end]
        }

    def _check_table(self) -> None:
        for path, row in enumerate(self.table):
            if len(row) != len(self.levels):
                raise ValueError(
                    f"layout.table: path {path} has {len(row)} modules, {row}; layout.levels={self.levels} needs"
                    f" {len(self.levels)}"
                )
            for level, (module, count) in enumerate(zip(row, self.levels, strict=True)):
                if not 0 <= module < count:
                    raise ValueError(
                        f"layout.table: path {path} names module {module} of level {level}, which has {count}: 0 to"
                        f" {count - 1}"
                    )
        for level, count in enumerate(self.levels if self.table else []):
            idle = set(range(count)) - {row[level] for row in self.table}
            if idle:
                raise ValueError(
                    f"layout.table: no path goes through module {min(idle)} of level {level}; add one, or lower"
                    f" layout.levels={self.levels}"
                )


def _key(slot: str, path: int, row: tuple[int, ...]) -> ModuleKey:
    kind = slot.partition(".")[0]
    if kind == SHARED:
        return ModuleKey(f"{slot}/0")
    return ModuleKey(f"{slot}/{path if kind == PRIVATE else row[int(kind.removeprefix('level'))]}")
