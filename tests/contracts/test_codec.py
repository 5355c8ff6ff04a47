"""What every Codec keeps: one row of ROWS for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.codec import BFloat16, Codec, Float32, header_shapes
from diloco.messages import Payload, Shape, Tensors


@dataclass(frozen=True)
class Row:
    name: str
    codec: Codec
    bits: float  # a parameter, header apart
    relative_error: float  # of any element


ROWS = {
    "float32": Row("float32", Float32(), 32, 0.0),
    "bfloat16": Row("bfloat16", BFloat16(), 16, 2.0**-8),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def make(shapes: dict[str, Shape], seed: int) -> Tensors:
    """Values over many orders of magnitude, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 10.0 ** torch.randint(-12, 12, shape, generator=generator)
        kept = torch.rand(shape, generator=generator) > 0.1
        tensors[name] = torch.randn(shape, generator=generator) * scale * kept
    return tensors


SHAPES = st.one_of(
    st.lists(st.integers(0, 6), max_size=4).map(tuple),  # 0-d, empty and small
    st.sampled_from([(70_000,), (1000, 33), (1,), ()]),  # larger than the rest together
)
# few tensors of any kind, and many small ones
LAYOUTS = st.one_of(
    st.dictionaries(st.text(min_size=1, max_size=12), SHAPES, max_size=6),
    st.integers(50, 200).map(lambda count: {f"layers.{i}.weight": (i % 5,) for i in range(count)}),
)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@given(shapes=LAYOUTS, seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_no_element_is_lost_whatever_the_sizes(row: Row, shapes: dict[str, Shape], seed: int) -> None:
    tensors = make(shapes, seed)
    payload = row.codec.encode(tensors)
    decoded = row.codec.decode(payload)
    assert list(decoded) == list(tensors)
    assert header_shapes(payload) == shapes
    for name, value in decoded.items():
        assert value.dtype == torch.float32
        assert tuple(value.shape) == shapes[name]
        error = (value.double() - tensors[name].double()).abs()
        assert bool((error <= row.relative_error * tensors[name].double().abs()).all())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@given(shapes=LAYOUTS, seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_difference_is_encoded_to_the_same_bytes(row: Row, shapes: dict[str, Shape], seed: int) -> None:
    anchor, local = make(shapes, seed), make(shapes, seed + 1)
    parameters = {name: torch.nn.Parameter(value) for name, value in local.items()}
    found = row.codec.encode_difference(dict(reversed(anchor.items())), {n: p.detach() for n, p in parameters.items()})
    expected = row.codec.encode({name: anchor[name] - local[name] for name in shapes})
    assert (found.codec, found.header) == (expected.codec, expected.header)
    assert found.body.tobytes() == expected.body.tobytes()


def test_the_body_is_one_buffer_of_the_promised_size(row: Row) -> None:
    tensors = make({"a": (300, 7), "b": (), "c": (0, 4)}, 0)
    payload = row.codec.encode(tensors)
    assert payload.codec == row.name
    assert payload.body.dtype == np.uint8
    assert payload.body.ndim == 1
    assert payload.body.flags.c_contiguous
    assert payload.body.nbytes == 2101 * row.bits / 8
    assert payload.nbytes == len(payload.header) + payload.body.nbytes


def test_the_same_tensors_give_the_same_bytes(row: Row) -> None:
    first, second = (row.codec.encode(make({"a": (20, 3), "b": ()}, 5)) for _ in range(2))
    assert (first.header, first.body.tobytes()) == (second.header, second.body.tobytes())


def test_what_was_encoded_is_left_as_it_was(row: Row) -> None:
    tensors = make({"a": (20, 3), "b": ()}, 5)
    before = {name: value.clone() for name, value in tensors.items()}
    payload = row.codec.encode(tensors)
    for name, value in row.codec.decode(payload).items():
        value.fill_(9.0)
        assert torch.equal(tensors[name], before[name])
    tensors["a"].fill_(3.0)  # nor is the payload a view of them
    again = row.codec.decode(payload)["a"]
    assert not bool((again == 3.0).any())


def test_decoded_tensors_are_fresh_and_writable(row: Row) -> None:
    payload = row.codec.encode(make({"a": (20, 3)}, 5))
    body = payload.body.copy()
    first, second = row.codec.decode(payload), row.codec.decode(payload)
    first["a"].add_(1.0)
    assert not torch.equal(first["a"], second["a"])
    assert np.array_equal(payload.body, body)


def test_a_read_only_body_decodes(row: Row) -> None:
    """Ray hands out buffers of shared memory that nobody may write to."""
    payload = row.codec.encode(make({"a": (20, 3)}, 5))
    expected = row.codec.decode(payload)["a"]
    payload.body.flags.writeable = False
    decoded = row.codec.decode(payload)["a"]
    assert torch.equal(decoded, expected)
    decoded.zero_()


def test_a_view_reads_what_decoding_gives(row: Row) -> None:
    payload = row.codec.encode(make({"a": (20, 3), "b": (), "c": (0, 2)}, 5))
    for writeable in (True, False):
        payload.body.flags.writeable = writeable
        decoded, viewed = row.codec.decode(payload), row.codec.view(payload)
        assert list(viewed) == list(decoded)
        for name, value in decoded.items():
            assert viewed[name].dtype == torch.float32
            assert viewed[name].shape == value.shape
            assert torch.equal(viewed[name], value)


def test_any_memory_layout_is_read_in_the_order_of_the_elements(row: Row) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    strided = {"t": base.T, "s": base[:, ::2], "grad": base.clone().requires_grad_()}
    decoded = row.codec.decode(row.codec.encode(strided))
    for name, value in strided.items():
        assert torch.equal(decoded[name], value.detach())  # small integers are exact in every codec


def test_values_that_are_not_finite_stay_so(row: Row) -> None:
    """Else the store could not refuse them."""
    tensors = {"a": torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])}
    decoded = row.codec.decode(row.codec.encode(tensors))["a"]
    assert decoded.isfinite().tolist() == [True, False, False, False]


def test_nothing_at_all_can_be_encoded(row: Row) -> None:
    assert row.codec.decode(row.codec.encode({})) == {}


def test_a_payload_of_another_codec_is_refused(row: Row) -> None:
    payload = row.codec.encode({"a": torch.ones(4)})
    foreign = Payload(codec="another", header=payload.header, body=payload.body)
    with pytest.raises(ValueError, match=f"another.*{row.name}"):
        row.codec.decode(foreign)


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    # 1 + 2^-8 lies in the middle of 1 and 1 + 2^-7: to the even one, 1; 1 + 3 * 2^-8 to 1 + 2^-6
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    decoded = BFloat16().decode(BFloat16().encode({"a": values}))["a"]
    assert decoded.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


@pytest.mark.parametrize("part", [Float32, BFloat16])
def test_error_feedback_is_refused_where_there_is_none(part: type[Float32] | type[BFloat16]) -> None:
    with pytest.raises(ValueError, match="error_feedback"):
        part(error_feedback=True)


def test_bits_are_those_of_any_payload(row: Row) -> None:
    assert row.codec.bits() == pytest.approx(row.bits)
