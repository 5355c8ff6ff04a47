"""Objectives of the difference rho of the two log-ratios: that of DPO and those which change its loss.

What both completions gain or lose alike does not count. See `base` for the symbols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from diloco.workloads.objectives.base import (
    Objective,
    PairLogps,
    check_positive,
    check_smoothing,
    difference,
    log_ratios,
    logistic,
    per_token,
)


@dataclass(kw_only=True)
class DPO(Objective):
    """-log s(beta rho - margin) (arXiv:2305.18290, eq. 7; the margin: DPO with an offset, arXiv:2402.10571).

    Assumes that preferences follow Bradley and Terry's model of the rewards beta r. A margin, in the units of those
    rewards, asks a pair for a larger difference; 0 where none is given.
    """

    uses_margin: ClassVar[bool] = True

    beta: float = 0.1  # how strongly the policy is held to the reference

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        rewards = self.beta * difference(batch)
        return logistic(rewards if batch.margin is None else rewards - batch.margin)


@dataclass(kw_only=True)
class CDPO(Objective):
    """-(1 - e) log s(beta rho) - e log s(-beta rho), with e = label_smoothing: conservative DPO.

    From Eric Mitchell's note on DPO with noisy preferences (ericmitchell.ai/cdpo.pdf). Assumes that a share e
    of the pairs is labelled the wrong way round. Least where s(beta rho) = 1 - e, so that rho stays bounded.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        check_smoothing(self.label_smoothing)

    def __call__(self, batch: PairLogps) -> Tensor:
        logits = self.beta * difference(batch)
        return (1 - self.label_smoothing) * logistic(logits) + self.label_smoothing * logistic(-logits)


@dataclass(kw_only=True)
class RobustDPO(Objective):
    """(-(1 - e) log s(beta rho) + e log s(-beta rho)) / (1 - 2 e), with e = label_smoothing (arXiv:2403.00409, sec. 3).

    DPO's loss without bias where a share e of the labels is flipped at random, which is assumed to be known. Not
    bounded below: it falls by e / (1 - 2 e) for each unit of beta rho.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        check_smoothing(self.label_smoothing)

    def __call__(self, batch: PairLogps) -> Tensor:
        logits = self.beta * difference(batch)
        flipped = self.label_smoothing
        return ((1 - flipped) * logistic(logits) - flipped * logistic(-logits)) / (1 - 2 * flipped)


@dataclass(kw_only=True)
class IPO(Objective):
    """(r(w)/|w| - r(l)/|l| - 1/(2 beta))^2, with beta = tau of the paper (arXiv:2310.12036, eq. 17).

    Assumes no model of rewards: the difference is pulled to 1/(2 beta), from above too, even where all agree on the
    label. The paper writes no lengths; its authors told TRL that their results divide by them.
    `length_normalised=False` takes the sums as written, which wants a far smaller beta.
    """

    beta: float = 0.1
    length_normalised: bool = True

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        chosen, rejected = log_ratios(batch)
        if self.length_normalised:
            chosen, rejected = per_token(chosen, batch.chosen_tokens), per_token(rejected, batch.rejected_tokens)
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@dataclass(kw_only=True)
class SLiC(Objective):
    """max(0, 1 - beta rho): SLiC's hinge on log-ratios (arXiv:2309.06657, hinge-norm; arXiv:2402.04792).

    The first SLiC (arXiv:2305.10425) has a hinge on log-probabilities and a term that holds the policy to its start;
    here the reference does that. Nothing is learned from a pair once rho > 1/beta.
    """

    beta: float = 0.1  # gamma of arXiv:2309.06657, 0.05 there

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)

    def __call__(self, batch: PairLogps) -> Tensor:
        return functional.relu(1 - self.beta * difference(batch))


@dataclass(kw_only=True)
class EXO(Objective):
    """KL(p || q) of the pair, p = (s(beta rho), s(-beta rho)) and q = (1 - e, e) (arXiv:2402.00856, eq. 16).

    The reverse of DPO's direction: the policy's choice p seeks the mode of the labels q. e = label_smoothing has to
    be above 0, as the divergence from a certain label is infinite. Least where s(beta rho) = 1 - e; flat far from it.
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3  # the paper's

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing} is outside (0, 0.5): exo has a logarithm of it;"
                " use the paper's 0.001"
            )

    def __call__(self, batch: PairLogps) -> Tensor:
        logits = self.beta * difference(batch)
        kept = -logistic(logits) - math.log1p(-self.label_smoothing)
        flipped = -logistic(-logits) - math.log(self.label_smoothing)
        return torch.sigmoid(logits) * kept + torch.sigmoid(-logits) * flipped


@dataclass(kw_only=True)
class DiscoPOP(Objective):
    """(1 - s(z/tau)) (-log s(z)) + s(z/tau) exp(-z), with z = beta rho (arXiv:2406.08414, eq. 5).

    DPO's loss where the policy gets a pair wrong, an exponential one where it gets it right, found by search. Not
    convex: with the paper's tau it rises from 0.79 to 0.88 between z = -0.12 and 0.07. A tau above 1 is refused, as
    the exponential would then win for z far below 0.
    """

    beta: float = 0.1  # the paper's: 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        if not 0 < self.tau <= 1:
            raise ValueError(f"objective.tau={self.tau} is outside (0, 1]; use the paper's 0.05")

    def __call__(self, batch: PairLogps) -> Tensor:
        logits = self.beta * difference(batch)
        modulated = logits / self.tau
        # As one exponential: 0 * exp(1000) would be no number.
        exponential = torch.exp(-logistic(modulated) - logits)
        return torch.sigmoid(-modulated) * logistic(logits) + exponential
