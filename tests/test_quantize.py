"""Int8 and Int4 against what their definitions say, one value at a time in plain Python."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco import blocks
from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)
USUAL = st.floats(width=32, min_value=-1, max_value=1)
VALUES = st.one_of(st.lists(FINITE, max_size=40), st.lists(USUAL, max_size=40))


def slow_int8(values: list[float], block: int) -> list[float]:
    found: list[float] = []
    for begin in range(0, len(values), block):
        part = [np.float32(value) for value in values[begin : begin + block]]
        scale = max(np.float32(max(abs(value) for value in part)) / np.float32(127), np.float32(2.0**-126))
        found += [float(np.float32(round(float(value / scale))) * scale) for value in part]
    return found


def slow_int4(values: list[float], block: int) -> list[float]:
    """E3M0 from its definition. The smallest level of all is 2^-126, to which all from its half up are rounded."""
    found: list[float] = []
    for begin in range(0, len(values), block):
        part = values[begin : begin + block]
        top = max(max(exponent(value) for value in part), -120)
        for value in part:
            rounded = exponent(value)
            found.append(math.copysign(2.0**rounded, value) if rounded >= top - 6 else 0.0)
    return found


def exponent(value: float) -> int:
    """Of the nearest power of two: from 1.5 times one upwards it is the next."""
    size = abs(value)
    if size < 2.0**-126:
        return -126 if size >= 2.0**-127 else -1000
    below = 2.0 ** (math.frexp(size)[1] - 1)
    return math.frexp(size)[1] - (1 if size < 1.5 * below else 0)


@given(values=VALUES, block=st.sampled_from([1, 4, 16]))
@settings(max_examples=150, deadline=None)
def test_int8_is_what_its_definition_says(values: list[float], block: int) -> None:
    codec = Int8(block=block)
    found = codec.decode(codec.encode({"a": torch.tensor(values)}))["a"]
    assert found.tolist() == slow_int8(values, block)


@given(values=VALUES, block=st.sampled_from([2, 4, 16]))
@settings(max_examples=150, deadline=None)
def test_int4_is_what_its_definition_says(values: list[float], block: int) -> None:
    codec = Int4(block=block)
    found = codec.decode(codec.encode({"a": torch.tensor(values)}))["a"].tolist()
    assert found == slow_int4(values, block)
    assert not any(value == 0 and math.copysign(1, value) < 0 for value in found)


@given(values=st.lists(FINITE, min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_int4_loses_at_most_a_third_down_to_a_64th_of_the_scale(values: list[float]) -> None:
    payload = Int4(block=64).encode({"a": torch.tensor(values)})
    scale = 2.0 ** (int(payload.body[0]) - 127)
    assert max(map(abs, values)) < 1.5 * scale
    for value, found in zip(values, Int4().decode(payload)["a"].tolist(), strict=True):
        assert abs(value - found) <= (abs(value) / 3 if abs(value) >= scale / 64 else scale / 64)


def test_int4_rounds_up_from_one_and_a_half() -> None:
    below = float(np.nextafter(np.float32(1.5), np.float32(0)))
    values = [2.0, 1.5, below, -1.0, 0.75, 1 / 32, 1.49 / 64, 0.74 / 32]
    found = Int4().decode(Int4().encode({"a": torch.tensor(values)}))["a"].tolist()
    assert found == [2.0, 2.0, 1.0, -1.0, 1.0, 1 / 32, 0.0, 0.0]


def test_the_bytes_of_int8() -> None:
    body = Int8(block=2).encode({"a": torch.tensor([127.0, -3.4, 0.0]), "b": torch.tensor(-254.0)}).body
    assert body[:12].view(np.float32).tolist() == [1.0, 2.0**-126, 2.0]
    assert body[12:].view(np.int8).tolist() == [127, -3, 0, -127]


def test_the_bytes_of_int4() -> None:
    # 0.1 = 1.6 * 2^-4 goes to 2^-3; -0.5 is one below the largest and negative
    body = Int4(block=2).encode({"a": torch.tensor([1.0, -0.5, 0.1]), "b": torch.tensor(-254.0)}).body
    assert body.tolist() == [127, 124, 135, 7 | (8 + 6) << 4, 7, 8 + 7]


@pytest.mark.parametrize("codec", [Int8(block=32), Int4(block=32), TopK(chunk=32)], ids=["int8", "int4", "topk"])
@pytest.mark.parametrize("values", [32, 64, 256])
def test_the_size_of_pieces_changes_no_byte(codec: Codec, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5, 0, 31, 32, 33, 700, 1, 64, 96, 257, 3, 3, 3, 1000, 256, 512, 40]
    tensors = {str(i): torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)}
    anchors = {name: value * 3 for name, value in tensors.items()}
    payload, difference = codec.encode(tensors), codec.encode_difference(anchors, tensors)
    decoded = codec.decode(payload)
    monkeypatch.setattr(blocks, "_CPU_VALUES", values)
    assert codec.encode(tensors).body.tobytes() == payload.body.tobytes()
    assert codec.encode_difference(anchors, tensors).body.tobytes() == difference.body.tobytes()
    assert all(torch.equal(value, decoded[name]) for name, value in codec.decode(payload).items())


@given(sizes=st.lists(st.integers(0, 100), max_size=20), block=st.sampled_from([1, 4, 16]), rows=st.integers(1, 8))
def test_pieces_hold_all_values_in_order(sizes: list[int], block: int, rows: int) -> None:
    pieces = list(blocks.cut(sizes, block=block, most=rows * block))
    assert all(0 < piece.rows <= rows for piece in pieces)
    assert all(sum(piece.rooms) == piece.rows * block for piece in pieces)
    parts = [part for piece in pieces for part in piece.parts]
    assert all(part.begin % block == 0 for part in parts)
    found = [(part.tensor, place) for part in parts for place in range(part.begin, part.end)]
    assert found == [(tensor, place) for tensor, size in enumerate(sizes) for place in range(size)]


@pytest.mark.parametrize("codec", [Int8(), Int4(), TopK()], ids=["int8", "int4", "topk"])
def test_an_anchor_that_nobody_may_write_to(codec: Codec) -> None:
    numbers = np.arange(5000, dtype=np.float32)
    numbers.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anchor = torch.from_numpy(numbers)
    found = codec.encode_difference({"a": anchor}, {"a": torch.ones(5000)})
    assert found.body.tobytes() == codec.encode({"a": torch.arange(5000.0) - 1}).body.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("codec", [Float32(), BFloat16(), Int8(), Int4(), TopK()], ids=str)
def test_a_gpu_gives_the_same_bytes(codec: Codec) -> None:
    tensors = {str(size): torch.randn(size) for size in (1, 63, 300_000, 0, 4097)}
    tensors["wide"] = torch.randn(1000, 65) * 10.0 ** torch.randint(-30, 30, (1000, 65))
    anchors = {name: value * 1.5 for name, value in tensors.items()}
    on_gpu = {name: value.cuda() for name, value in tensors.items()}
    assert codec.encode(on_gpu).body.tobytes() == codec.encode(tensors).body.tobytes()
    expected = codec.encode_difference(anchors, tensors).body.tobytes()
    assert codec.encode_difference(anchors, on_gpu).body.tobytes() == expected
