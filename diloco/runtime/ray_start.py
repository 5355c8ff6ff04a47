"""Connecting to a Ray cluster, or starting Ray on this machine so that the run fits."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray._private.state import state

from diloco.messages import IslandId
from diloco.runtime import reaper
from diloco.runtime.base import Job
from diloco.runtime.ray_address import connect_to
from diloco.runtime.ray_refs import SAY_EVERY_S, listed
from diloco.runtime.ray_signals import daemons_apart, own_answers

PROCESS_BYTES = 600 << 20  # what an island's imports and a small model take at least
PLACEMENT_WAIT_S = 15.0  # for what a run that just ended still holds
KEPT_ROUNDS = 3  # of which the object store has room: the present one, the last, and what is being evaluated
LEAST_STORE_BYTES = 256 << 20
LARGE_STORE_BYTES = 1 << 30  # for models of unknown size; preallocating it takes .6 s of the start
MOST_OF_MEMORY = 0.3
ROUNDING = 1e-6  # 1 / .2 is a little less than 5


def connect(job: Job, *, address: str, object_store_bytes: int) -> bool:
    """Connect to `address` or RAY_ADDRESS where given, else start Ray here; False where Ray was connected already.

    Raises ValueError where the run does not fit.
    """
    runtime_env = {"py_modules": _modules(job.imports)} if job.imports else None
    address = address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of islands that were given up: the log tells of them
    if ray.is_initialized():
        _check_cluster(job)
        return False
    if address:
        with own_answers():
            connect_to(address, runtime_env)
        try:
            _check_cluster(job)
        except ValueError:
            ray.shutdown()
            raise
        return True
    _check_machine(job)
    reaper.watch(os.path.dirname(ray.__file__))
    object_store_bytes = object_store_bytes or _a_few_rounds_bytes(job)
    # Memory is slow when it is touched for the first time; but much of it takes long to start with.
    os.environ.setdefault("RAY_preallocate_plasma_memory", str(int(object_store_bytes <= LARGE_STORE_BYTES)))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves islands beside any other busy process
    with own_answers(), daemons_apart():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, sum(job.workers) * job.threads_per_worker),
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )
    return True


def disconnect() -> None:
    """Leave the cluster that `connect` connected to; a Ray that it started ends."""
    ray.shutdown()
    reaper.release()


def _a_few_rounds_bytes(job: Job) -> int:
    """What the contributions and snapshots of some rounds take; small, since a small store is a fast one."""
    parameters = job.workload.num_parameters()
    if not parameters:
        return LARGE_STORE_BYTES
    round_bytes = 4 * parameters * (job.islands + 1)
    most = int(_memory_bytes() * MOST_OF_MEMORY)
    if round_bytes > most:
        print(
            f"a round's {round_bytes >> 20} MiB do not fit into Ray's object store of {most >> 20} MiB here, so that"
            " Ray will write to disk; use a cluster or fewer islands",
            file=sys.stderr,
        )
    return min(max(KEPT_ROUNDS * round_bytes, LEAST_STORE_BYTES), most)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_machine(job: Job) -> None:
    workers = sum(job.workers)
    others = job.shards + 1
    memory = _memory_bytes()
    if (workers + others) * PROCESS_BYTES > memory:
        fits = max(memory // PROCESS_BYTES - others, 0)
        raise ValueError(
            f"{_asked(job)} needs {workers + others} processes of about {PROCESS_BYTES >> 20} MiB, and this machine"
            f" has {memory >> 20} MiB of memory; use {fits} workers or fewer in all, or a cluster (RAY_ADDRESS)"
        )
    gpus = torch.cuda.device_count()
    if _gpu_places(gpus, job) < workers:
        raise ValueError(
            f"{_asked(job)} with gpus_per_worker={job.gpus_per_worker:g} need"
            f" {workers * job.gpus_per_worker:g} GPUs, and this machine has {gpus}; lower one of them"
        )
    cores, wanted = os.cpu_count() or 1, workers * job.threads_per_worker
    if wanted > cores:
        print(f"{workers} workers share {cores} cores, where {wanted} would be used", file=sys.stderr)


def room(job: Job) -> int:
    """For how many islands, in their order, the cluster has places in all."""
    fits = _worker_places(job)
    return sum(workers <= fits for workers in itertools.accumulate(job.workers))


def draining() -> set[str]:
    """The nodes that have announced that they leave, by Ray's name."""
    return set(state.get_draining_nodes())


def missing(job: Job, islands: Sequence[IslandId]) -> str:
    """What islands that have not begun wait for: a place, most likely."""
    needs = f"{job.threads_per_worker} CPU" + (f" and {job.gpus_per_worker:g} GPU" if job.gpus_per_worker else "")
    there, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    kinds = ["CPU", *(["GPU"] if job.gpus_per_worker else [])]
    have = ", ".join(f"{there.get(kind, 0.0):g} {kind} ({free.get(kind, 0.0):g} free)" for kind in kinds)
    names, nodes = listed(list(map(str, islands))), len(_alive())
    return f"no place yet for island {names}, which wants {needs} a worker: the cluster's {nodes} node(s) have {have}"


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _worker_places(job: Job) -> int:
    nodes = [node["Resources"] for node in _alive()]
    cpus = [int(node.get("CPU", 0.0) / job.threads_per_worker + ROUNDING) for node in nodes]
    gpus = [_gpu_places(node.get("GPU", 0.0), job) for node in nodes]
    return sum(min(places) for places in zip(cpus, gpus, strict=True))


def _check_cluster(job: Job) -> None:
    """Wait until there is room for the islands that there have to be. Raises ValueError where that is in vain."""
    least = replace(job, workers=job.workers[: job.min_islands or (1 if job.goes_on else job.islands)])
    begun_s = said_s = time.monotonic()
    while (lack := _lack(least)) is not None:
        now_s = time.monotonic()
        if not job.goes_on and (lack.of_places or now_s - begun_s > PLACEMENT_WAIT_S):
            raise ValueError(lack.told)
        if now_s - said_s > SAY_EVERY_S:
            said_s = now_s
            print(f"waiting since {now_s - begun_s:.0f} s: {lack.told}", file=sys.stderr, flush=True)
        time.sleep(0.5)


@dataclass(frozen=True, kw_only=True)
class _Lack:
    """Why a run does not fit."""

    of_places: bool  # else they are taken, perhaps not for long
    told: str


def _lack(job: Job) -> _Lack | None:
    """What is missing for all islands of `job`, if anything is."""
    workers, fits = sum(job.workers), _worker_places(job)
    if fits < workers:
        gpu = f" and {job.gpus_per_worker:g} GPU" if job.gpus_per_worker else ""
        told = (
            f"{_asked(job)} with {job.threads_per_worker} CPU{gpu} a worker: the {len(_alive())} node(s) of the cluster"
            f" have places for {fits}; use fewer or start more nodes"
        )
        return _Lack(of_places=True, told=told)
    wanted = {"CPU": workers * job.threads_per_worker, "GPU": workers * job.gpus_per_worker}
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    short = [name for name, amount in wanted.items() if amount > free.get(name, 0.0)]
    if not short:
        return None
    name, there = short[0], ray.cluster_resources()  # type: ignore[no-untyped-call]
    told = (
        f"{_asked(job)} needs {wanted[name]:g} {name}; the cluster has {there.get(name, 0.0):g}, of which"
        f" {free.get(name, 0.0):g} free; use fewer, start more nodes, or end what runs there"
    )
    return _Lack(of_places=False, told=told)


def _gpu_places(gpus: float, job: Job) -> int:
    """How many workers so many GPUs hold; a worker's share lies on one GPU."""
    share = job.gpus_per_worker
    if not share:
        return sum(job.workers)
    return int(gpus / share + ROUNDING) if share >= 1 else int(gpus) * int(1 / share + ROUNDING)


def _asked(job: Job) -> str:
    """What the user gave, in the words of the command line."""
    if job.min_islands:
        return f"min_islands={job.islands}"
    if set(job.workers) == {1}:
        return f"islands={job.islands}"
    given = str(job.workers[0]) if len(set(job.workers)) == 1 else str(list(job.workers)).replace(" ", "")
    return f"islands={job.islands} workers={given}"


def _modules(names: tuple[str, ...]) -> list[str]:
    """Where these lie: not the modules themselves, which Ray cannot copy inside a job of its own."""
    specs = [importlib.import_module(name).__spec__ for name in sorted({name.partition(".")[0] for name in names})]
    return [str([*(spec.submodule_search_locations or []), spec.origin][0]) for spec in specs if spec]
