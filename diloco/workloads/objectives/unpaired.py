"""KTO: completions that are each labelled desirable or not, without a partner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.workloads.objectives.base import check_logps, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class UnpairedLogps:
    """Completions with a label each. Log-probabilities are sums over their tokens, in nats.

    Raises ValueError for tensors of other shapes, or below float32.
    """

    policy: Tensor  # float32[examples]
    reference: Tensor  # float32[examples]
    desirable: Tensor  # bool[examples]
    kl: Tensor  # float32[], at least 0: how far the policy is from the reference, see `kl_estimate`

    def __post_init__(self) -> None:
        check_logps({"policy": self.policy, "reference": self.reference, "desirable": self.desirable}, one="example")
        if self.desirable.dtype != torch.bool:
            raise ValueError(f"desirable is {self.desirable.dtype}; give torch.bool, True for what is wanted")
        if self.kl.ndim:
            raise ValueError(f"kl has the shape {tuple(self.kl.shape)}; give one number for the batch")


@dataclass(kw_only=True)
class KTO:
    """weight * s(-beta (r - kl)) for a desirable completion, weight * s(beta (r - kl)) for another (arXiv:2402.01306).

    lambda_y - v(x, y) there (section 4), with lambda_D and lambda_U the weights and r = logp - logp_ref. Assumes that
    people judge a completion against the reference point kl, and gains and losses by weights of their own. Where one
    label is rarer, the paper wants desirable_weight * desirable ones / (undesirable_weight * others) between 1 and
    4/3. No gradient flows through kl.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta, usual=0.1)
        check_not_negative("desirable_weight", self.desirable_weight)
        check_not_negative("undesirable_weight", self.undesirable_weight)

    def __call__(self, batch: UnpairedLogps) -> Tensor:
        """float32[examples], in the batch's order. Their mean is the loss; gradients flow to `policy`."""
        gains = self.beta * (batch.policy - batch.reference - batch.kl.detach())
        wanted = self.desirable_weight * torch.sigmoid(-gains)
        unwanted = self.undesirable_weight * torch.sigmoid(gains)
        return torch.where(batch.desirable, wanted, unwanted)


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """float32[]: the mean log-ratio of completions of other prompts, at least 0, without gradient.

    `policy` and `reference` are float32[examples]: log-probabilities of each prompt's batch neighbour's completion.
    The paper's estimate (arXiv:2402.01306, section 4): biased, but cheap; it needs a forward pass of its own.
    """
    return (policy - reference).detach().mean().clamp(min=0)
