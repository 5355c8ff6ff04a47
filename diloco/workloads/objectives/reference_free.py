"""Objectives that need no reference: what holds the policy is a mean over tokens, or the likelihood of the chosen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from diloco.workloads.objectives.base import (
    Objective,
    PairLogps,
    check_not_negative,
    check_positive,
    logistic,
    per_token,
)


class NllBy(Enum):
    """What the likelihood of the chosen completions is a mean over.

    `pairs`: each pair's own mean over its tokens, so that the loss of a pair is its own and a batch may be cut.
    `tokens`: all of the batch's, as in TRL: a long completion counts for more, and the mean of the losses depends on
    which pairs share a batch. The two are equal where all chosen completions are of one length, as in a single pair.
    """

    pairs = "pairs"
    tokens = "tokens"


@dataclass(kw_only=True)
class SimPO(Objective):
    """-log s(beta (logp(w)/|w| - logp(l)/|l|) - gamma) (arXiv:2405.14734, eq. 6).

    Assumes that a mean over tokens is a fair reward for any length, and a small learning rate in place of a
    reference. The margin of a pair, where given, takes gamma's place.
    """

    uses_reference: ClassVar[bool] = False
    uses_margin: ClassVar[bool] = True

    beta: float = 2.0  # of means over tokens, so larger than elsewhere; the paper's are 2 to 2.5
    gamma: float = 1.0  # by how much the rewards are to differ; the paper's are 0.3 to 1.6

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=2.0)
        check_not_negative("gamma", self.gamma)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen = per_token(batch.policy_chosen, batch.chosen_tokens)
        rejected = per_token(batch.policy_rejected, batch.rejected_tokens)
        margin = self.gamma if batch.margin is None else batch.margin
        return logistic(self.beta * (chosen - rejected) - margin)


@dataclass(kw_only=True)
class CPO(Objective):
    """-log s(beta (logp(w) - logp(l))) + nll_weight * nll(w) (arXiv:2401.08417, eq. 3 and its NLL term).

    DPO with a uniform reference, held by the likelihood of the chosen completion: assumes that this is good enough to
    imitate. nll is a mean a token, by `nll_by`, as in TRL, which has it from the authors; the paper writes a sum.
    """

    uses_reference: ClassVar[bool] = False

    beta: float = 0.1
    nll_weight: float = 1.0
    nll_by: NllBy = NllBy.pairs

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        check_not_negative("nll_weight", self.nll_weight)

    def __call__(self, batch: PairLogps) -> Tensor:
        preference = logistic(self.beta * (batch.policy_chosen - batch.policy_rejected))
        return preference + self.nll_weight * _chosen_nll(batch, self.nll_by)

    @property
    def whole_batch(self) -> bool:
        """Where the likelihood term is a mean over the batch's tokens."""
        return self.nll_by is NllBy.tokens


@dataclass(kw_only=True)
class ORPO(Objective):
    """nll(w) - beta log s(log odds(w) - log odds(l)), odds(y) = p / (1 - p) (arXiv:2403.07691, eq. 4, 6 and 7).

    beta is the paper's lambda, p the exponential of logp(y)/|y|, and nll a mean a token, by `nll_by`, over the
    completion as the paper has it; TRL counts the prompt's tokens too. Assumes a model that is not instructed yet: it
    learns from the chosen completions and from the contrast at once.
    """

    uses_reference: ClassVar[bool] = False

    beta: float = 0.1
    nll_by: NllBy = NllBy.pairs

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen = _log_odds(per_token(batch.policy_chosen, batch.chosen_tokens))
        rejected = _log_odds(per_token(batch.policy_rejected, batch.rejected_tokens))
        return _chosen_nll(batch, self.nll_by) + self.beta * logistic(chosen - rejected)

    @property
    def whole_batch(self) -> bool:
        """Where the likelihood term is a mean over the batch's tokens."""
        return self.nll_by is NllBy.tokens


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p <= 0, as finite as float32 can tell p from 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)  # a certain completion rounds to log p = 0, whose odds are none
    return logp - torch.log(-torch.expm1(logp))


def _chosen_nll(batch: PairLogps, by: NllBy) -> Tensor:
    """float32[pairs] whose mean is the negative log-likelihood a token of the chosen completions."""
    if by is NllBy.pairs:
        return -per_token(batch.policy_chosen, batch.chosen_tokens)
    return -batch.policy_chosen * (len(batch.policy_chosen) / batch.chosen_tokens.sum().clamp(min=1))
