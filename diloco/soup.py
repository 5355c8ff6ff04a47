"""Soups: one model of several that were trained from one start, by the merges and outer steps of training itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from diloco.merge import Merge
from diloco.messages import Tensors
from diloco.outer import Sgd

MOST_NAMED = 3


def soup(
    start: Tensors, ingredients: Sequence[Tensors], weights: Sequence[float], merge: Merge, *, eta: float = 1.0
) -> Tensors:
    """`eta` of the way from `start` to what `merge` makes of the ingredients: (1 - eta) start + eta merged.

    LITI of WARP (arXiv:2406.16768, section 3.3), model soups (arXiv:2203.05482), rewarded soups (arXiv:2306.04488).
    New float32 tensors. One ingredient alone is what it is merged to. Ingredients of weight 0 are left out.
    """
    if eta == 0.0:
        return {name: value.clone() for name, value in start.items()}
    chosen = [(values, weight) for values, weight in zip(ingredients, weights, strict=True) if weight]
    if len(chosen) == 1 and eta == 1.0:
        return {name: value.clone() for name, value in chosen[0][0].items()}
    deltas = ({name: start[name] - values[name] for name in start} for values, _ in chosen)
    merged = merge.combine(deltas, [weight for _, weight in chosen])
    found = {name: value.clone() for name, value in start.items()}
    Sgd(lr=eta).step(found, merged, {})
    return found


def greedy(losses: Sequence[float], loss_of: Callable[[Sequence[float]], float]) -> tuple[list[float], float]:
    """Weights 0 and 1, and the loss with them: each ingredient, the best first, stays where the soup is no worse.

    arXiv:2203.05482, Recipe 1. `loss_of`: of the soup with these weights.
    """
    chosen = [0.0] * len(losses)
    lowest = float("inf")
    for index in sorted(range(len(losses)), key=lambda index: losses[index]):
        tried = [*chosen[:index], 1.0, *chosen[index + 1 :]]
        loss = loss_of(tried) if any(chosen) else losses[index]
        if loss <= lowest:
            chosen, lowest = tried, loss
    return chosen, lowest


def check_same_start(starts: Mapping[str, Tensors]) -> None:
    """Raise ValueError where these, by label, differ in a parameter's name, shape or value; it tells which."""
    labels = list(starts)
    first = starts[labels[0]]
    for label in labels[1:]:
        other = starts[label]
        names = sorted(first.keys() | other.keys())
        differing = [
            name for name in names if name not in first or name not in other or not _equal(first[name], other[name])
        ]
        if differing:
            told = ", ".join(_difference(name, first, other) for name in differing[:MOST_NAMED])
            more = f" and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
            raise ValueError(
                f"{labels[0]} and {label} were not trained from one start, and cannot be averaged: {told}{more}; begin"
                " them with the same workload.model or init_from, adapters also with the same init_from or seed"
            )


def _equal(first: torch.Tensor, other: torch.Tensor) -> bool:
    return first.shape == other.shape and torch.equal(first, other)


def _difference(name: str, first: Tensors, other: Tensors) -> str:
    if name not in first or name not in other:
        return f"{name} is in one only"
    shapes = tuple(first[name].shape), tuple(other[name].shape)
    return f"{name} is {shapes[0]} and {shapes[1]}" if shapes[0] != shapes[1] else f"{name} has other values"
