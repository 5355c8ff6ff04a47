"""Objectives on preferences: numbers by hand, and what every objective keeps, one row of ROWS for each."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from diloco.workloads.objectives import KTO, OBJECTIVES, NllBy, PairLogps, UnpairedLogps, implied_rewards, kl_estimate

LN2 = math.log(2)
FAR = 1e4  # nats: no float32 exponential of it is finite, or different from 0


@dataclass(frozen=True)
class Row:
    by_hand: tuple[dict[str, Any], float]  # settings; the loss of `the_pair`
    equal: float  # the loss, by default settings, of a completion against itself, of one token with p = 1/2
    falls: bool = True  # a likelier chosen completion lowers the loss of a pair that is told the wrong way round


# `the_pair` has r(w) = ln 2, r(l) = -ln 2 and rho = ln 4, so that s is 2/3, 1/3 and 4/5, s(-rho) = 1/5.
# By the policy a token of w has p = 1/2, each of the two of l p = 1/4, so that logp(w) - logp(l) = ln 8.
ROWS = {
    "dpo": Row(({"beta": 1.0}, 0.2231436), LN2),  # -ln 4/5
    # .9 (-ln 4/5) + .1 (-ln 1/5) = .9 * .2231436 + .1 * 1.6094379
    "cdpo": Row(({"beta": 1.0, "label_smoothing": 0.1}, 0.3617730), LN2),
    "robust_dpo": Row(({"beta": 1.0, "label_smoothing": 0.1}, 0.0498568), LN2),  # (.2008292 - .1609438) / .8
    "ipo": Row(({"beta": 1.0}, 0.2912985), 25.0),  # (.6931472 / 1 + .6931472 / 2 - .5)^2 = .5397208^2; (1 / .2)^2
    "slic": Row(({"beta": 0.5}, 0.3068528), 1.0),  # 1 - .5 * 1.3862944
    "exo": Row(  # .8 ln(.8 / .9) + .2 ln(.2 / .1); .5 ln(.5 / .999) + .5 ln(.5 / .001)
        ({"beta": 1.0, "label_smoothing": 0.1}, 0.0444030), 2.7612307
    ),
    "discopop": Row(({"beta": 1.0, "tau": 1.0}, 0.2446287), 0.8465736),  # .2 (-ln 4/5) + .8 / 4; (ln 2 + 1) / 2
    "bco": Row(({"beta": 1.0}, 0.8109302), 2 * LN2),  # 2 (-ln 2/3)
    "nca": Row(({"beta": 1.0}, 1.1575038), 2 * LN2),  # -ln 2/3 - .5 ln 1/3 - .5 ln 2/3
    "sppo": Row(({"beta": 0.5}, 0.1883173), 5e5),  # 2 (.6931472 - 1)^2; 2 * 500^2
    "apo_zero": Row(({"beta": 1.0}, 2 / 3), 1.0),  # 1/3 + 1/3
    "apo_down": Row(({"beta": 1.0}, 13 / 15), 1.0, falls=False),  # 2/3 + 1/5
    "aot": Row(({"beta": 1.0}, 0.2231436), LN2),  # one pair: as dpo
    "aot_unpaired": Row(({"beta": 1.0}, 0.2231436), LN2),
    "simpo": Row(({"beta": 1.0, "gamma": 2 * LN2}, 1.0986123), 1.3132617),  # -ln s(ln 2 - 2 ln 2) = ln 3; ln(1 + e)
    # -ln 8/9 + .5 ln 2 = .1177830 + .3465736; ln 2 + ln 2
    "cpo": Row(({"beta": 1.0, "nll_weight": 0.5}, 0.4643566), 2 * LN2),
    # Odds of 1 and 1/3: ln 2 - .5 ln 3/4 = .6931472 + .1438410; ln 2 + .1 ln 2
    "orpo": Row(({"beta": 0.5}, 0.8369882), 1.1 * LN2),
}
each = pytest.mark.parametrize("name", OBJECTIVES)


def pairs(
    policy_chosen: list[float],
    policy_rejected: list[float],
    reference_chosen: list[float],
    reference_rejected: list[float],
    tokens: tuple[list[float], list[float]] | None = None,
    margin: list[float] | None = None,
) -> PairLogps:
    ones = [1.0] * len(policy_chosen)
    chosen, rejected = tokens or (ones, ones)
    return PairLogps(
        policy_chosen=torch.tensor(policy_chosen),
        policy_rejected=torch.tensor(policy_rejected),
        reference_chosen=torch.tensor(reference_chosen),
        reference_rejected=torch.tensor(reference_rejected),
        chosen_tokens=torch.tensor(chosen),
        rejected_tokens=torch.tensor(rejected),
        margin=None if margin is None else torch.tensor(margin),
    )


def the_pair() -> PairLogps:
    return pairs([-LN2], [-4 * LN2], [-2 * LN2], [-3 * LN2], tokens=([1.0], [2.0]))


def random_pairs(count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def logps(tokens: Tensor) -> Tensor:
        return -tokens * (0.5 + torch.rand(count, generator=generator, dtype=dtype))

    chosen, rejected = (torch.randint(1, 9, (count,), generator=generator).to(dtype) for _ in range(2))
    margin = torch.rand(count, generator=generator, dtype=dtype)
    return PairLogps(
        policy_chosen=logps(chosen),
        policy_rejected=logps(rejected),
        reference_chosen=logps(chosen),
        reference_rejected=logps(rejected),
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        margin=margin,
    )


def tensors(batch: PairLogps) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


def gradients(name: str, batch: PairLogps, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, and the gradients of their sum by the policy's two values."""
    chosen, rejected = (value.clone().requires_grad_() for value in (batch.policy_chosen, batch.policy_rejected))
    losses = OBJECTIVES[name](**settings)(replace(batch, policy_chosen=chosen, policy_rejected=rejected))
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return losses.detach(), by_chosen, by_rejected


def test_every_objective_has_a_row() -> None:
    assert set(ROWS) == set(OBJECTIVES)


@each
def test_the_number_by_hand(name: str) -> None:
    settings, expected = ROWS[name].by_hand
    assert OBJECTIVES[name](**settings)(the_pair()).tolist() == pytest.approx([expected], abs=3e-7)


def test_ipo_on_sums_by_hand() -> None:
    losses = OBJECTIVES["ipo"](beta=1.0, length_normalised=False)(the_pair())
    assert losses.tolist() == pytest.approx([0.7855177], abs=3e-7)  # (1.3862944 - .5)^2


def test_a_margin_by_hand() -> None:
    batch = replace(the_pair(), margin=torch.tensor([LN2]))
    assert OBJECTIVES["dpo"](beta=1.0)(batch).tolist() == pytest.approx([0.4054651])  # -ln s(ln 4 - ln 2) = -ln 2/3
    simpo = OBJECTIVES["simpo"](beta=2.0, gamma=100.0)  # the margin in gamma's place: -ln s(2 ln 2 - ln 2)
    assert simpo(batch).tolist() == pytest.approx([0.4054651])


def test_aot_compares_quantiles_by_hand() -> None:
    # In units of ln 2: 3, 0, 1 against 0, 2, 0; sorted 0, 1, 3 less 0, 0, 2 are 0, 1, 1, whose -ln s are these.
    high, low, zeros = [3 * LN2, 0.0, LN2], [0.0, 2 * LN2, 0.0], [0.0] * 3
    expected = pytest.approx([0.6931472, 0.4054651, 0.4054651])
    by_rewards = pairs(high, low, zeros, zeros)
    assert OBJECTIVES["aot_unpaired"](beta=1.0)(by_rewards).tolist() == expected
    by_policies = pairs(high, zeros, low, zeros)  # logp(w) - logp(l) of the policy, and of the reference
    assert OBJECTIVES["aot"](beta=1.0)(by_policies).tolist() == expected


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_likelihood_by_tokens_weighs_long_completions_more(name: str) -> None:
    batch = pairs([-2.0, -4.0], [-9.0, -9.0], [0.0, 0.0], [0.0, 0.0], tokens=([1.0, 3.0], [3.0, 3.0]))
    by_pairs, by_tokens = (OBJECTIVES[name](nll_by=by)(batch) for by in NllBy)
    # (2 / 1 + 4 / 3) / 2 = 5/3 by pairs, (2 + 4) / (1 + 3) = 3/2 by tokens
    assert (by_pairs.mean() - by_tokens.mean()).item() == pytest.approx(5 / 3 - 3 / 2, abs=1e-6)


@each
def test_a_completion_against_itself_gives_the_known_constant(name: str) -> None:
    batch = pairs([-LN2], [-LN2], [-LN2], [-LN2])
    assert OBJECTIVES[name]()(batch).tolist() == pytest.approx([ROWS[name].equal], rel=1e-6)


@each
def test_one_finite_float32_a_pair_and_inputs_are_only_read(name: str) -> None:
    batch, kept = random_pairs(), random_pairs()
    losses = OBJECTIVES[name]()(batch)
    assert losses.dtype == torch.float32 and losses.shape == batch.policy_chosen.shape
    assert bool(losses.isfinite().all())
    losses.fill_(7.0)  # is no view of an input
    assert all(torch.equal(value, tensors(kept)[key]) for key, value in tensors(batch).items())


@each
@pytest.mark.parametrize("nll_by", NllBy)
def test_a_pair_is_by_itself_unless_the_objective_takes_whole_batches(name: str, nll_by: NllBy) -> None:
    objective = OBJECTIVES[name](nll_by=nll_by) if name in ("cpo", "orpo") else OBJECTIVES[name]()
    batch = random_pairs()
    halves = [replace(batch, **{k: v[part] for k, v in tensors(batch).items()}) for part in (slice(2), slice(2, None))]
    cut = torch.cat([objective(half) for half in halves])
    alike = torch.allclose(cut.mean(), objective(batch).mean(), rtol=1e-6, atol=1e-6)
    assert objective.whole_batch is not alike
    assert objective.whole_batch or torch.allclose(cut, objective(batch), rtol=1e-6, atol=1e-6)


@each
def test_reference_and_margin_count_where_the_class_says_so(name: str) -> None:
    batch, other = random_pairs(), random_pairs(seed=1)
    objective = OBJECTIVES[name]()
    moved = replace(batch, reference_chosen=other.reference_chosen, reference_rejected=other.reference_rejected)
    assert torch.equal(objective(moved), objective(batch)) is not objective.uses_reference
    assert torch.equal(objective(replace(batch, margin=None)), objective(batch)) is not objective.uses_margin


@each
def test_gradients_are_those_of_differences(name: str) -> None:
    batch = random_pairs(4, dtype=torch.float64)
    objective = OBJECTIVES[name]()

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return objective(replace(batch, policy_chosen=chosen, policy_rejected=rejected))

    values = [value.requires_grad_() for value in (batch.policy_chosen, batch.policy_rejected)]
    assert torch.autograd.gradcheck(losses, values)


@each
@pytest.mark.parametrize("beta", [None, 1.0])
def test_loss_and_gradients_are_finite_far_out(name: str, beta: float | None) -> None:
    corners = list(zip(*itertools.product([0.0, -FAR], repeat=4), strict=True))
    settings = {} if beta is None else {"beta": beta}
    for values in gradients(name, pairs(*map(list, corners)), **settings):
        assert bool(values.isfinite().all()), values


@each
def test_far_out_a_wrong_pair_still_costs_and_teaches(name: str) -> None:
    """Nothing is cut off: a loss that gives up there does so by its formula."""
    flat = {"exo", "apo_zero", "apo_down"}  # sigmoids, and so bounded, unlike the rest
    wrong = pairs([-FAR], [-1.0], [-1.0], [-FAR])
    loss, by_chosen, _ = gradients(name, wrong)
    assert bool(by_chosen.abs() > 1e-6) is (name not in flat)
    assert loss.item() > 0.9


@each
def test_a_likelier_chosen_or_unlikelier_rejected_completion_lowers_the_loss(name: str) -> None:
    beta = OBJECTIVES[name]().beta
    away = min(1 / beta, 1.0)  # of beta r: told the wrong way round, but not far
    wrong = pairs([-2 - away], [-2 + away], [-2.0], [-2.0])
    _, by_chosen, by_rejected = gradients(name, wrong)
    assert bool(by_chosen < 0) is ROWS[name].falls
    assert bool(by_rejected > 0)


# From where on a likelier chosen completion raises the loss: beta r(w), for a rejected one with r(l) = 0.
TURNS = {
    "cdpo": ({"beta": 1.0, "label_smoothing": 0.1}, math.log(9)),  # s = .9
    "exo": ({"beta": 1.0, "label_smoothing": 0.1}, math.log(9)),
    "ipo": ({"beta": 1.0}, 0.5),
    "nca": ({"beta": 1.0}, LN2),  # s = 2/3
    "sppo": ({"beta": 1.0}, 0.5),
}


@pytest.mark.parametrize("name", TURNS)
def test_objectives_with_a_target_pull_back_from_beyond_it(name: str) -> None:
    settings, turn = TURNS[name]
    before, beyond = (gradients(name, pairs([turn + by], [0.0], [0.0], [0.0]), **settings)[1] for by in (-0.01, 0.01))
    assert before.item() < 0 < beyond.item()


def test_discopop_rises_around_zero_only() -> None:
    batch = pairs([-1.0, 0.0, 1.0], [0.0] * 3, [0.0] * 3, [0.0] * 3)
    _, by_chosen, _ = gradients("discopop", batch, beta=1.0)
    assert by_chosen.sign().tolist() == [-1.0, 1.0, -1.0]


def test_apo_down_takes_the_chosen_completion_down_where_the_rejected_is_down() -> None:
    """With r(l) = 0 its two terms cancel out; with r(l) < 0 < r(w) the first, which lowers, wins."""
    batch = pairs([0.5, 0.5], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0])
    _, by_chosen, _ = gradients("apo_down", batch, beta=1.0)
    assert by_chosen[0].item() == pytest.approx(0.0, abs=1e-7)
    assert by_chosen[1].item() > 0.05


@each
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_that_is_no_positive_number_is_refused(name: str, beta: float) -> None:
    with pytest.raises(ValueError, match=r"objective\.beta=.*positive"):
        OBJECTIVES[name](beta=beta)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *[
            (name, "label_smoothing", value)
            for name in ("cdpo", "robust_dpo", "exo")
            for value in (-0.1, 0.5, math.nan)
        ],
        ("exo", "label_smoothing", 0.0),
        *[("discopop", "tau", value) for value in (0.0, 1.1, math.nan)],
        *[("simpo", "gamma", value) for value in (-0.1, math.inf, math.nan)],
        *[("cpo", "nll_weight", value) for value in (-0.1, math.inf)],
    ],
)
def test_a_setting_outside_its_range_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{setting}="):
        OBJECTIVES[name](**{setting: value})


@pytest.mark.parametrize("part", [*OBJECTIVES.values(), KTO])
def test_can_be_part_of_a_configuration(part: type) -> None:
    settings = OmegaConf.structured(part)
    assert "uses_reference" not in settings
    assert OmegaConf.to_object(OmegaConf.merge(settings, {"beta": 0.25})) == part(beta=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_chosen": torch.zeros(1, 1)}, r"policy_chosen has the shape \(1, 1\)"),
        ({"reference_chosen": torch.zeros(2)}, r"reference_chosen has the shape \(2,\).*policy_chosen.*\(1,\)"),
        ({"rejected_tokens": torch.ones(1, 1)}, r"rejected_tokens has the shape \(1, 1\)"),
        ({"margin": torch.tensor(1.0)}, r"margin has the shape \(\)"),
        ({"policy_chosen": torch.zeros(1, dtype=torch.bfloat16)}, r"policy_chosen is torch\.bfloat16"),
    ],
)
def test_tensors_that_are_not_one_float32_a_pair_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(the_pair(), **change)


def test_implied_rewards_are_scaled_log_ratios_without_gradient() -> None:
    batch = replace(the_pair(), policy_chosen=torch.tensor([-LN2], requires_grad=True))
    chosen, rejected = implied_rewards(batch, 0.5)
    assert chosen.tolist() == pytest.approx([0.5 * LN2]) and rejected.tolist() == pytest.approx([-0.5 * LN2])
    assert not chosen.requires_grad


def unpaired(policy: list[float], desirable: list[bool], kl: float) -> UnpairedLogps:
    return UnpairedLogps(
        policy=torch.tensor(policy, requires_grad=True),
        reference=torch.zeros(len(policy)),
        desirable=torch.tensor(desirable),
        kl=torch.tensor(kl, requires_grad=True),
    )


def test_kto_by_hand() -> None:
    batch = unpaired([2 * LN2, 2 * LN2], [True, False], kl=LN2)  # r - kl = ln 2: 3 (1 - 2/3), .5 (1 - 1/3)
    losses = KTO(beta=1.0, desirable_weight=3.0, undesirable_weight=0.5)(batch)
    assert losses.tolist() == pytest.approx([1.0, 1 / 3])
    losses.sum().backward()
    assert batch.policy.grad is not None
    # s' = 2/3 * 1/3: up for what is desirable, down for what is not; nothing for the reference point
    assert batch.policy.grad.tolist() == pytest.approx([-2 / 3, 1 / 9])
    assert batch.kl.grad is None


def test_kto_is_finite_far_out() -> None:
    batch = unpaired([FAR, -FAR, FAR, -FAR], [True, True, False, False], kl=0.0)
    losses = KTO(beta=1.0)(batch)
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    losses.sum().backward()
    assert batch.policy.grad is not None and bool(batch.policy.grad.isfinite().all())


def test_kl_estimate_is_the_mean_log_ratio_and_not_negative() -> None:
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kl_estimate(policy, torch.tensor([-2.0, -2.5]))
    assert estimate.item() == pytest.approx(0.75) and not estimate.requires_grad
    assert kl_estimate(policy, torch.zeros(2)).item() == 0.0


@pytest.mark.parametrize("setting", ["beta", "desirable_weight", "undesirable_weight"])
def test_kto_refuses_negative_settings(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{setting}=-1"):
        KTO(**{setting: -1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"desirable": torch.ones(2)}, "desirable is torch.float32"),
        ({"reference": torch.zeros(3)}, r"reference has the shape \(3,\)"),
        ({"kl": torch.zeros(2)}, r"kl has the shape \(2,\)"),
    ],
)
def test_unpaired_tensors_of_another_kind_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(unpaired([0.0, 0.0], [True, False], kl=0.0), **change)
