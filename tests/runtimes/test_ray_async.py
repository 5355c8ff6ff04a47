"""Asynchronous schedules on Ray: what waits is exact, what does not is accounted for and can be replayed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from diloco import Result, RunConfig
from diloco.async_.outer import DelayedNesterov
from diloco.async_.quorum import Quorum
from diloco.async_.schedule import FirstCome
from diloco.inner import AdamW
from diloco.jobs import make_job
from diloco.layout import Fragments, Outside
from diloco.messages import Commit, IslandId, ShardId, Snapshot, SourceId, Task
from diloco.runtime.ray_cluster import RayCluster
from diloco.workers import World
from tests.conftest import BASE, Start
from tests.toy import Line, records

SETTINGS: dict[str, Any] = {
    "workload": Line(blocks=1),
    "inner": AdamW(lr=0.01),
    "islands": 2,
    "inner_steps": 6,
    "segment_steps": 4,
    "rounds": 4,
}
SLOW = RayCluster(tick_s=0.2, slowdown=[0.0, 0.03])


def test_what_was_logged_can_be_replayed(start: Start) -> None:
    settings = {**SETTINGS, "outer": DelayedNesterov(delay=2)}
    found = start("found", **settings, schedule=FirstCome(draw=False, damping=0.5, grace_s=0.05), runtime=SLOW)
    commits = records(found.directory, "commit")
    assert len(commits) == 8 and found.summary["contributions"]["accepted"] == 8
    assert len({r["outer/contributors"][0] for r in commits}) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as islands have: sums have another order otherwise
    try:
        assert replayed(found, {**BASE, **settings}) == found.summary["weights_sha256"]
    finally:
        torch.set_num_threads(threads)


def replayed(run: Result, settings: dict[str, Any]) -> str:
    """The digest after the same outer steps, each with a contribution made from the version that the log says."""
    config = RunConfig(**{**settings, "rounds": 4})
    job = make_job(config)
    corpus = job.corpus()
    islands = [job.make_island(corpus, World()) for _ in range(3)]
    modules = config.layout.build(islands[0].shapes(), 1)
    for island in islands:
        island.setup(modules)
    store = job.make_store()
    keys = list(modules.shards)
    store.fill(islands[0].initial(keys))
    versions: list[list[Snapshot]] = [store.pull(dict.fromkeys(keys))]
    done: Counter[int] = Counter()
    for r in records(run.directory, "commit"):
        (source,), (round_,), (staleness,) = r["outer/contributors"], r["outer/rounds"], r["outer/stalenesses"]
        base = len(versions) - 1 - staleness
        steps = [s["step"] for s in records(run.directory, "segment") if (s["source"], s["round"]) == (source, round_)]
        task = Task(
            source=SourceId(source),
            island=IslandId(source),
            round=round_,
            segment=0,
            modules=modules.paths[0],
            install={slot: base for slot in modules.slots},
            keep=0.0,
            shard=ShardId(source),
            first_step=done[source],
            steps=max(steps) - done[source],
            send=tuple(modules.slots),
            last=True,
        )
        done[source] = max(steps)
        for contribution in islands[source].run(task, versions[base])[1]:
            store.push(contribution)
        for key in keys:
            commit = Commit(module=key, round=0, sources=(SourceId(source),), weights=(1.0,), rounds=(round_,))
            store.commit(replace(commit, scale=r["outer/scale"]))
        versions.append(store.pull(dict.fromkeys(keys)))
    islands[2].install(versions[-1])
    return islands[2].weights_sha256()


def test_islands_that_never_wait(start: Start) -> None:
    layout = Fragments(layers_per_fragment=1, outside=Outside.balanced)
    settings = {**SETTINGS, "workload": Line(blocks=2), "layout": layout, "schedule": Quorum(), "runtime": SLOW}
    found = start("found", **settings)
    assert found.summary["status"] == "finished"
    told = found.summary["contributions"]
    counted = sum(len(r["outer/contributors"]) for r in records(found.directory, "commit"))
    assert counted == told["accepted"] > 0 and told["rejected"] == 0
    steps = Counter[int]()
    for r in records(found.directory, "segment"):
        steps[r["source"]] = max(steps[r["source"]], r["step"])
    assert sum(steps.values()) == 4 * 6 * 2  # every step of the data is trained on once
