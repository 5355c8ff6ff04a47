"""Anchors: the global values that a source's weights were started from, and how newer ones are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diloco.codec import Codec, Float32
from diloco.messages import Modules, SlotName, Snapshot, Tensors
from diloco.replica import Replica


class Anchors:
    """This worker's parts of what was installed: float32 on the CPU; full values on Ray in a node's object store."""

    def __init__(self, replica: Replica, codec_down: Codec) -> None:
        self._replica, self._down, self._full = replica, codec_down, Float32()
        self.values: Tensors = {}  # by parameter name
        self.versions: dict[SlotName, int] = {}

    def clear(self) -> None:
        """Another source comes."""
        self.values, self.versions = {}, {}

    def install(
        self, modules: Modules, snapshots: Sequence[Snapshot], versions: Mapping[SlotName, int], keep: float
    ) -> None:
        """Write global values of these versions into the model, `keep` of its own surviving, and keep them as anchors.

        Only the worker that takes the snapshots for its island needs to have them. Slot by slot.
        """
        found = {modules.slot_of(snapshot.module): snapshot for snapshot in snapshots}
        for slot, version in versions.items():
            names, update = modules.slots[slot], False
            values: Tensors = {}
            if self._replica.sends:
                snapshot = found[slot]
                update = snapshot.base_version is not None
                assert snapshot.version == version, "torn versions"
                assert not update or snapshot.base_version == self.versions[slot], "an update on another version"
                # Snapshots never change once they are given out, so that their memory can be the anchor.
                values = self._down.decode(snapshot.payload) if update else self._full.view(snapshot.payload)
            parts = self._replica.spread(names, values)
            if self._replica.agreed(update):
                parts = {name: part.add_(self.values[name]) for name, part in parts.items()}
            self._replica.install(names, parts, keep)
            self.values |= parts
            self.versions[slot] = version
