"""Many paths: an island, a link and a shard of the store have no more to do than with few."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from diloco import Result
from diloco.inner import AdamW
from diloco.island import Island
from diloco.runtime.base import Job, Store
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from experiments.benchmarks.alone import tensor_bytes
from tests.toy import Line, launch, records

ISLANDS, ROUNDS = 32, 2
LAYERS = {f"layers.{i}.{part}": (8, 20) for i in range(12) for part in "ab"}
SHAPES = {"embed.weight": (64, 10), **LAYERS, "norm": (10,)}
SIZE = 64 * 10 + 24 * 160 + 10


@pytest.fixture(scope="module", params=[4, 16])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Result, list[Island]]:
    """16 and 256 paths on 32 islands, and these islands as they were at the end."""
    islands: list[Island] = []
    made = Job.make_island
    patch = pytest.MonkeyPatch()
    patch.setattr(Job, "make_island", lambda self, *given: islands.append(made(self, *given)) or islands[-1])
    result = launch(
        tmp_path_factory.mktemp("run"),
        workload=Line(blocks=2),
        inner=AdamW(lr=0.01),
        rounds=ROUNDS,
        inner_steps=2,
        segment_steps=0,
        eval_every=0,
        islands=ISLANDS,
        layout=Paths(levels=[request.param, request.param]),
        schedule=PathRounds(replicas=1),
        store=Store(shards=1),
    )
    patch.undo()
    return request.param**2, result, islands


def test_each_path_contributes_once_a_round(run: tuple[int, Result, list[Island]]) -> None:
    paths, result, _ = run
    told = Counter((r["source"], r["round"]) for r in records(result.directory, "segment"))
    assert told == Counter((path, round_) for path in range(paths) for round_ in range(ROUNDS))
    assert result.summary["contributions"]["accepted"] == paths * ROUNDS
    assert len(list((result.directory / "export").glob("path*/model.pt"))) == paths


def test_an_island_has_one_path(run: tuple[int, Result, list[Island]]) -> None:
    """Parameters, anchors, and two moments: 208 numbers of 4 bytes each, and 3 that are not trained."""
    paths, result, islands = run
    parameters = result.summary["trainable_parameters"]
    assert parameters == 208 and len(islands) == 1 + ISLANDS
    found = {tensor_bytes(island) for island in islands[1:]}  # the first one is the evaluator
    steps = 4 * 13  # a counter with each tensor's moments
    assert max(found) == 4 * (4 * parameters + 3) + steps
    assert len(found) == (1 if paths > ISLANDS else 2)  # who had no path, had no moments


def test_a_task_moves_one_path(run: tuple[int, Result, list[Island]]) -> None:
    _, result, _ = run
    told = records(result.directory, "segment")
    assert {r["comm/bytes_up"] for r in told} == {max(r["comm/bytes_up"] for r in told)}
    assert max(r["comm/bytes_down"] for r in told) < 4 * 208 * 2  # with headers


# --- the store ---


def traffic(layout: Paths, shards: int) -> list[int]:
    """By shard: how many numbers it hears in a round."""
    modules = layout.build(SHAPES, shards)
    heard = [0] * shards
    for path in modules.paths:
        for slot, key in path.items():
            for name in modules.slots[slot]:
                rows, *columns = SHAPES[name]
                heard[modules.shards[key]] += rows * (columns[0] if columns else 1)
    assert sum(heard) == SIZE * len(modules.paths)
    return heard


@pytest.mark.parametrize("side", [2, 4, 8])
def test_with_embeddings_of_their_own_no_shard_hears_more_than_a_path_and_a_half(side: int) -> None:
    """As many shards as paths: their fair share is one path. What all paths share is small."""
    assert max(traffic(Paths(levels=[side, side], private=["embed"]), side**2)) < 1.5 * SIZE


def test_what_all_paths_share_is_heard_by_one_shard_alone() -> None:
    """A tensor is in one slot: the embedding's shard has nothing else to do."""
    heard = traffic(Paths(levels=[8, 8]), 64)
    assert max(heard) == 64 * (640 + 10) and sorted(heard)[-2] < 1.5 * SIZE


def test_no_shard_holds_it_all() -> None:
    modules = Paths(levels=[2, 2]).build(SHAPES, 4)
    assert Counter(modules.shards.values()).keys() == {0, 1, 2, 3}


def test_few_shards_cut_no_level() -> None:
    assert list(Paths(levels=[8, 8]).build(SHAPES, 8).slots) == ["shared", "level0", "level1"]


def test_parts_are_whole_blocks() -> None:
    """Twelve blocks in two levels; 64 shards and a level's module that eight paths go through: four shares of one."""
    slots = Paths(levels=[8, 8]).build(SHAPES, 64).slots
    assert list(slots) == ["shared", *(f"level0.part{i}" for i in range(4)), *(f"level1.part{i}" for i in range(4))]
    blocks = [{name.rpartition(".")[0] for name in names} for slot, names in slots.items() if slot != "shared"]
    assert sorted(map(len, blocks)) == [1, 1, 1, 1, 2, 2, 2, 2] and len(set.union(*blocks)) == 12
