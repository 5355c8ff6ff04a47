"""What every Codec keeps: one row of ROWS for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK, header_shapes, make_header
from diloco.messages import Payload, Shape, Tensors

Bound = Callable[[torch.Tensor], torch.Tensor]  # float64 values of one tensor, flat -> the most that each may lose


@dataclass(frozen=True)
class Row:
    name: str
    codec: Codec
    bits: float  # a parameter, header apart, where blocks are whole
    bound: Bound


def relative(share: float) -> Bound:
    return lambda values: share * values.abs()


def in_blocks(block: int, bound: Bound) -> Bound:
    """A bound that depends on the rest of a value's block."""
    return lambda values: torch.cat([bound(part) for part in torch.split(values, block)])


def of_int8(values: torch.Tensor) -> torch.Tensor:
    """Half a step of absmax / 127, and what float32's own rounding adds."""
    step = max(float(values.abs().amax()) / 127, 2.0**-126) if values.numel() else 0.0
    return torch.full_like(values, step * 0.5001)


def of_int4(values: torch.Tensor) -> torch.Tensor:
    """A third down to a 64th of the scale, which is at most 4/3 of the largest value; below it perhaps all."""
    size = values.abs()
    largest = float(size.amax()) if values.numel() else 0.0
    scale = max(2.0 ** round_to_power(largest), 2.0**-120) if largest else 0.0
    return torch.where(size >= scale / 64, size / 3, torch.maximum(size, torch.full_like(size, scale / 256)))


def round_to_power(value: float) -> int:
    """The exponent of the nearest power of two; at 1.5 the next."""
    return math.frexp(value / 1.5)[1]


def of_topk(share: float, bits: int) -> Bound:
    def bound(values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return values
        size = values.abs()
        kept = size.topk(max(1, round(share * len(size)))).values
        real = kept[kept > 0] if bool((kept > 0).any()) else kept
        cell = (real[0] - real[-1]) / 2**bits * (1 + 1e-5) + real[0] * 2.0**-22  # float32's own rounding
        return torch.where(size < kept[-1], size, torch.where(size == kept[-1], torch.maximum(size, cell), cell))

    return bound


ROWS = {
    "float32": Row("float32", Float32(), 32, relative(0.0)),
    "bfloat16": Row("bfloat16", BFloat16(), 16, relative(2.0**-8)),
    "int8": Row("int8", Int8(), 8 + 32 / 256, in_blocks(256, of_int8)),
    "int8 of 16": Row("int8", Int8(block=16), 8 + 32 / 16, in_blocks(16, of_int8)),
    "int4": Row("int4", Int4(), 4 + 8 / 64, in_blocks(64, of_int4)),
    "int4 of 16": Row("int4", Int4(block=16), 4 + 8 / 16, in_blocks(16, of_int4)),
    "topk": Row("topk", TopK(), (64 * (12 + 2) + 64) / 4096, in_blocks(4096, of_topk(1 / 64, 2))),
    "topk of 16": Row(
        "topk", TopK(chunk=16, density=0.3, bits=5), (5 * (4 + 5) + 64) / 16, in_blocks(16, of_topk(0.3, 5))
    ),
    "topk of all": Row("topk", TopK(chunk=8, density=1, bits=8), 8 + 3 + 8, in_blocks(8, of_topk(1, 8))),
}
EXACT = ("float32", "bfloat16")  # for small integers


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
        given = tensors[name].double().reshape(-1)
        assert bool(((value.double().reshape(-1) - given).abs() <= row.bound(given)).all())


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
    tensors = make({"a": (128, 96), "b": (4096,), "c": (0, 4)}, 0)
    payload = row.codec.encode(tensors)
    assert payload.codec == row.name
    assert payload.body.dtype == np.uint8
    assert payload.body.ndim == 1
    assert payload.body.flags.c_contiguous
    assert payload.body.nbytes == 16_384 * row.bits / 8 == 2048 * row.codec.parameter_bits()
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
    assert torch.equal(again, row.codec.decode(row.codec.encode(before))["a"])


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
    plain = {name: value.detach().clone().contiguous() for name, value in strided.items()}
    expected = row.codec.decode(row.codec.encode(plain))
    for name, value in plain.items():
        assert torch.equal(decoded[name], value if row.name in EXACT else expected[name])


def test_other_floats_are_read_as_float32(row: Row) -> None:
    wide = {name: value.double() for name, value in make({"a": (300, 7), "b": (), "c": (5,)}, 3).items()}
    narrow = {name: value.float() for name, value in wide.items()}
    assert row.codec.encode(wide).body.tobytes() == row.codec.encode(narrow).body.tobytes()


def test_zeros_stay_zeros(row: Row) -> None:
    decoded = row.codec.decode(row.codec.encode({"a": torch.zeros(5000), "b": torch.full((), -0.0)}))
    for value in decoded.values():
        assert not bool(value.any())


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 99, 5000, 69_999])
def test_values_that_are_not_finite_stay_so(row: Row, bad: float, place: int) -> None:
    """Else the store could not refuse them."""
    tensors = {"a": torch.zeros(70_000), "b": torch.ones(100)}
    tensors["a"][place] = bad
    decoded = row.codec.decode(row.codec.encode(tensors))
    assert not bool(decoded["a"][place].isfinite())
    assert bool(decoded["b"].isfinite().all())


def test_nothing_at_all_can_be_encoded(row: Row) -> None:
    assert row.codec.decode(row.codec.encode({})) == {}


def test_a_payload_of_another_codec_is_refused(row: Row) -> None:
    payload = row.codec.encode({"a": torch.ones(4)})
    foreign = Payload(codec="another", header=payload.header, body=payload.body)
    with pytest.raises(ValueError, match=f"another.*{row.name}"):
        row.codec.decode(foreign)


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_a_damaged_body_is_refused(row: Row, change: int) -> None:
    payload = row.codec.encode(make({"a": (20, 3), "b": (7,)}, 5))
    body = payload.body[:change] if change < 0 else np.concatenate([payload.body, np.zeros(change, np.uint8)])
    with pytest.raises(ValueError):
        row.codec.decode(Payload(codec=row.name, header=payload.header, body=body))
    for header in (make_header({"a": torch.zeros(9, 1000)}), b"{", b'{"shapes": [["a", [-1]]]}'):
        with pytest.raises(ValueError):
            row.codec.decode(Payload(codec=row.name, header=header, body=payload.body))


@given(body=st.binary(min_size=10, max_size=10))
@settings(max_examples=50, deadline=None)
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    """Whatever they mean, nothing outside is read or written."""
    for codec, name, size in ((Int8(block=8), "int8", 6), (Int4(block=8), "int4", 16), (TopK(chunk=64), "topk", 5)):
        payload = Payload(
            codec=name, header=make_header({"a": torch.zeros(size)}), body=np.frombuffer(body, dtype=np.uint8)
        )
        try:
            assert codec.decode(payload)["a"].shape == (size,)
        except ValueError:
            assert name == "topk"


def test_a_place_behind_the_end_is_refused() -> None:
    codec = TopK(chunk=8, density=0.25)
    payload = codec.encode({"a": torch.arange(5.0)})
    payload.body[8] = 5
    with pytest.raises(ValueError, match="behind the end"):
        codec.decode(payload)


def test_error_feedback_is_a_choice_with_every_codec() -> None:
    for part in (Float32, BFloat16, Int8, Int4, TopK):
        assert part(error_feedback=True).error_feedback
        assert part().error_feedback is (part is TopK)
        assert part().feedback_decay == (0.95 if part is TopK else 1.0)
    assert TopK(decay=0.5).feedback_decay == 0.5


@dataclass(kw_only=True)
class Signs(Codec):
    """A user's own, with nothing but what is abstract."""

    def encode(self, tensors: Tensors) -> Payload:
        flat = torch.cat([value.reshape(-1) for value in tensors.values()])
        return Payload(codec="signs", header=make_header(tensors), body=np.packbits(flat.numpy() > 0))

    def decode(self, payload: Payload) -> Tensors:
        raise NotImplementedError


def test_a_codec_of_the_users_own_says_its_size() -> None:
    assert Signs().parameter_bits() == 1
    assert Signs().feedback_decay == 1


@pytest.mark.parametrize(
    ("make_codec", "said"),
    [
        (lambda: Int8(block=48), "codec.block=48 must be a positive power of two"),
        (lambda: Int8(block=0), "codec.block=0"),
        (lambda: Int8(block=-4), "codec.block=-4"),
        (lambda: Int8(block=1 << 17), "65536"),
        (lambda: Int4(block=1), "codec.block=1 .* from 2"),
        (lambda: Int4(block=65), "codec.block=65"),
        (lambda: TopK(chunk=1000), "codec.chunk=1000"),
        (lambda: TopK(chunk=1 << 17), "codec.chunk=131072"),
        (lambda: TopK(density=0), "codec.density=0 must be above 0"),
        (lambda: TopK(density=1.5), "codec.density=1.5"),
        (lambda: TopK(density=float("nan")), "codec.density=nan"),
        (lambda: TopK(bits=1), "codec.bits=1 must be from 2 to 8"),
        (lambda: TopK(bits=9), "codec.bits=9"),
        (lambda: TopK(decay=-0.1), "codec.decay=-0.1"),
        (lambda: TopK(decay=1.1), "codec.decay=1.1 must be from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_codec: Callable[[], Codec], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_codec()


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    # 1 + 2^-8 lies in the middle of 1 and 1 + 2^-7: to the even one, 1; 1 + 3 * 2^-8 to 1 + 2^-6
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    decoded = BFloat16().decode(BFloat16().encode({"a": values}))["a"]
    assert decoded.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]
