"""Objectives of each completion's own log-ratio, and those of a whole batch's distribution of them.

Unlike a difference, the first say which way either completion goes. See `base` for the symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.workloads.objectives.base import (
    Objective,
    PairLogps,
    check_positive,
    log_ratios,
    logistic,
)


@dataclass(kw_only=True)
class BCO(Objective):
    """-log s(beta r(w)) - log s(-beta r(l)): the pair as two labels of a classifier (arXiv:2404.04656, theorem 1).

    An upper bound of DPO's loss. The paper's shift of the rewards by a running mean is left out (delta = 0), as in
    TRL's `bco_pair`: in pairs there are as many of either label.
    """

    beta: float = 0.1  # the paper's: 0.01

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        return logistic(self.beta * chosen) + logistic(-self.beta * rejected)


@dataclass(kw_only=True)
class NCA(Objective):
    """-log s(beta r(w)) - 0.5 log s(-beta r(w)) - 0.5 log s(-beta r(l)) (arXiv:2402.05369, section 4.1, K = 2).

    Noise contrastive: each reward is judged by itself, so that the chosen one's likelihood is not traded away. As a
    function of r(w) least where s(beta r(w)) = 2/3.
    """

    beta: float = 0.1  # the paper's: 0.01

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = (self.beta * ratio for ratio in log_ratios(batch))
        return logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)


@dataclass(kw_only=True)
class SPPO(Objective):
    """(r(w) - 1/(2 beta))^2 + (r(l) + 1/(2 beta))^2, with beta = 1/eta of the paper (arXiv:2405.00675, eq. 4.7).

    Self-play: each log-ratio is pulled to eta (P - 1/2), from above too, with P the probability to win, here 1 for
    the chosen and 0 for the rejected (the paper estimates it). Meant for completions of the reference itself.
    """

    beta: float = 0.001  # the paper's eta is 1000

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.001)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(kw_only=True)
class APOZero(Objective):
    """s(-beta r(w)) + s(beta r(l)): chosen up, rejected down (arXiv:2408.06266, eq. 7).

    Assumes that the chosen completion is better than what the policy writes.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@dataclass(kw_only=True)
class APODown(Objective):
    """s(beta r(w)) + s(-beta rho): both down, rejected more (arXiv:2408.06266, eq. 8).

    Assumes that the policy writes better than even the chosen completion. So a likelier chosen completion does not
    always lower the loss: where r(l) = 0 the two terms cancel out.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))


@dataclass(kw_only=True)
class AOT(Objective):
    """-log s(beta (sorted(logp(w) - logp(l)) - sorted(the reference's))) (arXiv:2406.05882, section 3, paired).

    Asks that the batch's distribution of logp(w) - logp(l) lies above the reference's, quantile by quantile. The
    losses are those of quantiles, lowest first, not of pairs. Assumes a batch that is large enough to stand for the
    data; a batch of one pair gives DPO.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        policy = (batch.policy_chosen - batch.policy_rejected).sort().values
        reference = (batch.reference_chosen - batch.reference_rejected).sort().values
        return logistic(self.beta * (policy - reference))

    @property
    def whole_batch(self) -> bool:
        """True: pairs are sorted by their margins."""
        return True


@dataclass(kw_only=True)
class AOTUnpaired(Objective):
    """-log s(beta (sorted(r(w)) - sorted(r(l)))) (arXiv:2406.05882, section 3, unpaired).

    Asks that the rewards of the chosen completions lie above those of the rejected ones, quantile by quantile,
    whichever prompt they belong to. The losses are those of quantiles, lowest first. Assumes as many of either kind.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        return logistic(self.beta * (chosen.sort().values - rejected.sort().values))

    @property
    def whole_batch(self) -> bool:
        """True: completions are sorted by their rewards."""
        return True
