"""From a configuration to what every process of the run gets."""

from __future__ import annotations

from diloco.config import RunConfig
from diloco.runtime.base import Job


def make_job(config: RunConfig) -> Job:
    """What every process of the run gets."""
    return Job(
        workload=config.workload,
        data=config.data,
        inner=config.inner,
        merge=config.merge,
        outer=config.outer,
        codec=config.codec,
        codec_down=config.codec_down,
        seed=config.seed,
        workers=config.workers_by_island(),
        replica=config.replica,
        shards=config.store.shards,
        total_steps=config.rounds * config.inner_steps,
        threads_per_worker=config.threads_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        imports=tuple(config.imports),
        schedule=config.schedule,
        min_islands=config.min_islands,
        patience=config.patience,
        sources=config.num_sources(),
        moving=config.schedule.moving,
    )
