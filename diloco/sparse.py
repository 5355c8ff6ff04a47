"""The largest values of each chunk: which they are in a few bits, and what they are in fewer.

A body holds float32[chunks, 2] (the smallest and the largest magnitude that a chunk keeps), then the places within the
chunks, then signs and magnitudes, both packed bit after bit, the lowest first, all in the tensors' order. Chosen on the
tensors' device by integer keys without ties, so the same everywhere; the few that are kept are packed on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from diloco import buffers
from diloco.blocks import Piece, Source, rows_of

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_AT_ONCE = 1 << 16  # numbers packed at a time: a multiple of 8, so that each time begins with a whole byte


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """How many values of a chunk are kept, and in how many bits."""

    chunk: int
    density: float
    bits: int

    @property
    def place_bits(self) -> int:
        """Bits of a place within a chunk."""
        return self.chunk.bit_length() - 1

    @property
    def cells(self) -> int:
        """Between a chunk's smallest and largest kept magnitude."""
        return 1 << (self.bits - 1)

    def kept(self, length: int) -> int:
        """How many values of a chunk of this length are sent."""
        return max(1, round(self.density * length))

    def lengths(self, sizes: Sequence[int]) -> Array:
        """int64[chunks]: how many values each chunk has, of tensors (or parts of them) of these sizes."""
        found = [self.chunk] * sum(rows_of(size, self.chunk) for size in sizes)
        row = 0
        for size in sizes:
            row += rows_of(size, self.chunk)
            if size % self.chunk:
                found[row - 1] = size % self.chunk
        return np.array(found, dtype=np.int64)

    def counts(self, lengths: Array) -> Array:
        """int64[chunks]: how many of each are kept."""
        by_length = {length: self.kept(length) for length in set(lengths.tolist())}
        return np.array([by_length[length] for length in lengths.tolist()], dtype=np.int64)


def encode(sparse: Sparse, source: Source) -> Array:
    """The body, as this file's first lines have it."""
    bounds, places, codes = [np.empty((0, 2), np.float32)], [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    for piece, values in source.pieces():
        found = _chosen(sparse, piece, values)
        bounds.append(found[0].cpu().numpy())
        places.append(found[1].cpu().numpy())
        codes.append(found[2].cpu().numpy())
    packed = pack(np.concatenate(places), sparse.place_bits), pack(np.concatenate(codes), sparse.bits)
    return np.concatenate([np.concatenate(bounds).reshape(-1).view(np.uint8), *packed])


def decode(sparse: Sparse, body: Array, sizes: Sequence[int]) -> torch.Tensor:
    """Flat float32 values of tensors of these sizes. Raises ValueError for a wrong size, or a place outside."""
    lengths = sparse.lengths(sizes)
    counts = sparse.counts(lengths)
    kept = int(counts.sum())
    ends = np.cumsum([8 * len(lengths), packed_bytes(kept, sparse.place_bits), packed_bytes(kept, sparse.bits)])
    if body.size != ends[2]:
        raise ValueError(
            f"the payload has {body.size} bytes instead of {ends[2]}: damaged, or encoded with other settings than"
            f" chunk={sparse.chunk}, density={sparse.density:g}, bits={sparse.bits}; give both sides the same"
        )
    places = unpack(body[ends[0] : ends[1]], sparse.place_bits, kept)
    codes = unpack(body[ends[1] :], sparse.bits, kept)
    if (places >= np.repeat(lengths, counts)).any():
        raise ValueError("the payload is damaged: it names a place behind the end of a tensor")
    bounds = torch.from_numpy(body[: ends[0]].copy().view(np.float32)).view(-1, 2)
    magnitudes = _levels(sparse, bounds).reshape(-1)  # float32[chunks * cells]
    rows = np.repeat(np.arange(len(lengths)), counts)
    values = magnitudes.numpy()[rows * sparse.cells + codes % sparse.cells]
    np.negative(values, out=values, where=codes >= sparse.cells)
    flat = buffers.flat(int(lengths.sum())).zero_()
    flat.numpy()[np.repeat(np.cumsum(lengths) - lengths, counts) + places] = values
    return flat


def _chosen(sparse: Sparse, piece: Piece, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32[rows, 2], and of all that is kept int32 places and uint8 codes: sign * cells + the magnitude's cell.

    A zero is not worth its bits: its place tells the chunk's largest once more.
    """
    lengths = sparse.lengths([part.size for part in piece.parts])
    counts = torch.from_numpy(sparse.counts(lengths)).to(values.device)
    magnitudes = values.view(torch.int32).bitwise_and(0x7FFFFFFF)  # NaN is larger than infinity, unlike in floats
    # At equal magnitudes the first place; the filling comes behind all that is real.
    order = torch.arange(0xFFFF, 0xFFFF - sparse.chunk, -1, device=values.device)
    keys = magnitudes.long().bitwise_left_shift_(16).bitwise_or_(order)  # int64[rows, chunk]
    keys = keys.topk(sparse.kept(int(lengths.max())), dim=1).values  # int64[rows, kept], the largest first
    keys = torch.where(keys >> 16 == 0, keys[:, :1], keys)
    valid = torch.arange(keys.shape[1], device=values.device) < counts[:, None]
    keys = torch.where(valid, keys, keys[:, :1])
    places = 0xFFFF - (keys & 0xFFFF)
    found = (keys >> 16).int().view(torch.float32)  # float32[rows, kept]: magnitudes
    bounds = torch.stack([found.amin(1), found.amax(1)], 1)
    low, width = bounds[:, :1], bounds[:, 1:] - bounds[:, :1]
    cells = ((found - low) / torch.where(width == 0, 1.0, width) * sparse.cells).nan_to_num(0.0).int()
    codes = cells.clamp(0, sparse.cells - 1) + sparse.cells * (values.gather(1, places) < 0)
    return bounds, places[valid].int(), codes[valid].to(torch.uint8)


def _levels(sparse: Sparse, bounds: torch.Tensor) -> torch.Tensor:
    """float32[chunks, 2] -> float32[chunks, cells]: the middles of the cells."""
    middles = (torch.arange(sparse.cells) + 0.5) / sparse.cells
    return bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * middles


def packed_bytes(count: int, bits: int) -> int:
    """Bytes for so many numbers of so many bits."""
    return -(-count * bits // 8)


def pack(numbers: Array, bits: int) -> Array:
    """Integers below 2^bits -> uint8 bytes, each number's lowest bit first, without gaps."""
    found = [np.empty(0, np.uint8)]
    for begin in range(0, len(numbers) if bits else 0, _AT_ONCE):
        part = numbers[begin : begin + _AT_ONCE, None] >> np.arange(bits, dtype=np.int32)
        found.append(np.packbits((part & 1).astype(np.uint8), bitorder="little"))
    return np.concatenate(found)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """int64[count]: the numbers that `pack` was given."""
    numbers = np.zeros(count, dtype=np.int64)
    for begin in range(0, count if bits else 0, _AT_ONCE):
        part = numbers[begin : begin + _AT_ONCE]
        first = begin * bits // 8
        taken = packed[first : first + packed_bytes(len(part), bits)]
        taken = np.unpackbits(taken, count=len(part) * bits, bitorder="little").reshape(-1, bits)
        for bit in range(bits):
            part |= taken[:, bit].astype(np.int64) << bit
    return numbers
