"""What an objective on pairs is: log-probabilities of completions in, a loss for each pair out.

In the formulas of this package w is the chosen and l the rejected completion of a prompt, logp(y) the sum of the
policy's log-probabilities over y's tokens, |y| their number, r(y) = logp(y) - logp_ref(y) the log-ratio to the
reference, and rho = r(w) - r(l). s is the logistic function.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Pairs of completions, a chosen and a rejected one for each prompt: one number a pair in each tensor.

    The log-probabilities are sums over the tokens of the completion, in nats. The reference's may be anything for an
    objective with `uses_reference = False`. Raises ValueError for a tensor of another shape, or below float32.
    """

    policy_chosen: Tensor  # float32[pairs]
    policy_rejected: Tensor  # float32[pairs]
    reference_chosen: Tensor  # float32[pairs]
    reference_rejected: Tensor  # float32[pairs]
    chosen_tokens: Tensor  # float32[pairs]: how many tokens the completion has
    rejected_tokens: Tensor  # float32[pairs]
    margin: Tensor | None = None  # float32[pairs]: by how much the rewards are to differ, if the data tell it

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        check_logps(given, one="pair")


@dataclass(kw_only=True)
class Objective(ABC):
    """The loss of each pair: a pure function whose settings are the fields."""

    uses_reference: ClassVar[bool] = True  # whether the reference's log-probabilities are needed at all
    uses_margin: ClassVar[bool] = False  # whether `PairLogps.margin` counts; elsewhere it is ignored

    @abstractmethod
    def __call__(self, batch: PairLogps) -> Tensor:
        """float32[pairs], in the batch's order. Their mean is the loss; gradients flow to the policy's values."""

    @property
    def whole_batch(self) -> bool:
        """Whether the loss of a pair depends on the other pairs: then the mean changes with how a batch is cut."""
        return False


def log_ratios(batch: PairLogps) -> tuple[Tensor, Tensor]:
    """r(w) and r(l): float32[pairs] each."""
    return batch.policy_chosen - batch.reference_chosen, batch.policy_rejected - batch.reference_rejected


def difference(batch: PairLogps) -> Tensor:
    """rho = r(w) - r(l): float32[pairs]."""
    chosen, rejected = log_ratios(batch)
    return chosen - rejected


def per_token(logps: Tensor, tokens: Tensor) -> Tensor:
    """float32[pairs]: sums as means over tokens; 0 where there are none."""
    return logps / tokens.clamp(min=1)


def logistic(logits: Tensor) -> Tensor:
    """-log s(logits), neither over- nor underflowing."""
    return -functional.logsigmoid(logits)


def implied_rewards(batch: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """beta r(w) and beta r(l), without gradient: float32[pairs] each (arXiv:2305.18290, section 5).

    For metrics: a pair is told apart where the first is larger. With a reference of zeros: beta logp.
    """
    chosen, rejected = log_ratios(batch)
    return beta * chosen.detach(), beta * rejected.detach()


def check_logps(given: dict[str, Tensor], *, one: str) -> None:
    """Raise ValueError unless all tensors hold one number for each `one`, of at least 32 bits where not whole."""
    first, shape = next((name, value.shape) for name, value in given.items())
    for name, value in given.items():
        if value.ndim != 1 or value.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}: give one number a {one}, summed over tokens,"
                f" as many as in {first}, whose shape is {tuple(shape)}"
            )
        if value.is_floating_point() and value.element_size() < 4:
            raise ValueError(f"{name} is {value.dtype}, which rounds sums of log-probabilities; give torch.float32")


def check_positive(name: str, value: float, *, usual: float) -> None:
    """Raise ValueError unless the setting `name` is a positive number."""
    if not 0 < value < math.inf:
        raise ValueError(f"objective.{name}={value} must be a positive number, such as {usual}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless the setting `name` is zero or a positive number."""
    if not 0 <= value < math.inf:
        raise ValueError(f"objective.{name}={value} must be a positive number, or 0 to leave it out")


def check_smoothing(value: float) -> None:
    """Raise ValueError unless so many labels may be flipped."""
    if not 0 <= value < 0.5:
        raise ValueError(
            f"objective.label_smoothing={value} is outside [0, 0.5): it is the share of pairs with chosen and rejected"
            " the wrong way round; use 0.1, say"
        )
