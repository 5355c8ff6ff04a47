"""Anchors: the global values that a source's weights were started from, and how newer ones are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diloco.codec import Codec, Float32
from diloco.messages import ModuleKey, Modules, SlotName, Snapshot, Tensors
from diloco.replica import Replica

HELD, FULL, UPDATE = range(3)  # what a slot is installed from: what is here, full values, an update on what is here


class Anchors:
    """This worker's parts of what was installed: float32 on the CPU; full values on Ray in a node's object store."""

    def __init__(self, replica: Replica, codec_down: Codec) -> None:
        self._replica, self._down, self._full = replica, codec_down, Float32()
        self.values: Tensors = {}  # by parameter name
        self.versions: dict[SlotName, int] = {}

    def clear(self) -> None:
        """Another source comes."""
        self.values, self.versions = {}, {}

    def initial(
        self, modules: Modules, keys: Sequence[ModuleKey], values: Mapping[ModuleKey, Tensors] | None
    ) -> list[Snapshot]:
        """The model's present values, or each module's own in `values`, as version 0 of these modules."""
        snapshots = []
        for key in keys:
            names = modules.slots[modules.slot_of(key)]
            own = self._replica.read(names)
            if values is not None:
                given = values[key]
                wrong = [n for n in names if n not in given or given[n].shape != own[n].shape]
                if wrong:
                    shape = tuple(own[wrong[0]].shape)
                    raise ValueError(f"init_from lacks parameter {wrong[0]} in the model's shape {shape}")
                own = {name: given[name] for name in names}
            snapshots.append(Snapshot(module=key, version=0, base_version=None, payload=self._full.encode(own)))
        return snapshots

    def adopt(self, modules: Modules, digests: Mapping[ModuleKey, str]) -> list[ModuleKey]:
        """Take the model's present values as version 0, where they are what the store was filled with.

        `digests`: `Payload.sha256` of what fills each module. Returns the modules for which that is so. Collective.
        """
        held = []
        for slot, names in modules.slots.items():
            own = self._full.encode(self._replica.read(names)).sha256()
            same = [key for key, told in digests.items() if modules.slot_of(key) == slot and told == own]
            if same:
                self.values |= self._replica.parts(names)
                self.versions[slot] = 0
            held += same
        return held

    def install(
        self, modules: Modules, snapshots: Sequence[Snapshot], versions: Mapping[SlotName, int], keep: float
    ) -> None:
        """Write global values of these versions into the model, `keep` of its own surviving, and keep them as anchors.

        Only the worker that takes the snapshots for its island needs to have them. A slot without one has the version
        already. Slot by slot.
        """
        found = {modules.slot_of(snapshot.module): snapshot for snapshot in snapshots}
        for slot, version in versions.items():
            names = modules.slots[slot]
            kind, values = self._given(slot, version, found.get(slot)) if self._replica.sends else (HELD, {})
            kind = self._replica.agreed(kind)
            held = {name: self.values[name] for name in names if name in self.values}
            parts = held if kind == HELD else self._replica.spread(names, values)
            if kind == UPDATE:
                parts = {name: part.add_(held[name]) for name, part in parts.items()}
            self._replica.install(names, parts, keep)
            self.values |= parts
            self.versions[slot] = version

    def _given(self, slot: SlotName, version: int, snapshot: Snapshot | None) -> tuple[int, Tensors]:
        if snapshot is None:
            assert self.versions[slot] == version, "a version that is neither here nor sent"
            return HELD, {}
        assert snapshot.version == version, "torn versions"
        if snapshot.base_version is None:  # it never changes once it is given out, so that its memory can be the anchor
            return FULL, self._full.view(snapshot.payload)
        assert snapshot.base_version == self.versions[slot], "an update on another version"
        return UPDATE, self._down.decode(snapshot.payload)
