"""The replica of a worker that holds a part of every parameter: torch's FSDP2 (fully_shard) and its DTensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diloco import buffers
from diloco.feedback import Encoder
from diloco.layout import block_of
from diloco.messages import Payload, Shape, Tensors
from diloco.replica import Replica, checked, mix
from diloco.workers import World


class Fsdp2(Replica):
    """torch's fully_shard: each worker holds rows of every parameter; blocks are gathered while they are used.

    Anchors are spread in the same way, so that beyond the model no worker ever holds more than one whole slot.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        if world.device.type == "cuda" and dist.get_backend() == "gloo":  # whose all-gather would end the process
            raise ValueError(
                "replica=fsdp2: workers that share a GPU cannot gather the model's parts; use gpus_per_worker=1,"
                " or replica=ddp"
            )
        self._mesh = DeviceMesh(world.device.type, list(range(world.size)))
        for name, module in checked(model).named_modules():
            if name and block_of(f"{name}.weight") == name:
                fully_shard(module, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        super().__init__(model, world)
        self._sharded = {name: p for name, p in self._parameters.items() if isinstance(p, DTensor)}

    @property
    def saves(self) -> bool:
        """Each worker has its own part."""
        return True

    def read(self, names: Sequence[str]) -> Tensors:
        """Gathered on every worker."""
        return {name: self._sharded[name].full_tensor().detach() for name in names}

    def agreed(self, known: int) -> int:
        """Told by the worker that sends."""
        told = torch.tensor([known], dtype=torch.uint8, device=self.world.device)
        dist.broadcast(told, src=0)
        return int(told)

    def parts(self, names: Sequence[str]) -> Tensors:
        """The rows here."""
        return {name: self._sharded[name].to_local().detach().cpu().clone() for name in names}

    @torch.no_grad()
    def spread(self, names: Sequence[str], values: Tensors) -> Tensors:
        """One parameter after the other is scattered from the worker that has the values."""
        device, parts = self.world.device, {}
        for name in names:
            own = self._sharded[name]
            value = values[name].to(device) if self.sends else torch.empty(own.shape, device=device)
            rows = distribute_tensor(value, self._mesh, own.placements, src_data_rank=0).to_local()
            parts[name] = rows.cpu().clone()  # its own memory, not a view of the whole value
        return parts

    def install(self, names: Sequence[str], anchor: Tensors, keep: float) -> None:
        """Each worker its rows."""
        mix({name: self._sharded[name].to_local() for name in names}, anchor, keep)

    @torch.no_grad()
    def contribution(self, encoder: Encoder, anchor: Tensors, names: Sequence[str]) -> Payload | None:
        """One parameter's difference after the other is gathered; only the worker that sends keeps it."""
        delta = buffers.like({name: self._sharded[name] for name in names}) if self.sends else {}
        for name in names:
            own = self._sharded[name]
            rows = anchor[name].to(self.world.device) - own.to_local()
            full = self._like(own, rows).full_tensor()
            if self.sends:
                delta[name].copy_(full)
        return encoder.encode(delta) if self.sends else None

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        """FSDP2's own switch."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def gradient_norm(self) -> Tensor:
        """Summed over the parts."""
        norm = super().gradient_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def bytes_per_step(self, accumulation: int) -> int:
        """Two all-gathers of the parameters for each part of the batch, and one reduce-scatter of the gradients.

        Each sends N(1 - 1/W) for each of W workers.
        """
        gathered = sum(p.numel() for p in self.model.parameters())
        reduced = sum(p.numel() for p in self._parameters.values())
        return 4 * (2 * accumulation * gathered + reduced) * (self.world.size - 1)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A DTensor on CPU memory."""
        return self._like(self._sharded[name], part)

    def part(self, value: Tensor) -> Tensor:
        """The rows here."""
        return value.to_local() if isinstance(value, DTensor) else value

    def taken(self, name: str | None, value: Tensor) -> Tensor:
        """Cut where the checkpoint is of an island of one worker."""
        own = None if name is None else self._sharded.get(name)
        if own is None or isinstance(value, DTensor) or value.shape != own.shape:
            return value
        return distribute_tensor(value, self._mesh, own.placements, src_data_rank=None)

    def empty(self, name: str | None, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A DTensor where the shape is that of the parameter."""
        own = None if name is None else self._sharded.get(name)
        if own is None or tuple(own.shape) != shape:
            return torch.empty(shape, dtype=dtype)
        return self._like(own, torch.empty(own.to_local().shape, dtype=dtype))

    def _like(self, own: DTensor, rows: Tensor) -> DTensor:
        return DTensor.from_local(
            rows, self._mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )
