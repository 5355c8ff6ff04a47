"""Rounding to a few bits a value with one scale a block: bodies of scales, then codes, both in the tensors' order.

Integer and correctly rounded float32 operations only, so every device gives the same bytes. What is fast here: no
operation leaves the cache, each is one that torch vectorises, and values become 16 and 8 bits wide early.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from diloco import buffers
from diloco.blocks import Piece, Source, cut, fill_up, piece_values, rows_of, without_filling

Body: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_SMALLEST_NORMAL = 2.0**-126
_LARGEST_CODE = 7  # of Int4's magnitudes
_NOT_FINITE = 255  # the biased exponent of infinity


class Kernel(ABC):
    """Rounds rows of `block` values, with its scratch memory for at most `rows` of them at a time."""

    scale_bytes: int  # of a block

    def __init__(self, *, block: int, rows: int, device: torch.device) -> None:
        self.block, self.rows, self.device = block, rows, device

    @abstractmethod
    def code_bytes(self, values: int) -> int:
        """Bytes for so many values of one tensor."""

    @abstractmethod
    def encode(self, values: torch.Tensor, *, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """float32[rows, block] -> uint8[rows, code bytes of a block] and uint8[rows, scale_bytes], both written."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
        """The inverse, into float32[rows, block]; on the CPU."""


class Linear8(Kernel):
    """Multiples of scale = absmax / 127 from -127 to 127. A block with a value that is not finite has no finite scale.

    The scale is at least the smallest normal number: those below it are not the same on every device.
    """

    scale_bytes = 4

    def __init__(self, *, block: int, rows: int, device: torch.device) -> None:
        super().__init__(block=block, rows=rows, device=device)
        self._scratch = torch.empty(rows, block, device=device)
        self._steps = torch.full((1, 1), 127.0, device=device)  # a number: CUDA would multiply by its rounded inverse

    def code_bytes(self, values: int) -> int:
        """One a value."""
        return values

    def encode(self, values: torch.Tensor, *, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Ties go to the even multiple."""
        scratch = self._scratch[: len(values)]
        torch.abs(values, out=scratch)
        scale = scratch.amax(1, keepdim=True).div_(self._steps).clamp_min_(_SMALLEST_NORMAL)  # float32[rows, 1]
        torch.div(values, scale, out=scratch).round_()
        codes.view(torch.int8).copy_(scratch)
        scales.view(torch.float32).copy_(scale)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
        """Codes times scales."""
        scratch = self._scratch[: len(codes)].copy_(codes.view(torch.int8))
        torch.mul(scratch, scales.view(torch.float32), out=out)


class Exponent4(Kernel):
    """A sign and the exponent of the nearest power of two, counted from the block's largest down; see codec.Int4.

    A nibble is sign << 3 | code, the first of two values in the lower half of the byte. With 9 bits b of sign-less
    float32 (its exponent and the first of its mantissa), (b + 1) >> 1 is the exponent rounded at 1.5.
    """

    scale_bytes = 1

    def __init__(self, *, block: int, rows: int, device: torch.device) -> None:
        super().__init__(block=block, rows=rows, device=device)
        self._wide = torch.empty(rows, block, dtype=torch.int32, device=device)
        self._exponents, self._signs = torch.empty(2, rows, block, dtype=torch.int16, device=device)
        self._nibbles = torch.empty(rows, block, dtype=torch.uint8, device=device)
        self._pairs = _pairs()

    def code_bytes(self, values: int) -> int:
        """Half a one a value."""
        return (values + 1) // 2

    def encode(self, values: torch.Tensor, *, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """A NaN rounds to exponent 256, and so to a scale of 255 like the infinities."""
        rows = len(values)
        exponents, signs, nibbles = self._exponents[:rows], self._signs[:rows], self._nibbles[:rows]
        exponents.copy_(torch.bitwise_right_shift(values.view(torch.int32), 22, out=self._wide[:rows]))
        torch.bitwise_right_shift(exponents, 6, out=signs).bitwise_and_(8)
        exponents.bitwise_and_(511).add_(1).bitwise_right_shift_(1)
        largest = exponents.amax(1, keepdim=True).clamp_(_LARGEST_CODE, _NOT_FINITE)  # int16[rows, 1]
        scales.copy_(largest)
        least = largest.sub_(_LARGEST_CODE)
        torch.maximum(exponents, least, out=exponents).sub_(least)
        nibbles.copy_(exponents.bitwise_or_(signs))
        pairs = nibbles.view(torch.int16)  # int16[rows, block / 2]: the second value's nibble is 8 bits up
        shifted = self._signs.view(-1)[: pairs.numel()].view(pairs.shape)
        codes.copy_(torch.bitwise_right_shift(pairs, 4, out=shifted).bitwise_or_(pairs))  # the lower 8 bits

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
        """Two values at a time from a table, times the scales. 255 is infinity, and zero times it NaN."""
        bytes_ = self._exponents.view(torch.int32).view(-1)[: codes.numel()].copy_(codes.reshape(-1))
        both = self._wide.view(torch.int64).view(-1)[: codes.numel()]
        torch.index_select(self._pairs, 0, bytes_, out=both)
        scale = scales.to(torch.int32).bitwise_left_shift_(23).view(torch.float32)  # float32[rows, 1]
        torch.mul(both.view(torch.float32).view(out.shape), scale, out=out)


def _pairs() -> torch.Tensor:
    """int64[256]: of each byte, its two float32 values for a scale of 1."""
    codes = torch.arange(16)
    magnitudes = torch.where(codes % 8 == 0, 0.0, 2.0 ** (codes % 8 - _LARGEST_CODE))  # float32[16]
    values = torch.where(codes < 8, magnitudes, -magnitudes).add(0.0)  # which makes -0 to 0
    byte = torch.arange(256)
    return torch.stack([values[byte % 16], values[byte // 16]], 1).view(torch.int64).reshape(-1)


def encode(kind: type[Kernel], source: Source, *, block: int) -> Body:
    """The scales of all blocks, then all codes; a tensor's codes end with a whole byte."""
    kernel = kind(block=block, rows=source.rows, device=source.device)
    body = np.empty(_body_bytes(kernel, source.sizes), dtype=np.uint8)
    scales, codes = _areas(kernel, torch.from_numpy(body), source.sizes)
    scratch = torch.empty(source.rows, kernel.code_bytes(block), dtype=torch.uint8, device=source.device)
    row = byte = 0
    for piece, values in source.pieces():
        sizes = [kernel.code_bytes(part.size) for part in piece.parts]
        target = codes[byte : byte + sum(sizes)]
        direct = piece.whole and source.device.type == "cpu"
        coded = target.view(piece.rows, -1) if direct else scratch[: piece.rows]
        kernel.encode(values, codes=coded, scales=scales[row : row + piece.rows])
        if not direct:
            target.copy_(without_filling(coded.view(-1), sizes, _code_rooms(kernel, piece)))
        row, byte = row + piece.rows, byte + sum(sizes)
    return body


def decode(kind: type[Kernel], body: torch.Tensor, sizes: Sequence[int], *, block: int) -> torch.Tensor:
    """Flat float32 values of tensors of these sizes, from a flat uint8 body. Raises ValueError for a wrong size."""
    most = piece_values(block, body.device)
    rows = min(most // block, sum(rows_of(size, block) for size in sizes))
    kernel = kind(block=block, rows=rows, device=body.device)
    flat = buffers.flat(sum(sizes))
    scales, codes = _areas(kernel, body, sizes)
    coded = torch.empty(rows, kernel.code_bytes(block), dtype=torch.uint8)
    decoded = torch.empty(rows, block)
    row = byte = value = 0
    for piece in cut(sizes, block=block, most=most):
        lengths = [part.size for part in piece.parts]
        bytes_ = [kernel.code_bytes(length) for length in lengths]
        part, target = codes[byte : byte + sum(bytes_)], flat[value : value + sum(lengths)]
        scale = scales[row : row + piece.rows]
        if piece.whole:
            kernel.decode(part.view(piece.rows, -1), scale, out=target.view(piece.rows, block))
        else:
            filled, out = coded[: piece.rows], decoded[: piece.rows]
            fill_up(torch.split(part, bytes_), _code_rooms(kernel, piece), out=filled.view(-1))
            kernel.decode(filled, scale, out=out)
            target.copy_(without_filling(out.view(-1), lengths, piece.rooms))
        row, byte, value = row + piece.rows, byte + sum(bytes_), value + sum(lengths)
    return flat


def _body_bytes(kernel: Kernel, sizes: Sequence[int]) -> int:
    rows = sum(rows_of(size, kernel.block) for size in sizes)
    return rows * kernel.scale_bytes + sum(kernel.code_bytes(size) for size in sizes)


def _areas(kernel: Kernel, body: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, uint8[rows, scale_bytes], and the codes, flat."""
    expected = _body_bytes(kernel, sizes)
    if body.numel() != expected:
        raise ValueError(
            f"the payload has {body.numel()} bytes instead of {expected}: damaged, or encoded with another block size"
            f" than {kernel.block}; give both sides the same settings"
        )
    end = sum(rows_of(size, kernel.block) for size in sizes) * kernel.scale_bytes
    return body[:end].view(-1, kernel.scale_bytes), body[end:]


def _code_rooms(kernel: Kernel, piece: Piece) -> list[int]:
    """Of each part, its codes' bytes and those of the filling."""
    return [rows_of(part.size, piece.block) * kernel.code_bytes(piece.block) for part in piece.parts]
