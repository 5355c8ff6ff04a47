"""Codecs: tensors <-> one header and one flat byte buffer.

The body is numpy uint8, not a torch tensor: Ray moves such a buffer 10 to 50 times faster.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diloco import buffers
from diloco.messages import Payload, Shape, Tensors

SAMPLE_VALUES = 1 << 16  # of which `bits` counts the bytes


@dataclass(kw_only=True)
class Codec(ABC):
    """What goes over the wire. A pure function of the tensors; error feedback is kept by whoever encodes."""

    error_feedback: bool = False  # whether who encodes keeps what the code lost and adds it to the next

    @abstractmethod
    def encode(self, tensors: Tensors) -> Payload:
        """One payload for all of `tensors` (read, not written; any device, sizes and number, also none)."""

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """`encode` of the first minus the second, name by name in the second's order, in float32.

        Computed on the second's device. A codec may write it straight into the payload.
        """
        return self.encode({name: minuend[name].to(value.device) - value for name, value in subtrahend.items()})

    @abstractmethod
    def decode(self, payload: Payload) -> Tensors:
        """Fresh, writable float32 CPU tensors with the encoded names and shapes."""

    def view(self, payload: Payload) -> Tensors:
        """What `decode` gives, to be read only: a codec may give the payload's own memory instead of a copy."""
        return self.decode(payload)

    def bits(self) -> float:
        """Bits a parameter in the body of a payload, as a sample of normal values comes out."""
        sample = torch.randn(SAMPLE_VALUES, generator=torch.Generator().manual_seed(0))
        return 8 * self.encode({"sample": sample}).body.nbytes / SAMPLE_VALUES


@dataclass(kw_only=True)
class Float32(Codec):
    """Four bytes a parameter, exact."""

    def __post_init__(self) -> None:
        _refuse_error_feedback(self, "it loses nothing")

    def encode(self, tensors: Tensors) -> Payload:
        """Exact; 4 bytes an element."""
        return _pack("float32", tensors, torch.float32)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, and where all is on the CPU without a copy of the difference."""
        if any(value.device.type != "cpu" for value in subtrahend.values()):
            return super().encode_difference(minuend, subtrahend)
        payload = _room("float32", subtrahend, torch.float32)
        for name, part in self.view(payload).items():
            torch.sub(minuend[name], subtrahend[name].detach(), out=part)
        return payload

    def decode(self, payload: Payload) -> Tensors:
        """Exact."""
        return _unpack("float32", payload, torch.float32)

    def view(self, payload: Payload) -> Tensors:
        """The payload's own memory."""
        return _unpack("float32", payload, torch.float32, copy=False)


@dataclass(kw_only=True)
class BFloat16(Codec):
    """Two bytes a parameter, rounded to nearest even: |x - q| <= 2^-8 |x| for normal x."""

    def __post_init__(self) -> None:
        _refuse_error_feedback(self, "error feedback comes with the codecs below 16 bits")

    def encode(self, tensors: Tensors) -> Payload:
        """2 bytes an element."""
        return _pack("bfloat16", tensors, torch.bfloat16)

    def decode(self, payload: Payload) -> Tensors:
        """Widens to float32, exactly."""
        return _unpack("bfloat16", payload, torch.bfloat16)


def header_shapes(payload: Payload) -> dict[str, Shape]:
    """The names and shapes of what was encoded, in its order, by a codec that uses `make_header`."""
    return {name: tuple(shape) for name, shape in json.loads(payload.header)["shapes"]}


def make_header(tensors: Tensors) -> bytes:
    """A header with the names and shapes of `tensors`, in their order."""
    shapes = [[name, list(value.shape)] for name, value in tensors.items()]
    return json.dumps({"shapes": shapes}, separators=(",", ":")).encode()


def _room(codec: str, tensors: Tensors, dtype: torch.dtype) -> Payload:
    """A payload for tensors of these names and shapes, its body not initialised."""
    size = sum(value.numel() for value in tensors.values())
    return Payload(codec=codec, header=make_header(tensors), body=np.empty(size * dtype.itemsize, dtype=np.uint8))


def _pack(codec: str, tensors: Tensors, dtype: torch.dtype) -> Payload:
    payload = _room(codec, tensors, dtype)
    parts = torch.split(_typed(payload.body, dtype), [value.numel() for value in tensors.values()])
    for part, value in zip(parts, tensors.values(), strict=True):
        part.copy_(value.detach().reshape(-1))  # casts, and fetches from the device
    return payload


def _unpack(codec: str, payload: Payload, dtype: torch.dtype, *, copy: bool = True) -> Tensors:
    if payload.codec != codec:
        raise ValueError(f"a payload of codec {payload.codec} cannot be decoded by {codec}")
    shapes = header_shapes(payload)
    values = _typed(payload.body, dtype)
    if copy:  # buffers from Ray are read-only
        values = buffers.flat(values.numel()).copy_(values)
    return buffers.views(values, shapes)


def _typed(body: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype) -> torch.Tensor:
    """The buffer's memory as a flat tensor. numpy views the bytes, since torch refuses to where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(body.view(np.int32 if dtype.itemsize == 4 else np.int16)).view(dtype)


def _refuse_error_feedback(codec: Float32 | BFloat16, why: str) -> None:
    if codec.error_feedback:
        raise ValueError(f"{type(codec).__name__} has no error feedback ({why}); leave error_feedback=false")
