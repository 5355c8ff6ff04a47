"""TopK's parts: packed bits against examples made by hand, and the choice against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco import sparse
from diloco.codec import TopK


def test_three_numbers_of_three_bits() -> None:
    # 5, 1, 6, lowest bit first: 101 100 01|1
    packed = sparse.pack(np.array([5, 1, 6], dtype=np.int32), 3)
    assert packed.tolist() == [0b10001101, 0b1]
    assert sparse.unpack(packed, 3, 3).tolist() == [5, 1, 6]


@given(bits=st.integers(0, 16), count=st.integers(0, 50), seed=st.integers(0, 1000))
def test_packing_is_undone(bits: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=np.int32)
    packed = sparse.pack(numbers, bits)
    assert packed.dtype == np.uint8 and len(packed) == sparse.packed_bytes(count, bits)
    assert sum(int(byte) << 8 * i for i, byte in enumerate(packed)) == sum(
        int(number) << bits * i for i, number in enumerate(numbers)
    )
    assert np.array_equal(sparse.unpack(packed, bits, count), numbers)


@pytest.mark.parametrize("bits", [3, 12])
def test_many_numbers_are_packed_a_part_at_a_time(bits: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, 200_001, dtype=np.int32)
    packed = sparse.pack(numbers, bits)
    assert len(packed) == sparse.packed_bytes(200_001, bits)
    assert np.array_equal(sparse.unpack(packed, bits, 200_001), numbers)


def test_the_bytes_of_topk() -> None:
    codec = TopK(chunk=4, density=0.5, bits=2)
    payload = codec.encode({"a": torch.tensor([1.0, -4.0, 0.0, 3.0, 2.0])})
    # chunk one keeps -4 and 3, the larger first; the last is alone
    assert payload.body[:16].view(np.float32).tolist() == [3.0, 4.0, 2.0, 2.0]
    assert payload.body[16:].tolist() == [1 | 3 << 2 | 0 << 4, 0b11 | 0b00 << 2 | 0b00 << 4]
    assert codec.decode(payload)["a"].tolist() == [0.0, -3.75, 0.0, 3.25, 2.0]


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 4.0, 5.5]), min_size=1, max_size=70),
    density=st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_are_kept_and_of_equals_the_first(values: list[float], density: float) -> None:
    codec = TopK(chunk=16, density=density, bits=8)
    found = codec.decode(codec.encode({"a": torch.tensor(values)}))["a"].tolist()
    for begin in range(0, len(values), 16):
        part = values[begin : begin + 16]
        order = sorted(range(len(part)), key=lambda place: -abs(part[place]))  # stable
        kept = {place for place in order[: max(1, round(density * len(part)))] if part[place]}
        got = found[begin : begin + 16]
        assert {place for place, value in enumerate(got) if value} == kept
        assert all(got[place] * part[place] > 0 for place in kept)


def test_a_chunk_of_few_values_sends_no_zeros() -> None:
    """Else zeros would come back as what the lowest cell stands for."""
    values = torch.zeros(4096)
    values[[7, 4000]] = torch.tensor([2.0, -2.0])
    assert torch.equal(TopK().decode(TopK().encode({"a": values}))["a"], values)
