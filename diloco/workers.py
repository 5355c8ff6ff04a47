"""The workers of one island: how they meet, and what each knows of the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

SIOCGIFADDR = 0x8915  # asks Linux for the address of a network interface


@dataclass(frozen=True, kw_only=True)
class World:
    """The workers of one island, as one of them sees them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    checkpoints: dist.ProcessGroup | None = None  # of its own, since checkpoints are written in another thread


def meet(host: str) -> TCPStore:
    """Where the workers of an island meet; kept by rank 0, whose address `host` is. Its `port` is a free one."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def join(store: Store | str, *, host: str, rank: int, size: int, device: torch.device, shared: bool) -> World:
    """Wait for the other workers. `store`: what `meet` gave, or its `host:port`; `host`: this worker's own address.

    NCCL on CUDA, but gloo where several workers are `shared` on one device, which NCCL refuses.
    """
    if isinstance(store, str):
        name, _, port = store.rpartition(":")
        store = TCPStore(name, int(port), is_master=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(host))
    backend = "nccl" if device.type == "cuda" and not shared else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    checkpoints = dist.new_group(backend="gloo")
    return World(rank=rank, size=size, device=device, checkpoints=checkpoints)


def leave() -> None:
    """Let the other workers see that this one has stopped, rather than wait for it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _interface(host: str) -> str:
    """The network interface that has this address; gloo would take that of the host's name, often the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == host:
                    return name
    return "lo"
