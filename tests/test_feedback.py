"""Error feedback: what was sent and accepted, and the residual, are together what was meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.codec import BFloat16, Codec, Float32
from diloco.feedback import Feedback
from diloco.messages import Payload, Settled, Tensors


class Coarse(Codec):
    """Whole numbers only: what it loses is easy to see. Its feedback fades where `decay` says so."""

    decay = 1.0

    @property
    def feedback_decay(self) -> float:
        return self.decay

    def encode(self, tensors: Tensors) -> Payload:
        rounded = Float32().encode({name: value.round() for name, value in tensors.items()})
        return Payload(codec="coarse", header=rounded.header, body=rounded.body)

    def decode(self, payload: Payload) -> Tensors:
        return Float32().decode(Payload(codec="float32", header=payload.header, body=payload.body))


class Fading(Coarse):
    decay = 0.5


def one(value: float) -> Tensors:
    return {"w": torch.full((3,), value)}


def told(round_: int, accepted: bool, fragment: int = 0) -> Settled:
    return Settled(round=round_, fragment=fragment, accepted=accepted)


def test_what_a_rounding_lost_comes_with_the_next() -> None:
    """.4 is sent as 0; .4 + .4 = .8 as 1, which leaves -.2; then .4 - .2 = .2 as 0."""
    feedback, codec = Feedback(), Coarse(error_feedback=True)
    sent = []
    for round_ in range(3):
        payload = feedback.around(codec, round_, 0).encode(one(0.4))
        sent.append(codec.decode(payload)["w"].tolist())
        feedback.settle([told(round_, True)])
    assert sent == [[0.0] * 3, [1.0] * 3, [0.0] * 3]
    torch.testing.assert_close(feedback.residual["w"], torch.full((3,), 0.2))


def test_the_residual_fades() -> None:
    """meant = .5 * residual + .4: .4, then .6 is sent as 1 and leaves -.4."""
    feedback, codec = Feedback(), Fading(error_feedback=True)
    for round_ in range(2):
        feedback.around(codec, round_, 0).encode(one(0.4))
        feedback.settle([told(round_, True)])
    torch.testing.assert_close(feedback.residual["w"], torch.full((3,), -0.4))


@given(
    meant=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    accepted=st.lists(st.sampled_from([True, False, None]), min_size=12, max_size=12),
    twice=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_nothing_accepted_is_lost(meant: list[float], accepted: list[bool | None], twice: bool) -> None:
    """Of what was refused, or of which nothing was heard, nothing is added; verdicts may be told again and again."""
    feedback, codec = Feedback(), BFloat16(error_feedback=True)
    total, sent = np.zeros(3), np.zeros(3)
    verdicts: list[Settled] = []
    for round_, (value, verdict) in enumerate(zip(meant, accepted, strict=False)):
        delta = {"w": torch.tensor([value, value / 3, value / 7])}
        before = {name: kept.clone() for name, kept in feedback.residual.items()}
        payload = feedback.around(codec, round_, 0).encode_difference(delta, {"w": torch.zeros(3)})
        if verdict is not None:
            verdicts.append(told(round_, verdict))
        feedback.settle(verdicts[-3:] if twice else verdicts[-1:])
        if verdict:
            total += delta["w"].double().numpy()
            sent += codec.decode(payload)["w"].double().numpy()
        else:
            assert all(torch.equal(feedback.residual[name], kept) for name, kept in before.items())
            assert before.keys() == feedback.residual.keys()
    residual = feedback.residual["w"].double().numpy() if feedback.residual else 0.0
    np.testing.assert_allclose(sent + residual, total, rtol=1e-5, atol=1e-4)


def test_fragments_are_settled_each_for_itself() -> None:
    feedback, codec = Feedback(), Coarse(error_feedback=True)
    feedback.around(codec, 0, 0).encode({"a": torch.tensor([0.25])})
    feedback.around(codec, 0, 1).encode({"b": torch.tensor([0.5])})
    feedback.settle([told(0, False, fragment=0), told(0, True, fragment=1)])
    assert feedback.residual.keys() == {"b"}


def test_it_survives_being_saved_between_sending_and_the_verdict() -> None:
    feedback, codec = Feedback(), Coarse(error_feedback=True)
    feedback.around(codec, 0, 0).encode({"deep.w": torch.tensor([0.25])})
    feedback.settle([told(0, True)])
    feedback.around(codec, 1, 0).encode({"deep.w": torch.tensor([0.125])})
    saved = feedback.state()
    parts: dict[str, Tensors] = {"residual": {}, "pending": {}}
    for name, value in saved.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    loaded = Feedback()
    loaded.load(parts)
    for each in (feedback, loaded):
        assert each.residual["deep.w"].tolist() == [0.25]
        each.settle([told(1, True)])
        assert each.residual["deep.w"].tolist() == [0.375]


def test_without_feedback_the_codec_itself_encodes() -> None:
    feedback, codec = Feedback(), BFloat16()
    assert feedback.around(codec, 0, 0) is codec
    assert feedback.state() == {}


@pytest.mark.parametrize("codec", [Float32(error_feedback=True), BFloat16(error_feedback=True)])
def test_the_difference_is_taken_before_any_cast(codec: Codec) -> None:
    """Anchor and weights nearly alike: their difference in float32 is exact (pitfall L11)."""
    anchor, local = {"w": torch.tensor([1.0 + 2**-20])}, {"w": torch.tensor([1.0])}
    payload = Feedback().around(codec, 0, 0).encode_difference(anchor, local)
    assert codec.decode(payload)["w"].tolist() == [2**-20]
