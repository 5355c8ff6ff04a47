"""Error feedback: what a codec lost of a source's contributions is kept, and added to the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from diloco.codec import Codec
from diloco.messages import Payload, Settled, Tensors


class Encoder(Protocol):
    """What makes a contribution's payload: a codec, or one with error feedback around it."""

    def encode(self, tensors: Tensors) -> Payload:
        """As `Codec.encode`."""

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """As `Codec.encode_difference`."""


class Feedback:
    """The residuals of one source, by parameter name, in float32 on the CPU.

    With e the residual, D the pseudo-gradient and b the codec's `feedback_decay`: send Q(b e + D), and keep
    b e + D - Q(b e + D) as the new residual once the store has accepted it (arXiv:2508.15706, Alg. 1). One that was
    refused, or of which nothing is heard, leaves the residual as it was (pitfalls L32, L33).
    """

    def __init__(self) -> None:
        self.residual: Tensors = {}
        self._pending: dict[tuple[int, int], Tensors] = {}  # (round, fragment) -> the residual if that is accepted

    def around(self, codec: Codec, round_: int, fragment: int) -> Encoder:
        """What encodes this turn's contribution: `codec` itself where it asks for no feedback."""
        if not codec.error_feedback:
            return codec
        for older in [key for key in self._pending if key[1] == fragment and key[0] < round_]:
            del self._pending[older]  # nobody told what became of it
        return _Around(codec, self.residual, self._pending.setdefault((round_, fragment), {}))

    def settle(self, settled: Iterable[Settled]) -> None:
        """The store's verdicts; what is told twice is heard once."""
        for told in settled:
            lost = self._pending.pop((told.round, told.fragment), {})
            if told.accepted:
                self.residual |= lost

    def state(self) -> Tensors:
        """Copies of all that is kept, named so that `load` finds it."""
        tensors = {f"residual/{name}": value.clone() for name, value in self.residual.items()}
        for (round_, fragment), lost in self._pending.items():
            tensors |= {f"pending/{round_}/{fragment}/{name}": value.clone() for name, value in lost.items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensors]) -> None:
        """Take back what `state` gave: `residual` and `pending`, each by the rest of its names."""
        self.residual = dict(tensors["residual"])
        self._pending = {}
        for name, value in tensors["pending"].items():
            round_, fragment, rest = name.split("/", 2)
            self._pending.setdefault((int(round_), int(fragment)), {})[rest] = value


class _Around:
    """Encodes with the residual added, and notes what is lost."""

    def __init__(self, codec: Codec, residual: Tensors, lost: Tensors) -> None:
        self._codec, self._residual, self._lost = codec, residual, lost

    def encode(self, tensors: Tensors) -> Payload:
        """The tensors with what was lost of them before, decayed; what is lost now is noted in `lost`."""
        meant = {}
        for name, value in tensors.items():
            before = self._residual.get(name)
            kept = None if before is None else before.to(value.device)
            meant[name] = value if kept is None else value.add(kept, alpha=self._codec.feedback_decay)
        payload = self._codec.encode(meant)
        for name, sent in self._codec.view(payload).items():
            self._lost[name] = meant[name].cpu() - sent
        return payload

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """`minuend` - `subtrahend`, on the device of the latter, likewise."""
        return self.encode({name: minuend[name].to(value.device) - value for name, value in subtrahend.items()})
