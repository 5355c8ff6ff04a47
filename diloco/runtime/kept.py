"""What belongs to a source that goes from island to island, as one buffer, which Ray moves fastest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import torch as safetensors

from diloco.messages import State


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A `State`: its tensors as safetensors, and the rest as JSON."""

    body: np.ndarray[Any, np.dtype[np.uint8]]  # uint8[bytes]
    meta: str


def pack(state: State) -> Kept:
    """A copy of it."""
    tensors = {name: value.detach().contiguous() for name, value in state.tensors.items()}
    return Kept(body=np.frombuffer(safetensors.save(tensors), dtype=np.uint8), meta=json.dumps(state.meta))


def unpack(kept: Kept) -> State:
    """A copy of what was packed."""
    return State(tensors=safetensors.load(kept.body.tobytes()), meta=json.loads(kept.meta))
