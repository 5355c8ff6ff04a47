"""Connecting to a Ray cluster, or starting Ray on this machine so that the run fits."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import ray

from diloco.runtime.base import Job

PROCESS_BYTES = 600 << 20  # what an island's imports and a small model take at least


def connect(job: Job, *, address: str, object_store_bytes: int) -> None:
    """Connect to `address` or RAY_ADDRESS where given, else start Ray here. ValueError where the run does not fit."""
    runtime_env = {"py_modules": [sys.modules[name] for name in _top_level(job.imports)]} if job.imports else None
    address = address or os.environ.get("RAY_ADDRESS", "")
    if ray.is_initialized():
        _check_cluster(job)
    elif address:
        try:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            hint = "start one, or unset RAY_ADDRESS"
            raise ValueError(f"no Ray cluster answers at {address} ({error}); {hint}") from error
        _check_cluster(job)
    else:
        _check_machine(job)
        os.environ.setdefault("RAY_preallocate_plasma_memory", "1")
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, job.islands * job.threads_per_worker),
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )


def shared_cores(job: Job) -> str:
    """A remark where this machine has fewer cores than the islands would fill; empty where it has enough."""
    wanted, there = job.islands * job.threads_per_worker, os.cpu_count() or 1
    return f"{job.islands} islands share {there} cores ({wanted} wanted)" if wanted > there else ""


def _check_machine(job: Job) -> None:
    processes = job.islands + job.shards + 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if processes * PROCESS_BYTES > memory:
        fits = max(memory // PROCESS_BYTES - job.shards - 1, 0)
        raise ValueError(
            f"islands={job.islands} needs {processes} processes of about {PROCESS_BYTES >> 20} MiB, and this machine"
            f" has {memory >> 20} MiB of memory; use islands={fits} or fewer, or a cluster (RAY_ADDRESS)"
        )


def _check_cluster(job: Job) -> None:
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = len(ray.nodes())  # type: ignore[no-untyped-call]
    wanted = {"CPU": job.islands * job.threads_per_worker, "GPU": job.islands * job.gpus_per_worker}
    for name, amount in wanted.items():
        if amount > there.get(name, 0.0):
            raise ValueError(
                f"islands={job.islands} needs {amount:g} {name}, the cluster has {there.get(name, 0.0):g} in"
                f" {nodes} node(s); use fewer islands or start more nodes"
            )


def _top_level(names: tuple[str, ...]) -> list[str]:
    top = sorted({name.partition(".")[0] for name in names})
    for name in top:
        importlib.import_module(name)
    return top
