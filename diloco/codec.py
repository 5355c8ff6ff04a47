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

from diloco import buffers, quantize, sparse
from diloco.blocks import LARGEST, Source
from diloco.messages import Payload, Shape, Tensors

_SAMPLE = LARGEST  # values


@dataclass(kw_only=True)
class Codec(ABC):
    """What goes over the wire. A pure function of the tensors; error feedback is kept by whoever encodes."""

    error_feedback: bool = False  # whether who encodes keeps what the code lost and adds it to the next

    @property
    def feedback_decay(self) -> float:
        """What is left of the residual, each time something is added to it."""
        return 1.0

    def parameter_bits(self) -> float:
        """Bits a parameter on the wire, header apart, for plans. Measured on a sample that all blocks divide."""
        payload = self.encode({"sample": torch.linspace(-0.01, 0.01, _SAMPLE)})  # as large as contributions are
        return 8 * payload.body.nbytes / _SAMPLE

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


@dataclass(kw_only=True)
class Float32(Codec):
    """Four bytes a parameter, exact."""

    def encode(self, tensors: Tensors) -> Payload:
        """Exact; 4 bytes an element."""
        return _pack("float32", tensors, torch.float32)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, and where all is on the CPU without a copy of the difference."""
        if any(value.device.type != "cpu" for value in subtrahend.values()):
            return _pack_difference("float32", minuend, subtrahend, torch.float32)
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

    def encode(self, tensors: Tensors) -> Payload:
        """2 bytes an element."""
        return _pack("bfloat16", tensors, torch.bfloat16)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, without the whole difference in memory."""
        return _pack_difference("bfloat16", minuend, subtrahend, torch.bfloat16)

    def decode(self, payload: Payload) -> Tensors:
        """Widens to float32, exactly."""
        return _unpack("bfloat16", payload, torch.bfloat16)


@dataclass(kw_only=True)
class Int8(Codec):
    """One byte a parameter and 4 a block (8.125 bits with the default): whole multiples of absmax / 127 of the block.

    |x - q| <= absmax / 254, and a hair for float32's own rounding (which makes its very largest number infinite).
    A block with a value that is not finite has none that is.
    """

    block: int = 256  # values with one scale; a tensor's last block may be shorter

    def __post_init__(self) -> None:
        _check_power(self.block, "codec.block", least=1)

    def encode(self, tensors: Tensors) -> Payload:
        """To the nearest multiple, ties to the even one."""
        return _quantize("int8", quantize.Linear8, tensors, None, self.block)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, without the whole difference in memory."""
        return _quantize("int8", quantize.Linear8, subtrahend, minuend, self.block)

    def decode(self, payload: Payload) -> Tensors:
        """Multiples of the scales."""
        return _dequantize("int8", quantize.Linear8, payload, self.block)


@dataclass(kw_only=True)
class Int4(Codec):
    """Half a byte a parameter and a byte a block (4.125 bits with the default): sign and three bits of exponent, E3M0.

    A block's scale s is the power of two nearest to its largest value, the levels are 0 and s, s/2 ... s/64 with
    either sign: |x - q| <= |x| / 3 for |x| >= s / 64, and what is below .75 s / 64 becomes zero (arXiv:2501.18512).
    Magnitudes from 1.5 * 2^127 up count as not finite, and a block with such a value has none that is.
    """

    block: int = 64  # values with one scale; a tensor's last block may be shorter

    def __post_init__(self) -> None:
        _check_power(self.block, "codec.block", least=2)

    def encode(self, tensors: Tensors) -> Payload:
        """To the nearest power of two, from 1.5 times one upwards the next."""
        return _quantize("int4", quantize.Exponent4, tensors, None, self.block)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, without the whole difference in memory."""
        return _quantize("int4", quantize.Exponent4, subtrahend, minuend, self.block)

    def decode(self, payload: Payload) -> Tensors:
        """Signed powers of two, and zeros."""
        return _dequantize("int4", quantize.Exponent4, payload, self.block)


@dataclass(kw_only=True)
class TopK(Codec):
    """The largest `density` of each chunk, .23 bits a parameter with the defaults (SparseLoCo, arXiv:2508.15706).

    Each kept value has log2(chunk) bits for its place and `bits` for sign and magnitude, each chunk 8 bytes for the
    smallest (lo) and the largest (hi) of the kept magnitudes other than zero, with 2^(bits-1) equal cells between:
    |x - q| <= (hi - lo) / 2^bits, and a hair, for what is kept; what is not (no more than lo) becomes zero.
    """

    error_feedback: bool = True  # what is not sent now is sent later; without it most is never sent
    chunk: int = 4096  # values among which the largest are kept
    density: float = 1 / 64  # the share that is kept, at least one value a chunk
    bits: int = 2  # of a kept value, its sign among them
    decay: float = 0.95  # beta: what is left of the residual each time

    def __post_init__(self) -> None:
        _check_power(self.chunk, "codec.chunk", least=1)
        if not 0 < self.density <= 1:
            raise ValueError(f"codec.density={self.density} must be above 0 and at most 1, such as 0.015625")
        if self.bits not in range(2, 9):
            raise ValueError(f"codec.bits={self.bits} must be from 2 to 8: a sign, and the rest for the magnitude")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"codec.decay={self.decay} must be from 0 to 1; 1 forgets nothing of what was not sent")

    @property
    def feedback_decay(self) -> float:
        """The setting `decay`."""
        return self.decay

    def encode(self, tensors: Tensors) -> Payload:
        """Among equal magnitudes, those that come first."""
        return self._encode(tensors, None)

    def encode_difference(self, minuend: Tensors, subtrahend: Tensors) -> Payload:
        """To the same bits, without the whole difference in memory."""
        return self._encode(subtrahend, minuend)

    def decode(self, payload: Payload) -> Tensors:
        """Zeros where nothing was kept."""
        shapes = _shapes("topk", payload)
        sizes = [math.prod(shape) for shape in shapes.values()]
        return buffers.views(sparse.decode(self._sparse(), payload.body, sizes), shapes)

    def _encode(self, tensors: Tensors, minuend: Tensors | None) -> Payload:
        body = sparse.encode(self._sparse(), Source(tensors, minuend, block=self.chunk))
        return Payload(codec="topk", header=make_header(tensors), body=body)

    def _sparse(self) -> sparse.Sparse:
        return sparse.Sparse(chunk=self.chunk, density=self.density, bits=self.bits)


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
        _fetch(value.detach().reshape(-1), out=part)
    return payload


def _pack_difference(codec: str, minuend: Tensors, subtrahend: Tensors, dtype: torch.dtype) -> Payload:
    """`_pack` of the first minus the second, piece by piece."""
    payload = _room(codec, subtrahend, dtype)
    values, begin = _typed(payload.body, dtype), 0
    for piece, rows in Source(subtrahend, minuend, block=1).pieces():
        _fetch(rows.view(-1), out=values[begin : begin + piece.rows])
        begin += piece.rows
    return payload


def _fetch(values: torch.Tensor, *, out: torch.Tensor) -> None:
    """Copy into `out` on the CPU, cast on the values' device: torch's own copy would cast what it has fetched."""
    out.copy_(values if values.device.type == "cpu" else values.to(out.dtype))


def _unpack(codec: str, payload: Payload, dtype: torch.dtype, *, copy: bool = True) -> Tensors:
    shapes = _shapes(codec, payload)
    expected = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if payload.body.nbytes != expected:
        raise ValueError(f"the payload has {payload.body.nbytes} bytes instead of {expected}: it is damaged")
    values = _typed(payload.body, dtype)
    if copy:  # buffers from Ray are read-only
        values = buffers.flat(values.numel()).copy_(values)
    return buffers.views(values, shapes)


def _typed(body: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype) -> torch.Tensor:
    """The buffer's memory as a flat tensor. numpy views the bytes, since torch refuses to where there are none."""
    kinds = {1: np.uint8, 2: np.int16, 4: np.int32}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(body.view(kinds[dtype.itemsize])).view(dtype)


def _quantize(
    codec: str, kind: type[quantize.Kernel], tensors: Tensors, minuend: Tensors | None, block: int
) -> Payload:
    body = quantize.encode(kind, Source(tensors, minuend, block=block), block=block)
    return Payload(codec=codec, header=make_header(tensors), body=body)


def _dequantize(codec: str, kind: type[quantize.Kernel], payload: Payload, block: int) -> Tensors:
    shapes = _shapes(codec, payload)
    sizes = [math.prod(shape) for shape in shapes.values()]
    return buffers.views(quantize.decode(kind, _typed(payload.body, torch.uint8), sizes, block=block), shapes)


def _shapes(codec: str, payload: Payload) -> dict[str, Shape]:
    """`header_shapes`, if it is this codec's."""
    if payload.codec != codec:
        raise ValueError(f"a payload of codec {payload.codec} cannot be decoded by {codec}")
    shapes = header_shapes(payload)
    if any(size < 0 for shape in shapes.values() for size in shape):
        raise ValueError(f"the payload is damaged: its header has the shapes {shapes}")
    return shapes


def _check_power(value: int, name: str, *, least: int) -> None:
    if not least <= value <= LARGEST or value & (value - 1):
        raise ValueError(f"{name}={value} must be a positive power of two from {least} to {LARGEST}, such as 256")
