"""Tensors as rows of values: blocks that never straddle two tensors, read a cache-sized piece at a time.

A tensor's last row is filled up with zeros, and several small tensors share a piece, so that whoever works on rows
sees float32[rows, block] and pays for a call as seldom as for one large tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diloco.messages import Tensors

LARGEST = 65_536  # values of a block: a smaller tensor is filled up to one
_CPU_VALUES = 262_144  # of a piece: it and what is made of it stay in the cache, and calls cost little beside it
_DEVICE_VALUES = 1 << 24  # few calls, since each costs a launch


class Part(NamedTuple):
    """Some values of one tensor, from the beginning of a block."""

    tensor: int  # its place in the order
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many values."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows."""

    parts: tuple[Part, ...]
    block: int
    rows: int

    @property
    def whole(self) -> bool:
        """Whether it is one stretch of one tensor without filling."""
        return len(self.parts) == 1 and self.parts[0].size == self.rows * self.block

    @property
    def rooms(self) -> list[int]:
        """Of each part, its values and the filling."""
        return [rows_of(part.size, self.block) * self.block for part in self.parts]


def rows_of(size: int, block: int) -> int:
    """How many blocks `size` values of one tensor fill, the last perhaps not wholly."""
    return -(-size // block)


def piece_values(block: int, device: torch.device) -> int:
    """The most values of a piece, a multiple of `block`."""
    return max(block, _CPU_VALUES if device.type == "cpu" else _DEVICE_VALUES)


def cut(sizes: Sequence[int], *, block: int, most: int) -> Iterator[Piece]:
    """All values of tensors of these sizes, in order. `most`: values of a piece, a multiple of `block`."""
    parts: list[Part] = []
    rows, most_rows = 0, most // block
    for tensor, size in enumerate(sizes):
        begin = 0
        while begin < size:
            if rows == most_rows or (rows and size - begin >= most):  # full, or what comes is better alone
                yield Piece(parts=tuple(parts), block=block, rows=rows)
                parts, rows = [], 0
            part = Part(tensor, begin, min(size, begin + (most_rows - rows) * block))
            parts.append(part)
            rows += rows_of(part.size, block)
            begin = part.end
    if parts:
        yield Piece(parts=tuple(parts), block=block, rows=rows)


def fill_up(parts: Sequence[torch.Tensor], rooms: Sequence[int], *, out: torch.Tensor) -> None:
    """One after the other into the flat `out`, each filled up with zeros to its room."""
    lacking = [room - part.numel() for part, room in zip(parts, rooms, strict=True)]
    fillings = torch.split(torch.zeros(sum(lacking), dtype=out.dtype, device=out.device), lacking)
    torch.cat([x for pair in zip(parts, fillings, strict=True) for x in pair], out=out)


def without_filling(filled: torch.Tensor, sizes: Sequence[int], rooms: Sequence[int]) -> torch.Tensor:
    """The flat parts that `fill_up` put into `filled`, one after the other."""
    lengths = [x for size, room in zip(sizes, rooms, strict=True) for x in (size, room - size)]
    return torch.cat(torch.split(filled, lengths)[::2])


class Source:
    """Tensors to be read in pieces, or what `minuend` has more than they, on the device of the first of them."""

    def __init__(self, tensors: Tensors, minuend: Tensors | None = None, *, block: int) -> None:
        self._values = [value.detach().reshape(-1) for value in tensors.values()]
        self._minuend = None if minuend is None else [minuend[name].detach().reshape(-1) for name in tensors]
        self.sizes = [value.numel() for value in self._values]
        self.device = self._values[0].device if self._values else torch.device("cpu")
        self._block = block
        self._most = piece_values(block, self.device)
        self.rows = min(self._most // block, sum(rows_of(size, block) for size in self.sizes))  # the most of a piece
        self._scratch = torch.empty(2, self.rows * block, device=self.device)

    def pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece and its values, float32[rows, block]: to be read, until the next piece."""
        for piece in cut(self.sizes, block=self._block, most=self._most):
            yield piece, self._read(piece).view(piece.rows, self._block)

    def _read(self, piece: Piece) -> torch.Tensor:
        first, second = self._scratch[:, : piece.rows * self._block]
        if self._minuend is None:
            return self._gather(self._values, piece, first)
        more = self._gather(self._minuend, piece, first)
        return torch.sub(more, self._gather(self._values, piece, second), out=first)

    def _gather(self, tensors: Sequence[torch.Tensor], piece: Piece, scratch: torch.Tensor) -> torch.Tensor:
        parts = [self._values_of(tensors[part.tensor], part) for part in piece.parts]
        if piece.whole:
            return parts[0]
        fill_up(parts, piece.rooms, out=scratch)
        return scratch

    def _values_of(self, flat: torch.Tensor, part: Part) -> torch.Tensor:
        """float32 on the device. Each step that nothing needs is left out: small tensors are many."""
        if part.size != flat.numel():
            flat = flat[part.begin : part.end]
        if flat.dtype != torch.float32 or flat.device != self.device:
            flat = flat.to(device=self.device, dtype=torch.float32)
        return flat
