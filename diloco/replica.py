"""Replica: an island's model, read and written by slot. This file and `fsdp2.py` know how it is spread over workers.

An island of one worker has a `Single`; the workers of a larger one have a `Ddp` or an `Fsdp2` each. What a worker
holds of a tensor is its *part*: all of it, or with FSDP2 some of its rows. Methods marked *collective* must be called
by all workers of the island, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diloco.feedback import Encoder
from diloco.messages import Payload, Shape, Tensors
from diloco.workers import World


class ReplicaKind(Enum):
    """How the workers of an island share the model."""

    ddp = "ddp"  # each has all of it
    fsdp2 = "fsdp2"  # each has a part of every parameter, gradient and moment


class Replica(ABC):
    """One worker's copy, or part, of its island's model. Local weights are float32 whatever the dtype of compute."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.model = model  # the model itself; what the loss is called with is `forward`
        self.forward = model
        # named_parameters lists a tied tensor once, under its first name.
        self._parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters as the optimizer holds them, by canonical name."""
        return dict(self._parameters)

    def shapes(self) -> dict[str, Shape]:
        """Name -> full shape of each trainable parameter."""
        return {name: tuple(value.shape) for name, value in self._parameters.items()}

    @property
    def sends(self) -> bool:
        """Whether this worker takes the island's snapshots and sends its contributions."""
        return self.world.rank == 0

    @property
    def saves(self) -> bool:
        """Whether this worker holds something that a checkpoint needs."""
        return self.sends

    def read(self, names: Sequence[str]) -> Tensors:
        """Full float32 values of these parameters; where they are views, read before the next write. Collective."""
        return {name: self._parameters[name].detach() for name in names}

    def sha256(self) -> str:
        """Digest of the full float32 values in order of name. Collective."""
        digest = hashlib.sha256()
        for name in sorted(self._parameters):
            digest.update(self.read([name])[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def agreed(self, known: int) -> int:
        """What the worker that `sends` knows, below 256, on all that need it. Collective."""
        return known

    def parts(self, names: Sequence[str]) -> Tensors:
        """Copies of the present values, as `spread` would have given them to this worker."""
        return {name: value.cpu().clone() for name, value in self.read(names).items()} if self.sends else {}

    @abstractmethod
    def spread(self, names: Sequence[str], values: Tensors) -> Tensors:
        """Global values, or an update of them, as far as this worker needs them for anchors: float32 on the CPU.

        `values`: full float32 CPU tensors on the worker that `sends`, ignored on the others. Collective.
        """

    @abstractmethod
    def install(self, names: Sequence[str], anchor: Tensors, keep: float) -> None:
        """parameter <- keep * parameter + (1 - keep) * anchor, in place; `anchor` from `spread`. Collective."""

    def contribution(self, encoder: Encoder, anchor: Tensors, names: Sequence[str]) -> Payload | None:
        """anchor - parameter, in float32 before any cast for the wire (pitfall L11), encoded. Collective.

        None on the workers that do not send.
        """
        return encoder.encode_difference(anchor, self.read(names)) if self.sends else None

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: gradients are exchanged between the workers only in the `last` one of a step."""
        return contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """L2 norm of the joint batch's gradient, over all parameters and workers. Collective."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the workers, on each. Writes `values`. Collective."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    def bytes_per_step(self, accumulation: int) -> int:
        """What all workers of the island together send to each other on an inner step, by ring collectives.

        `accumulation`: the parts that the batch is cut into.
        """
        return 0

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A part of parameter `name`, as a tensor that checkpoints know the place of."""
        return part

    def part(self, value: Tensor) -> Tensor:
        """What this worker holds of a tensor that `whole` or `empty` made."""
        return value

    def taken(self, name: str | None, value: Tensor) -> Tensor:
        """A full tensor, or one that `empty` made, as this worker holds it; of parameter `name`, if one is named."""
        return value

    def empty(self, name: str | None, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A CPU tensor to read a checkpoint into; spread over the workers as parameter `name` is, if one is named."""
        return torch.empty(shape, dtype=dtype)


class Single(Replica):
    """A whole model in one process."""

    def __init__(self, model: nn.Module, world: World | None = None) -> None:
        world = world or World()
        super().__init__(checked(model).to(device=world.device), world)

    def spread(self, names: Sequence[str], values: Tensors) -> Tensors:
        """The values themselves."""
        return values

    def install(self, names: Sequence[str], anchor: Tensors, keep: float) -> None:
        """All of it, here."""
        mix({name: self._parameters[name] for name in names}, anchor, keep)


class Ddp(Replica):
    """A whole model on every worker; torch's DistributedDataParallel averages the gradients."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(checked(model).to(device=world.device), world)
        with warnings.catch_warnings():  # its new name would exchange buffers at the start
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self._ddp = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
        self.forward = self._ddp

    def spread(self, names: Sequence[str], values: Tensors) -> Tensors:
        """Kept where they are: no other worker needs an anchor."""
        return values

    def install(self, names: Sequence[str], anchor: Tensors, keep: float) -> None:
        """Mixed where the anchor is, then broadcast."""
        if self.sends:
            mix({name: self._parameters[name] for name in names}, anchor, keep)
        for sent in [dist.broadcast(self._parameters[n].detach(), src=0, async_op=True) for n in names]:
            sent.wait()

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """DDP's own switch."""
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def bytes_per_step(self, accumulation: int) -> int:
        """One all-reduce of the gradients: 2N(1 - 1/W) for each of W workers."""
        return 4 * 2 * sum(p.numel() for p in self._parameters.values()) * (self.world.size - 1)


@torch.no_grad()
def mix(parameters: Tensors, values: Tensors, keep: float) -> None:
    """parameter <- keep * parameter + (1 - keep) * value, in place; `values` on any device."""
    for name, parameter in parameters.items():
        if keep == 0.0:
            parameter.copy_(values[name])
        elif keep != 1.0:
            parameter.mul_(keep).add_(values[name].to(parameter.device), alpha=1 - keep)


def checked(model: nn.Module) -> nn.Module:
    """The model, if islands can train it. Raises ValueError."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"{name} keeps batch statistics, which islands do not exchange; use LayerNorm, RMSNorm or GroupNorm"
            )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter; set requires_grad on those to train")
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32]
    if wrong:
        raise ValueError(f"parameter {wrong[0]} is not float32; build_model must give a float32 model")
    return model
