"""Replica: a model as named full tensors, read and written by slot. The only file that knows how it is sharded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diloco.messages import Shape, Tensors


class Replica(ABC):
    """One island's copy of the model."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """What the loss is called with."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters as this worker holds them, by canonical name; a tied one under its first name."""

    @abstractmethod
    def read(self, names: Sequence[str]) -> Tensors:
        """Full float32 values of these parameters; views where they can be, so read before the next write."""

    @abstractmethod
    def write(self, values: Tensors, keep: float) -> None:
        """parameter <- keep * parameter + (1 - keep) * value, in place."""

    def shapes(self) -> dict[str, Shape]:
        """Name -> full shape of each trainable parameter."""
        return {name: tuple(value.shape) for name, value in self.parameters().items()}


class Single(Replica):
    """A whole model in one process. Keeps float32 local weights whatever the dtype of compute."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        _refuse_batch_statistics(model)
        self._model = model.to(device=device)
        # named_parameters lists a tied tensor once, under its first name.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("the model has no trainable parameter; set requires_grad on those to train")
        wrong = [name for name, p in self._parameters.items() if p.dtype != torch.float32]
        if wrong:
            raise ValueError(f"parameter {wrong[0]} is not float32; build_model must give a float32 model")

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._model

    def parameters(self) -> dict[str, Tensor]:
        """The model's own tensors."""
        return dict(self._parameters)

    def read(self, names: Sequence[str]) -> Tensors:
        """Views of the parameters."""
        return {name: self._parameters[name].detach() for name in names}

    @torch.no_grad()
    def write(self, values: Tensors, keep: float) -> None:
        """Copies from any device."""
        for name, value in values.items():
            if keep == 0.0:
                self._parameters[name].copy_(value)
            elif keep != 1.0:
                self._parameters[name].mul_(keep).add_(value.to(self._parameters[name].device), alpha=1 - keep)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"{name} keeps batch statistics, which islands do not exchange; use LayerNorm, RMSNorm or GroupNorm"
            )
