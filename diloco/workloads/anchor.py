"""An average of the policy over its past steps, which it is held to while it learns."""

from __future__ import annotations

import copy

import torch
from torch import nn

from diloco.messages import Tensors


class EmaAnchor:
    """theta_ema <- (1 - rate) theta_ema + rate theta, once a step (WARP, arXiv:2406.16768, Alg. 1; J-BOND, 2407.14622).

    It begins as the policy is at its first step. Only what is trained is averaged, and saved.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._model: nn.Module | None = None
        self._averaged: Tensors = {}  # of the model, or what `load` was given

    @property
    def model(self) -> nn.Module:
        """The averaged policy, in eval mode; `follow` was called before."""
        assert self._model is not None
        return self._model

    def follow(self, policy: nn.Module, *, anew: bool) -> None:
        """One step towards `policy`; the first, or one `anew`, becomes it."""
        trained = {name: value.detach() for name, value in policy.named_parameters() if value.requires_grad}
        if self._model is None:
            self._model = copy.deepcopy(policy).eval().requires_grad_(False)
            own = dict(self._model.named_parameters())
            for name, value in self._averaged.items():
                own[name].copy_(value)
            anew = anew or not self._averaged
            self._averaged = {name: own[name] for name in trained}
        for name, value in trained.items():
            if anew:
                self._averaged[name].copy_(value)
            else:
                self._averaged[name].lerp_(value, self._rate)

    def state(self) -> Tensors:
        """What is averaged, by name of parameter; empty before the first step."""
        return dict(self._averaged)

    def load(self, averaged: Tensors) -> None:
        """Take back what `state` gave; an empty one begins anew."""
        self._model = None
        self._averaged = {name: torch.clone(value) for name, value in averaged.items()}
