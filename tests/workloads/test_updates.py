"""What is learned from rewards: each update against a calculation by hand, and what refused completions change."""

from __future__ import annotations

import math

import pytest
import torch

from diloco.workloads.objectives import DPO
from diloco.workloads.updates import LOG_16, Judged, best_and_worst, j_bond, reinforce

NAN = math.nan


def judged(policy: list[list[float]], rewards: list[list[float]], anchor: list[list[float]] | None = None) -> Judged:
    values = torch.tensor(policy, requires_grad=True)
    return Judged(
        policy=values,
        anchor=torch.tensor(anchor) if anchor else torch.zeros_like(values.detach()),
        rewards=torch.tensor(rewards),
        tokens=torch.full_like(values.detach(), 3.0),
    )


def test_the_best_and_the_worst_are_a_pair() -> None:
    """Three completions; the middle one has no say. DPO by hand: -log s(.1 ((-1 + 2) - (-5 + 4)))."""
    given = judged([[-5.0, -3.0, -1.0]], [[0.0, 1.0, 2.0]], [[-4.0, -3.0, -2.0]])
    losses, ties = best_and_worst(given, DPO(beta=0.1))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.2))]) and not ties.any()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    slope = -0.1 / (1 + math.exp(0.2))
    assert given.policy.grad is not None
    assert given.policy.grad.tolist()[0] == pytest.approx([-slope, 0.0, slope])


def test_ties_and_refused_completions_teach_nothing() -> None:
    rewards = [[1.0, 1.0, 1.0], [NAN, 2.0, 1.0], [NAN, NAN, 1.0], [NAN, NAN, NAN]]
    given = judged([[-1.0, -2.0, -3.0]] * 4, rewards)
    losses, ties = best_and_worst(given, DPO(beta=1.0))
    assert ties.tolist() == [True, False, True, True]
    assert losses[1].item() == pytest.approx(math.log1p(math.exp(-1.0)))  # the second against the third
    assert losses[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    losses.mean().backward()  # type: ignore[no-untyped-call]
    assert given.policy.grad is not None and given.policy.grad.isfinite().all()


def test_where_all_are_ties_there_is_a_gradient_of_nothing() -> None:
    given = judged([[-1.0, -2.0]], [[0.0, 0.0]])
    best_and_worst(given, DPO())[0].mean().backward()  # type: ignore[no-untyped-call]
    assert given.policy.grad is not None and given.policy.grad.tolist() == [[0.0, 0.0]]


def test_reinforce_by_hand() -> None:
    """Rewards less beta times the log-ratios: 2 - .5, 1 - 0, 0 - 1; baselines 0, .25, 1.25."""
    given = judged([[-1.0, -2.0, -3.0]], [[2.0, 1.0, 0.0]], [[-1.5, -2.0, -4.0]])
    loss = reinforce(given, beta=1.0)
    assert loss.tolist() == pytest.approx([-(1.5 * -1.0 + 0.75 * -2.0 + -2.25 * -3.0) / 3])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert given.policy.grad is not None
    assert given.policy.grad.tolist()[0] == pytest.approx([-0.5, -0.25, 0.75])


def test_reinforce_without_a_refused_completion_is_as_if_it_had_never_been() -> None:
    whole = judged([[-1.0, -2.0]], [[2.0, 1.0]], [[-1.5, -1.0]])
    more = judged([[-1.0, -7.0, -2.0]], [[2.0, NAN, 1.0]], [[-1.5, -9.0, -1.0]])
    assert reinforce(more, beta=0.3).tolist() == pytest.approx(reinforce(whole, beta=0.3).tolist())
    alone = judged([[-1.0, -2.0]], [[2.0, NAN]])
    assert reinforce(alone, beta=0.3).tolist() == [0.0]


def test_j_bond_by_hand() -> None:
    """Two prompts: the policy loses to both anchors in the first, beats one in the second."""
    given = judged(
        [[-3.0, -2.0, -4.0], [-1.0, -6.0, -5.0]],
        [[0.0, 1.0, 2.0], [1.0, 0.0, 2.0]],
        [[-2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]],
    )
    losses = j_bond(given, jeffreys=0.25, gamma=2.0)
    returns = [-LOG_16 + 1.0, -1.0]  # r_J less the log-ratio, -1 and 1
    first = 0.75 * 4.0 - 0.25 * -3.0 * (returns[0] - returns[1]) + 2.0 * -3.0 * -1.0
    second = 0.75 * 5.0 - 0.25 * -1.0 * (returns[1] - returns[0]) + 2.0 * -1.0 * 1.0
    assert losses.tolist() == pytest.approx([first, second])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert given.policy.grad is not None
    own = [-0.25 * (returns[0] - returns[1]) - 2.0, -0.25 * (returns[1] - returns[0]) + 2.0]
    assert given.policy.grad.flatten().tolist() == pytest.approx([own[0], 0.0, -0.75, own[1], 0.0, -0.75])


def test_j_bond_goes_down_the_divergence() -> None:
    """With gamma alone, the likelihood of what the policy has more of than its anchor falls."""
    given = judged([[-1.0, -2.0, -2.0]], [[1.0, 0.0, 0.0]], [[-3.0, -2.0, -2.0]])
    losses = j_bond(given, jeffreys=1.0, gamma=1.0)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert given.policy.grad is not None
    assert given.policy.grad[0, 0] == pytest.approx(-(0.0 - 2.0) + 2.0)  # R = -2 without another prompt, and G_Reg


def test_j_bond_leaves_out_prompts_with_a_refused_completion() -> None:
    whole = judged([[-3.0, -2.0, -4.0], [-1.0, -6.0, -5.0]], [[0.0, 1.0, 2.0], [1.0, 0.0, 2.0]])
    row = [[-9.0, -9.0, -9.0]]
    more = judged(whole.policy.tolist() + row, whole.rewards.tolist() + [[NAN, 1.0, 1.0]])
    found, expected = j_bond(more, jeffreys=0.5, gamma=1.0), j_bond(whole, jeffreys=0.5, gamma=1.0)
    assert found.tolist() == pytest.approx([*expected.tolist(), 0.0])
