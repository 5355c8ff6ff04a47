"""Where a process of a run is, and what it is given to begin with."""

from __future__ import annotations

import importlib
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch

from diloco import processes, versions
from diloco.runtime.base import Job


@dataclass(frozen=True, kw_only=True)
class Where:
    """The place of a process."""

    node: str  # Ray's name of it
    host: str  # its address
    pid: int
    raylet: int  # the process of Ray's that started this one, and ends with the node
    born: int  # see diloco/processes.py
    cpu_s: float  # that it has used so far

    @classmethod
    def here(cls) -> Where:
        """That of this process."""
        node = str(ray.get_runtime_context().get_node_id())
        born = 0  # where the kernel is another
        with suppress(OSError):
            born = processes.born(os.getpid())
        used_s = round(time.process_time(), 2)
        return cls(node=node, host=host(), pid=os.getpid(), raylet=os.getppid(), born=born, cpu_s=used_s)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A job that is opened only where the project is of the same version."""

    version: str
    host: str  # the driver's
    content: Any  # a reference to the job

    @classmethod
    def of(cls, job: Job) -> Packed:
        """For actors."""
        return cls(version=versions.own(), host=host(), content=ray.put(job))

    def opened(self) -> Job:
        """In an actor. Raises ValueError where its node has another version than the driver's."""
        if host() != self.host:
            versions.check(self.version, host())
        job: Job = ray.get(self.content)
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("diloco").setLevel(logging.INFO)
        torch.set_num_threads(job.threads_per_worker)
        for module in job.imports:  # registers the user's own parts here too
            importlib.import_module(module)
        return job


def host() -> str:
    """The address of this process's node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
