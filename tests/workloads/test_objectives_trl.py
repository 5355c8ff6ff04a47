"""Objectives against TRL's trainers, on the same log-probabilities. TRL has no loss functions of its own: its trainers
are made here without a model or data, with the attributes that their loss reads."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diloco.workloads.objectives import KTO, OBJECTIVES, NllBy, Objective, PairLogps, UnpairedLogps, kl_estimate

PAIRS, LENGTH, WORDS = 5, 9, 7
COMPLETIONS = torch.tensor(
    [3, 8, 1, 5, 6, 2, 4, 8, 7, 3]
)  # tokens of each, after a prompt of one; 5 chosen, 5 rejected

# Ours, its settings, and what TRL calls the same.
DPO_TRAINER: list[tuple[str, dict[str, Any], str]] = [
    ("dpo", {"beta": 0.3}, "sigmoid"),
    ("ipo", {"beta": 0.3}, "ipo"),
    ("slic", {"beta": 0.3}, "hinge"),
    ("robust_dpo", {"beta": 0.3, "label_smoothing": 0.2}, "robust"),
    ("bco", {"beta": 0.3}, "bco_pair"),
    ("nca", {"beta": 0.3}, "nca_pair"),
    ("exo", {"beta": 0.3, "label_smoothing": 1e-3}, "exo_pair"),
    ("sppo", {"beta": 0.3}, "sppo_hard"),
    ("sppo", {"beta": 0.001}, "sppo_hard"),
    ("discopop", {"beta": 0.3, "tau": 0.05}, "discopop"),
    ("apo_zero", {"beta": 0.3}, "apo_zero"),
    ("apo_down", {"beta": 0.3}, "apo_down"),
    ("aot", {"beta": 0.3}, "aot"),
    ("aot_unpaired", {"beta": 0.3}, "aot_unpaired"),
]
CPO_TRAINER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("simpo", {"beta": 2.0, "gamma": 0.7}, {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    ("cpo", {"beta": 0.3, "nll_weight": 0.6}, {"loss_type": "sigmoid", "cpo_alpha": 0.6}),
    ("cpo", {"beta": 0.3, "nll_weight": 0.0}, {"loss_type": "sigmoid", "cpo_alpha": 0.0}),
]


def trl_class(module: str, name: str) -> Any:
    """A class of TRL; skips the test where TRL is not installed."""
    pytest.importorskip(
        "trl", reason="TRL, with which objectives are compared, is not installed: pip install '.[test]'"
    )
    with warnings.catch_warnings():
        # TRL's notice that its experimental part may change: the version is pinned.
        warnings.filterwarnings("ignore", message=r"You are importing from 'trl\.experimental'")
        return vars(import_module(f"trl.{module}"))[name]


def trainer(kind: Any, **attributes: Any) -> Any:
    """An instance of a trainer that was never set up, with these attributes."""
    made = object.__new__(kind)
    alone = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    vars(made).update(accelerator=alone, model=SimpleNamespace(training=True), aux_loss_enabled=False, **attributes)
    return made


def completion_mask(rows: Tensor) -> Tensor:
    """bool[rows, LENGTH], without the prompt's one token."""
    position = torch.arange(LENGTH)
    return (position >= 1) & (position <= COMPLETIONS[rows, None])


def per_token(seed: int, rows: Tensor) -> Tensor:
    """float32[rows, LENGTH - 1]: log-probabilities of all tokens but the first; 0 outside the completion."""
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator)[rows]
    return values * completion_mask(rows)[:, 1:]


def rows_of(chosen: Tensor) -> Tensor:
    """Of both completions of these pairs: chosen ones first, as TRL has them."""
    return torch.cat([chosen, chosen + PAIRS])


def logps(policy: Tensor, reference: Tensor, rows: Tensor) -> PairLogps:
    (policy_chosen, policy_rejected), (reference_chosen, reference_rejected) = policy.chunk(2), reference.chunk(2)
    chosen_tokens, rejected_tokens = COMPLETIONS[rows].float().chunk(2)
    return PairLogps(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


def fused_output(log_probs: Tensor) -> SimpleNamespace:
    """What TRL's loss reads of a model; all but the first is for its metrics."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def by_dpo_trainer(loss_type: str, settings: dict[str, Any], chosen: Tensor) -> tuple[PairLogps, Tensor]:
    """The log-probabilities of these pairs, and TRL's loss on them."""
    rows = rows_of(chosen)
    policy, reference = per_token(1, rows), per_token(2, rows)
    batch = logps(policy.sum(1), reference.sum(1), rows)
    made = trainer(
        trl_class("trainer.dpo_trainer", "DPOTrainer"),
        **dict(beta=settings["beta"], label_smoothing=settings.get("label_smoothing", 0.0)),
        **dict(loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl", use_weighting=False),
        **dict(ld_alpha=None, precompute_ref_logps=True, args=SimpleNamespace(discopop_tau=settings.get("tau"))),
        **dict(_metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1),
    )
    inputs = {
        "input_ids": torch.zeros(len(rows), LENGTH, dtype=torch.int64),
        "attention_mask": torch.ones(len(rows), LENGTH, dtype=torch.int64),
        "completion_mask": completion_mask(rows).long(),
        "ref_chosen_logps": batch.reference_chosen,
        "ref_rejected_logps": batch.reference_rejected,
    }
    loss = made._compute_loss(lambda **_: fused_output(policy), inputs, return_outputs=False)
    return batch, loss


@dataclass(frozen=True)
class Words:
    """Token ids and logits of some pairs, for the trainers that take a model's logits."""

    ids: Tensor  # int64[rows, LENGTH]
    labels: Tensor  # the same, -100 outside the completion
    attention: Tensor
    logits: Tensor  # float32[rows, LENGTH, WORDS]
    batch: PairLogps


def words(chosen: Tensor) -> Words:
    rows = rows_of(chosen)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, WORDS, (2 * PAIRS, LENGTH), generator=generator)[rows]
    logits = 2 * torch.randn(2 * PAIRS, LENGTH, WORDS, generator=generator)[rows]
    mask = completion_mask(rows)
    told = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # the token before predicts a token
    summed = (told * mask[:, 1:]).sum(1)
    attention = (torch.arange(LENGTH) <= COMPLETIONS[rows, None]).long()
    return Words(ids, ids.masked_fill(~mask, -100), attention, logits, logps(summed, torch.zeros_like(summed), rows))


def by_logits(made: Any, given: Words) -> Tensor:
    """TRL's loss of a trainer that puts chosen and rejected completions together itself."""
    inputs = {}
    for key, value in {"input_ids": given.ids, "labels": given.labels, "attention_mask": given.attention}.items():
        inputs[f"chosen_{key}"], inputs[f"rejected_{key}"] = value.chunk(2)
    loss, _ = made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=given.logits), inputs)
    return loss


def by_cpo_trainer(settings: dict[str, Any], chosen: Tensor, theirs: dict[str, Any]) -> tuple[PairLogps, Tensor]:
    given = words(chosen)
    made = trainer(
        trl_class("experimental.cpo.cpo_trainer", "CPOTrainer"),
        **dict(beta=settings["beta"], label_smoothing=0.0, alpha=0.0, simpo_gamma=0.0) | theirs,
        **dict(is_encoder_decoder=False, pad_token_id=0),
    )
    return given.batch, by_logits(made, given)


def by_orpo_trainer(beta: float, chosen: Tensor) -> tuple[PairLogps, Tensor]:
    given = words(chosen)
    kind = trl_class("experimental.orpo.orpo_trainer", "ORPOTrainer")
    return given.batch, by_logits(trainer(kind, beta=beta, is_encoder_decoder=False, padding_value=0), given)


def check_equal(objective: Objective, run: Callable[[Tensor], tuple[PairLogps, Tensor]]) -> None:
    """The whole batch's mean, and then each pair alone."""
    for chosen in (torch.arange(PAIRS), *torch.arange(PAIRS).split(1)):
        batch, loss = run(chosen)
        torch.testing.assert_close(objective(batch).mean(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "settings", "loss_type"), DPO_TRAINER)
def test_equals_trl(name: str, settings: dict[str, Any], loss_type: str) -> None:
    check_equal(OBJECTIVES[name](**settings), lambda chosen: by_dpo_trainer(loss_type, settings, chosen))


@pytest.mark.parametrize(("name", "settings", "theirs"), CPO_TRAINER)
def test_without_reference_equals_trl(name: str, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    by = {"nll_by": NllBy.tokens} if name == "cpo" else {}
    check_equal(OBJECTIVES[name](**settings, **by), lambda chosen: by_cpo_trainer(settings, chosen, theirs))


def test_orpo_equals_trl_where_the_prompt_is_one_token() -> None:
    """TRL's likelihood is over prompt and completion; a first token is not predicted."""
    check_equal(OBJECTIVES["orpo"](beta=0.3, nll_by=NllBy.tokens), lambda chosen: by_orpo_trainer(0.3, chosen))


def test_likelihood_by_pairs_equals_trl_on_single_pairs() -> None:
    theirs = {"loss_type": "sigmoid", "cpo_alpha": 1.0}
    runs: dict[str, Callable[[Tensor], tuple[PairLogps, Tensor]]] = {
        "cpo": lambda chosen: by_cpo_trainer({"beta": 0.1}, chosen, theirs),
        "orpo": lambda chosen: by_orpo_trainer(0.1, chosen),
    }
    for name, run in runs.items():
        alone = torch.stack([run(chosen)[1] for chosen in torch.arange(PAIRS).split(1)])
        batch, together = run(torch.arange(PAIRS))
        torch.testing.assert_close(OBJECTIVES[name]()(batch), alone, rtol=1e-6, atol=1e-6)
        assert abs(alone.mean() - together) > 0.01  # these completions do differ in length


@pytest.mark.parametrize("further", [-1.0, 1.0])  # completions by which kl is estimated: above the reference, below it
def test_kto_equals_trl(further: float) -> None:
    rows = torch.arange(2 * PAIRS)
    policy, reference, others = per_token(1, rows), per_token(2, rows), per_token(4, rows)
    desirable = torch.tensor([True, False, False, True, True, False, True, False, False, True])
    reference_kl = others.sum(1) + further
    made = trainer(
        trl_class("trainer.kto_trainer", "KTOTrainer"),
        **dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, loss_type="kto", calculate_KL=True),
        **dict(precompute_ref_logps=True, _metrics=defaultdict(lambda: defaultdict(list))),
        **dict(_total_train_tokens=0, _tp_size=1),
    )
    ids, mask = torch.zeros(len(rows), LENGTH, dtype=torch.int64), completion_mask(rows).long()
    inputs = {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask},
        **{"KL_input_ids": ids + 1, "KL_attention_mask": torch.ones_like(ids), "KL_completion_mask": mask},
        **{"label": desirable, "ref_logps": reference.sum(1), "ref_KL_logps": reference_kl},
    }

    def model(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return fused_output(others if input_ids.any() else policy)

    loss = made._compute_loss(model, inputs, return_outputs=False)
    kl = kl_estimate(others.sum(1), reference_kl)
    assert (kl > 0) == (further < 0)
    batch = UnpairedLogps(policy=policy.sum(1), reference=reference.sum(1), desirable=desirable, kl=kl)
    ours = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)(batch).mean()
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=1e-6)
