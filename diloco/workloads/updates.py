"""What is learned from completions and their rewards: pure functions, a loss for each prompt.

Rewards that are not numbers are those of completions that the judge refused: they have no say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco.workloads.objectives import Objective, PairLogps


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Completions of some prompts, several each: one number a completion in each tensor, [prompts, completions]."""

    policy: Tensor  # float32: log-probabilities, in nats; gradients flow to them
    anchor: Tensor  # float32: the same under what the policy is held to
    rewards: Tensor  # float32
    tokens: Tensor  # float32: how many


def best_and_worst(judged: Judged, objective: Objective) -> tuple[Tensor, Tensor]:
    """`objective` on the best and the worst completion of each prompt (OAIF, arXiv:2402.04792, Alg. 1).

    Returns losses, float32[prompts], 0 for a prompt whose best and worst are equally good, and bool[prompts]: those.
    """
    known = judged.rewards.isfinite()
    best = judged.rewards.masked_fill(~known, -math.inf).argmax(dim=1, keepdim=True)
    worst = judged.rewards.masked_fill(~known, math.inf).argmin(dim=1, keepdim=True)
    differ = judged.rewards.gather(1, best) > judged.rewards.gather(1, worst)
    ties = ~(differ & (known.sum(dim=1, keepdim=True) > 1)).squeeze(1)
    losses = judged.policy[:, 0] * 0.0  # of which gradients can be taken also where all are ties
    if not ties.all():
        chosen, rejected = (
            [values.gather(1, place)[~ties, 0] for values in (judged.policy, judged.anchor, judged.tokens)]
            for place in (best, worst)
        )
        pairs = PairLogps(
            policy_chosen=chosen[0],
            policy_rejected=rejected[0],
            reference_chosen=chosen[1],
            reference_rejected=rejected[1],
            chosen_tokens=chosen[2],
            rejected_tokens=rejected[2],
        )
        losses = losses.masked_scatter(~ties, objective(pairs))
    return losses, ties


def reinforce(judged: Judged, *, beta: float) -> Tensor:
    """-(r_beta - b) log pi(y), a mean over each prompt's completions: float32[prompts].

    r_beta = r - beta log(pi / pi_anchor)(y) (WARP, arXiv:2406.16768, Alg. 1), and b the mean r_beta of the prompt's
    other completions (leave-one-out, arXiv:2402.14740). Gradients flow through log pi only.
    """
    known = judged.rewards.isfinite()
    shaped = judged.rewards.nan_to_num(0.0) - beta * (judged.policy - judged.anchor).detach()
    shaped = torch.where(known, shaped, 0.0)
    count = known.sum(dim=1, keepdim=True)
    baseline = (shaped.sum(dim=1, keepdim=True) - shaped) / (count - 1).clamp(min=1)
    advantage = torch.where(known & (count > 1), shaped - baseline, 0.0)
    return -(advantage * judged.policy).sum(dim=1) / count.squeeze(1).clamp(min=1)


LOG_16 = math.log(16.0)  # where the policy loses to both anchors: E[r] matches that of log p at p = 1/2


def j_bond(judged: Judged, *, jeffreys: float, gamma: float) -> Tensor:
    """J-BOND (arXiv:2407.14622, Alg. 2) of one completion of the policy and two of its anchor, in this order.

    (1 - jeffreys) G_FW + jeffreys G_BW + gamma G_Reg, as losses with these gradients: float32[prompts].
    G_FW = -grad log pi(the anchor's better one); G_BW = -grad log pi(y) (R - B) with R = r_J - log(pi / pi_anchor)(y),
    r_J = -log 16 where y is worse than both, else 0, and B the mean R of the other prompts; G_Reg = +grad log pi(y)
    log(pi / pi_anchor)(y), the gradient of the divergence that eq. 19 adds (Algorithm 2 prints a minus). 0 for a prompt
    with a refused completion.
    """
    known = judged.rewards.isfinite().all(dim=1)
    rewards = judged.rewards.nan_to_num(0.0)
    log_ratio = (judged.policy[:, 0] - judged.anchor[:, 0]).detach()
    worst = rewards[:, 0] < rewards[:, 1:].amin(dim=1)
    returns = torch.where(known, torch.where(worst, -LOG_16, 0.0) - log_ratio, 0.0)
    baseline = (returns.sum() - returns) / (known.sum() - 1).clamp(min=1)
    better = judged.policy[:, 1:].gather(1, rewards[:, 1:].argmax(dim=1, keepdim=True)).squeeze(1)
    own = judged.policy[:, 0]
    losses = -(1 - jeffreys) * better - jeffreys * own * (returns - baseline) + gamma * own * log_ratio
    return torch.where(known, losses, 0.0)
