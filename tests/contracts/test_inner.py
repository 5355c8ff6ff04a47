"""What every Inner keeps: one row of ROWS for each; and the rate schedules by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diloco.inner import AdamW, ComputeDtype, Inner, Muon, RateSchedule, Sgd, set_rate

ROWS: dict[str, Inner] = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "muon": Muon(lr=0.02, adamw_lr=0.01, weight_decay=0.1),
    "sgd": Sgd(lr=0.1, weight_decay=0.1),
    "sgd_momentum": Sgd(lr=0.1, weight_decay=0.1, momentum=0.9),
}


@pytest.fixture(params=ROWS)
def inner(request: pytest.FixtureRequest) -> Inner:
    return ROWS[request.param]


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (6, 4),
        "layers.0.mlp.weight": (4, 4),
        "layers.0.mlp.bias": (4,),
        "layers.0.conv.weight": (2, 3, 3),
        "norm.weight": (4,),
        "temperature": (),
        "lm_head.weight": (6, 4),
    }
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def test_each_parameter_is_held_exactly_once(inner: Inner) -> None:
    params = parameters()
    held = [p for o in inner.build(params) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, params.values()))


@pytest.mark.parametrize("only", ["layers.0.mlp.weight", "norm.weight", "lm_head.weight"])
def test_one_parameter_alone_can_be_trained(inner: Inner, only: str) -> None:
    params = {only: parameters()[only]}
    held = [p for o in inner.build(params) for group in o.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(params[only])]


def test_every_parameter_moves_with_its_gradient_and_against_it(inner: Inner) -> None:
    params = parameters()
    optimizers = inner.build(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in params.values():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in params.items():
        assert bool(p.detach().sum() < before[name].sum()), name


def test_weight_decay_is_on_matrices_only(inner: Inner) -> None:
    """With gradients of zero, matrices shrink and norms, biases and scalars stay as they are."""
    params = parameters()
    optimizers = inner.build(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in params.items():
        if p.ndim < 2:
            assert torch.equal(p.detach(), before[name]), name
        else:
            assert float(p.detach().norm()) < float(before[name].norm()), name


def test_no_weight_decay_where_it_is_off(inner: Inner) -> None:
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizers = replace(inner, weight_decay=0.0).build(params)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in params.items():
        assert torch.equal(p.detach(), before[name]), name


def test_adamw_is_torchs_adamw() -> None:
    mine, theirs = parameters(), parameters()
    (optimizer,) = AdamW(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6).build(mine)
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6}
    references = [
        torch.optim.AdamW([p for p in theirs.values() if p.ndim >= 2], weight_decay=0.1, **settings),
        torch.optim.AdamW([p for p in theirs.values() if p.ndim < 2], weight_decay=0.0, **settings),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for name, p in mine.items():
            p.grad = torch.randn(p.shape, generator=generator)
            theirs[name].grad = p.grad.clone()
        for each in [optimizer, *references]:
            each.step()
    for name, p in mine.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-6)


def test_muon_takes_matrices_of_blocks_and_adamw_the_rest() -> None:
    params = parameters()
    muon, adamw = Muon(lr=0.02, adamw_lr=0.003).build(params)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [p for group in muon.param_groups for p in group["params"]] == [params["layers.0.mlp.weight"]]
    assert {group["lr"] for group in adamw.param_groups} == {0.003}


def test_the_rate_is_set_from_the_peak_and_never_from_the_last_one(inner: Inner) -> None:
    optimizers = inner.build(parameters())
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    for share in (0.5, 0.0, 0.25, 1.0):
        first = set_rate(optimizers, share)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([peak * share for peak in peaks])
        assert first == pytest.approx(peaks[0] * share)


# --- rate schedules ---


def test_constant() -> None:
    inner = Sgd(lr=0.1)
    assert [inner.rate_share(step, 100) for step in (0, 50, 99, 100, 1000)] == [1.0] * 5


def test_warm_up_is_linear_and_reaches_the_peak(inner: Inner) -> None:
    warm = replace(inner, warmup_steps=4)
    assert [warm.rate_share(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert warm.rate_share(4, 100) == 1.0


def test_cosine_by_hand() -> None:
    inner = AdamW(rate=RateSchedule.cosine, final_lr_share=0.1)
    # the cosine is at 1, cos 45 deg, 0 and -1
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    shares = [inner.rate_share(step, 200) for step in (0, 50, 100, 200)]
    assert shares == pytest.approx([1.0, quarter, 0.55, 0.1])


def test_cosine_begins_after_the_warm_up() -> None:
    inner = AdamW(rate=RateSchedule.cosine, warmup_steps=10)
    assert [inner.rate_share(step, 110) for step in (4, 9, 10, 60, 110)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_wsd_by_hand() -> None:
    inner = AdamW(rate=RateSchedule.wsd, decay_share=0.2, final_lr_share=0.1)
    # stable for 80 of 100 steps, then linearly from 1 to 0.1 in 20
    shares = [inner.rate_share(step, 100) for step in (0, 40, 80, 90, 95, 100)]
    assert shares == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.325, 0.1])


def test_wsd_without_a_decay_stays_at_the_peak() -> None:
    inner = AdamW(rate=RateSchedule.wsd, decay_share=0.0)
    assert [inner.rate_share(step, 100) for step in (0, 99, 100)] == [1.0] * 3


@pytest.mark.parametrize("rate", list(RateSchedule))
def test_beyond_the_end_it_stays_at_its_end(rate: RateSchedule) -> None:
    inner = AdamW(rate=rate, warmup_steps=5, final_lr_share=0.1)
    assert inner.rate_share(150, 100) == inner.rate_share(100, 100) == (1.0 if rate is RateSchedule.constant else 0.1)


@pytest.mark.parametrize("rate", list(RateSchedule))
def test_it_never_rises_after_the_warm_up_and_never_leaves_its_range(rate: RateSchedule) -> None:
    inner = AdamW(rate=rate, warmup_steps=7, final_lr_share=0.2)
    shares = [inner.rate_share(step, 60) for step in range(80)]
    assert shares[:7] == sorted(shares[:7])
    assert shares[7:] == sorted(shares[7:], reverse=True)
    assert max(shares) == 1.0
    assert min(shares[7:]) >= 0.2 - 1e-12


def test_a_warm_up_longer_than_the_run_is_no_error() -> None:
    inner = AdamW(warmup_steps=100)
    assert [inner.rate_share(step, 10) for step in (0, 9)] == pytest.approx([0.01, 0.1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("clip", -1.0),
        ("fresh_warmup_steps", -1),
        ("final_lr_share", 1.1),
        ("final_lr_share", -0.1),
        ("decay_share", 1.5),
        ("decay_share", float("nan")),
    ],
)
def test_what_is_out_of_range_is_refused_with_its_key(inner: Inner, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"inner\.{key}"):
        replace(inner, **{key: value})


@pytest.mark.parametrize("part", [AdamW, Muon])
@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_betas_out_of_range_are_refused(part: type[AdamW] | type[Muon], beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        part(beta1=beta)
    with pytest.raises(ValueError, match="beta"):
        part(beta2=beta)


def test_compute_dtype(inner: Inner) -> None:
    assert inner.compute_dtype("cpu") == torch.float32
    assert inner.compute_dtype("cuda") == torch.bfloat16
    assert replace(inner, dtype=ComputeDtype.bfloat16).compute_dtype("cpu") == torch.bfloat16
    assert replace(inner, dtype=ComputeDtype.float32).compute_dtype("cuda") == torch.float32
