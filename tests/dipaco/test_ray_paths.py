"""DiPaCo's rounds on Ray: the same bits as in one process, in waves, after a kill, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diloco.inner import AdamW, RateSchedule
from diloco.runtime.base import Store
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from tests.conftest import BASE, Start
from tests.toy import Line, Signalling, digests, launch, records

SETTINGS: dict[str, Any] = {
    "workload": Line(blocks=4),
    "inner": AdamW(lr=0.01, rate=RateSchedule.constant),
    "inner_steps": 6,
    "segment_steps": 3,
    "rounds": 3,
    "layout": Paths(levels=[2, 2]),
    "schedule": PathRounds(replicas=1),
    "store": Store(shards=2),
}


def test_waves_are_the_same_bits_as_in_one_process(start: Start, runs: Path) -> None:
    expected = launch(runs / "local", **{**BASE, **SETTINGS}, islands=4)
    found = start("waves", **SETTINGS, islands=2)
    assert digests(found) == digests(expected)
    assert found.summary["contributions"]["accepted"] == 4 * 3
    assert {r["island"] for r in records(found.directory, "segment")} == {0, 1}


def test_paths_that_go_between_islands_of_several_workers(start: Start, runs: Path, tmp_path: Path) -> None:
    """The joint batches of one process, to rounding; one worker is killed, and its path is taken up by all of them."""
    file = tmp_path / "signal"
    file.write_text("")
    settings = {**SETTINGS, "islands": 2}
    killed = {**settings, "workload": Signalling(blocks=4, file=str(file), at_shard=2, at_step=8, at_worker=1)}
    expected = launch(runs / "expected", **{**BASE, **settings})
    found = start("workers", **killed, workers=2)
    assert found.summary["islands_lost"] == 1 and not file.exists()
    assert found.summary["contributions"]["accepted"] == 4 * 3
    ours, theirs = (read_modules(result.directory) for result in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def read_modules(directory: Path) -> dict[str, torch.Tensor]:
    """The store's values at the end."""
    files = sorted((directory / "checkpoints/round-000003/modules").rglob("*.safetensors"))
    found = {f"{path.name}:{name}": value for path in files for name, value in load_file(path).items()}
    return {name: value for name, value in found.items() if ":values/" in name}


def test_a_path_of_a_dead_island_is_trained_again(start: Start, runs: Path, tmp_path: Path) -> None:
    """Killed in the second round, after what the path had was kept: it contributes once, and the bits are the same."""
    file = tmp_path / "signal"
    file.write_text("")
    killed = {**SETTINGS, "workload": Signalling(blocks=4, file=str(file), at_shard=2, at_step=8)}
    expected = launch(runs / "expected", **{**BASE, **SETTINGS}, islands=4)
    found = start("killed", **killed, islands=2)
    assert found.summary["islands_lost"] == 1 and not file.exists()
    assert found.summary["contributions"] == {"accepted": 12, "rejected": 0, "late": 0, "stale": 0}
    assert digests(found) == digests(expected)


def test_a_resumed_run_is_the_run_that_was_never_stopped(start: Start, runs: Path) -> None:
    """On another number of islands."""
    expected = launch(runs / "expected", **{**BASE, **SETTINGS, "rounds": 5}, islands=4)
    first = launch(runs / "first", **{**BASE, **SETTINGS}, islands=2)
    found = start("again", **{**SETTINGS, "rounds": 5}, islands=3, resume=str(first.directory))
    assert digests(found) == digests(expected)
