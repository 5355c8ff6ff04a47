"""Codecs: tensors <-> one header and one flat byte buffer.

The body is numpy uint8, not a torch tensor: Ray moves such a buffer 10 to 50 times faster.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diloco.messages import Payload, Shape, Tensors


@dataclass(kw_only=True)
class Codec(ABC):
    """What goes over the wire. A pure function of the tensors; error feedback is kept by whoever encodes."""

    error_feedback: bool = False  # whether who encodes keeps what the code lost and adds it to the next

    @abstractmethod
    def encode(self, tensors: Tensors) -> Payload:
        """One payload for all of `tensors` (read, not written; any device, sizes and number, also none)."""

    @abstractmethod
    def decode(self, payload: Payload) -> Tensors:
        """Fresh, writable float32 CPU tensors with the encoded names and shapes."""

    def view(self, payload: Payload) -> Tensors:
        """What `decode` gives, to be read only: a codec may give the payload's own memory instead of a copy."""
        return self.decode(payload)


@dataclass(kw_only=True)
class Float32(Codec):
    """Four bytes a parameter, exact."""

    def __post_init__(self) -> None:
        _refuse_error_feedback(self, "it loses nothing")

    def encode(self, tensors: Tensors) -> Payload:
        """Exact; 4 bytes an element."""
        return _pack("float32", tensors, torch.float32)

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


def _pack(codec: str, tensors: Tensors, dtype: torch.dtype) -> Payload:
    sizes = [value.numel() for value in tensors.values()]
    body = np.empty(sum(sizes) * dtype.itemsize, dtype=np.uint8)
    for part, value in zip(torch.split(_typed(body, dtype), sizes), tensors.values(), strict=True):
        part.copy_(value.detach().reshape(-1))  # casts, and fetches from the device
    return Payload(codec=codec, header=make_header(tensors), body=body)


def _unpack(codec: str, payload: Payload, dtype: torch.dtype, *, copy: bool = True) -> Tensors:
    if payload.codec != codec:
        raise ValueError(f"a payload of codec {payload.codec} cannot be decoded by {codec}")
    shapes = header_shapes(payload)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if copy and dtype is torch.float32:
        flat = _typed(payload.body, dtype).clone()  # buffers from Ray are read-only
    else:
        flat = _typed(payload.body, dtype).to(torch.float32)
    parts = torch.split(flat, sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _typed(body: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype) -> torch.Tensor:
    """The buffer's memory as a flat tensor. numpy views the bytes, since torch refuses to where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(body.view(np.int32 if dtype.itemsize == 4 else np.int16)).view(dtype)


def _refuse_error_feedback(codec: Float32 | BFloat16, why: str) -> None:
    if codec.error_feedback:
        raise ValueError(f"{type(codec).__name__} has no error feedback ({why}); leave error_feedback=false")
