"""Streaming with compression on Ray: the same bits as `local`, also where it goes on in the middle of the stream."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from diloco.checkpoint import Checkpoint
from diloco.codec import BFloat16, Float32, Int4
from diloco.layout import Fragments, Outside
from diloco.runtime.base import Store
from diloco.runtime.ray_cluster import RayCluster
from diloco.schedule import Barrier
from tests.conftest import BASE, Start
from tests.toy import Line, Signalling, assert_same_sources, digests, launch, records, warned

STREAM: dict[str, Any] = {
    "workload": Line(blocks=2),
    "layout": Fragments(layers_per_fragment=1, outside=Outside.balanced),
    "store": Store(shards=2),
    "rounds": 4,
    "checkpoint": Checkpoint(every=1, keep=9),
}
KINDS: dict[str, dict[str, Any]] = {
    "a long lag": {"schedule": Barrier(lag=5, keep=0.5), "codec": BFloat16()},
    "four bits both ways": {
        "schedule": Barrier(lag=1),
        "codec": Int4(block=8, error_feedback=True),
        "codec_down": Int4(block=8, error_feedback=True),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_in_one_process(start: Start, runs: Path, kind: str) -> None:
    settings = {**STREAM, **KINDS[kind]}
    expected = launch(runs / "local", **{**BASE, **settings})
    found = start("ray", **settings)
    assert digests(found) == digests(expected)
    same = ("status", "tokens", "bytes_up", "bytes_down", "val_loss", "contributions", "outer_steps")
    assert {key: found.summary[key] for key in same} == {key: expected.summary[key] for key in same}
    assert warned(found.directory) == []
    assert_same_sources(found.directory, expected.directory, rounds=4)


def test_it_goes_on_from_a_checkpoint_of_another_runtime(start: Start, runs: Path) -> None:
    settings = {**STREAM, **KINDS["four bits both ways"]}
    expected = launch(runs / "run", **{**BASE, **settings})
    for name in ("round-000003", "round-000004"):
        shutil.rmtree(runs / "run" / "checkpoints" / name)
    found = start("run", **settings, resume=str(runs / "run"), runtime=RayCluster(tick_s=0.2))
    assert digests(found) == digests(expected)
    assert found.summary["tokens"] == expected.summary["tokens"]


def test_an_update_is_smaller_than_full_values(runs: Path) -> None:
    """By the bytes of runtime local, which are those of Ray."""
    full = launch(runs / "full", **{**BASE, **STREAM, "schedule": Barrier(lag=1), "codec_down": Float32()})
    coded = launch(runs / "coded", **{**BASE, **STREAM, **KINDS["four bits both ways"]})
    assert coded.summary["bytes_down"] < full.summary["bytes_down"]


def test_a_new_evaluator_begins_with_full_values(start: Start, runs: Path) -> None:
    settings = {**STREAM, **KINDS["four bits both ways"], "eval_every": 1}
    expected = launch(runs / "local", **{**BASE, **settings})
    file = runs / "kill"
    file.touch()
    found = start("ray", **{**settings, "workload": Signalling(blocks=2, file=str(file), at_evaluation=3)})
    assert not file.exists()
    assert digests(found) == digests(expected)
    losses = [[r["eval/loss"] for r in records(run.directory, "evaluation")] for run in (found, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
