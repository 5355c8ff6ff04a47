"""DiPaCo's rounds: against DiLoCo where they are the same, against a history by hand, and islands that come and go."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco.checkpoint import read_source
from diloco.config import register
from diloco.inner import AdamW, Sgd
from diloco.layout import Whole
from diloco.merge import Mean, MeanBy
from diloco.messages import SourceId
from diloco.outer import Nesterov
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from diloco.starting import read_values
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from tests.toy import Line, Signalling, digests, launch, records

ROUNDS = 3
DEEP: dict[str, Any] = {"workload": Line(blocks=4), "inner": AdamW(lr=0.01), "rounds": ROUNDS, "inner_steps": 6}
GRID = Paths(levels=[2, 2])


def test_one_path_is_diloco_to_the_bit(tmp_path: Path) -> None:
    """One path, four replicas of it: four islands."""
    settings = {**DEEP, "islands": 4, "store": Store(shards=1)}
    expected = launch(tmp_path / "expected", **settings, layout=Whole(patterns=["^layers", "^(?!layers)"]))
    found = launch(tmp_path / "found", **settings, layout=Paths(levels=[1]), schedule=PathRounds())
    assert found.summary["weights_sha256"] == expected.summary["weights_sha256"]


@pytest.mark.parametrize("lag", [0, 2])
def test_levels_that_all_share_are_diloco(tmp_path: Path, lag: int) -> None:
    """Two paths through the same modules, each with its own data; with the rescale a step is sqrt(2) longer."""
    same = Paths(levels=[1, 1, 2], first_blocks=[2, 3], private=[])
    table = Paths(levels=[1, 1, 1], first_blocks=[2, 3], table=[[0, 0, 0], [0, 0, 0]])
    assert same.num_paths() == 2
    settings = {**DEEP, "islands": 2, "store": Store(shards=1)}
    expected = launch(tmp_path / "expected", **settings, schedule=Barrier(lag=lag))
    found = launch(tmp_path / "found", **settings, layout=table, schedule=PathRounds(rescale=False, lag=lag))
    assert found.summary["weights_sha256"] == expected.summary["weights_sha256"]
    longer = launch(tmp_path / "longer", **settings, layout=table, schedule=PathRounds(lag=lag))
    assert longer.summary["weights_sha256"] != expected.summary["weights_sha256"]


def values(directory: Path, rounds: int = ROUNDS) -> dict[str, torch.Tensor]:
    """The store's values at the end, by module and parameter."""
    return read_values_by_module(directory / f"checkpoints/round-{rounds:06d}")


def read_values_by_module(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = {}
    for path in sorted((folder / "modules").rglob("*.safetensors")):
        for name, value in load_file(path).items():
            if name.startswith("values/"):
                module = re.sub(r"\.part\d+", "", str(path.relative_to(folder / "modules")))  # as the shards want it
                found[f"{module}:{name.removeprefix('values/')}"] = value
    return found


@dataclass(kw_only=True)
class Alone(Line):
    """Line on the data of one shard."""

    shard: int = 0

    def batch(self, corpus: Any, shard: Any, step: int) -> Any:
        return super().batch(corpus, type(shard)(self.shard), step)


register(group="workload", name="alone", node=Alone)


def test_paths_that_share_nothing_are_runs_of_one_island(tmp_path: Path) -> None:
    settings = {**DEEP, "store": Store(shards=1)}
    flat = Paths(levels=[2], private=["."])
    together = launch(tmp_path / "both", **settings, islands=2, layout=flat, schedule=PathRounds())
    both = values(together.directory)
    for path in range(2):
        own = {**settings, "workload": Alone(blocks=4, shard=path)}
        alone = launch(tmp_path / f"{path}", **own, islands=1)
        expected = read_values(alone.summary["checkpoint"])
        found = {
            key.partition(":")[2]: value
            for key, value in both.items()
            if key.split(":")[0].endswith(f"{path}.safetensors")
        }
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@dataclass(kw_only=True)
class Pull(Line):
    """The gradient of shard i is i + 1 everywhere, whatever the weights; shard i has 10 (i + 1) examples."""

    def corpus(self, data: Any, *, seed: int, shards: int) -> Any:
        corpus = super().corpus(data, seed=seed, shards=shards)
        corpus.examples[:] = [10 * (i + 1) for i in range(shards)]
        return corpus

    def batch(self, corpus: Any, shard: Any, step: int) -> Any:
        return {"pull": torch.full((1,), float(shard + 1))}

    def tokens(self, batch: Any) -> int:
        return 1

    def loss(self, model: Any, batch: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        return sum((p * batch["pull"]).sum() for p in trained), {}


register(group="workload", name="pull", node=Pull)


def test_two_by_two_against_a_history_by_hand(tmp_path: Path) -> None:
    """Paths (0,0) (0,1) (1,0) (1,1) with gradients 1 to 4 and 10 to 40 examples; 2 steps of SGD at .1 a round.

    A path's delta is .2 times its gradient. Level 0's module 0 hears paths 0 and 1: (10*.2 + 20*.4)/30 * sqrt(2).
    Nesterov with rate .5 and momentum .5: m <- .5 m + d; step .5 (d + .5 m).
    """
    deltas = {
        "level0/0": (10 * 0.2 + 20 * 0.4) / 30 * math.sqrt(2),
        "level0/1": (30 * 0.6 + 40 * 0.8) / 70 * math.sqrt(2),
        "level1/0": (10 * 0.2 + 30 * 0.6) / 40 * math.sqrt(2),
        "level1/1": (20 * 0.4 + 40 * 0.8) / 60 * math.sqrt(2),
        "shared/0": (10 * 0.2 + 20 * 0.4 + 30 * 0.6 + 40 * 0.8) / 100 * 2,
    }
    run = launch(
        tmp_path,
        workload=Pull(blocks=4),
        inner=Sgd(lr=0.1),
        inner_steps=2,
        rounds=2,
        islands=4,
        layout=GRID,
        schedule=PathRounds(),
        merge=Mean(by=MeanBy.examples),
        outer=Nesterov(lr=0.5, momentum=0.5),
    )
    start = dict(Line(blocks=4).build_model(0).named_parameters())
    after = values(run.directory, 2)
    seen = set()
    for key, value in after.items():
        place, _, name = key.partition(":")
        module = next(m for m in deltas if m.replace("/", ".") in place.replace("/", ".").replace("-", "."))
        d = deltas[module]
        moved = 0.5 * (d + 0.5 * d) + 0.5 * (d + 0.5 * (0.5 * d + d))
        torch.testing.assert_close(value, start[name].detach() - moved, atol=1e-6, rtol=0)
        seen.add(module)
    assert seen == deltas.keys()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("islands", [1, 2, 3, 7])
def test_waves_on_fewer_islands_give_the_same_bits(tmp_path: Path, islands: int, lag: int) -> None:
    settings = {**DEEP, "layout": GRID, "workload": Line(blocks=4)}
    schedule = PathRounds(lag=lag, replicas=1)
    expected = launch(tmp_path / "expected", **settings, islands=4, schedule=schedule)
    found = launch(tmp_path / "found", **settings, islands=islands, schedule=schedule)
    assert digests(found) == digests(expected)
    assert values(found.directory).keys() == values(expected.directory).keys()
    for key, value in values(expected.directory).items():
        assert torch.equal(values(found.directory)[key], value)


@pytest.mark.parametrize(("lag", "fragments"), [(1, 1), (5, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("layout", [GRID, Paths(levels=[4], private=["."])])
@pytest.mark.parametrize("speeds", [[1.0, 1.0], [1.0, 7.0]])
def test_waves_with_two_tasks_of_a_path_that_save_it(
    tmp_path: Path, layout: Paths, lag: int, fragments: int, speeds: list[float]
) -> None:
    """Rounds are not cut: one sends, and the next ends where the path may have to wait; both are under way at once."""
    settings: dict[str, Any] = {**DEEP, "layout": replace(layout, fragments=fragments), "segment_steps": 0}
    schedule = PathRounds(lag=lag, replicas=1)
    expected = launch(tmp_path / "expected", **settings, islands=4, schedule=schedule)
    found = launch(tmp_path / "found", **settings, islands=2, schedule=schedule, runtime=Local(seconds_per_step=speeds))
    assert digests(found) == digests(expected)


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_kept_of_a_path_that_waits(tmp_path: Path, lag: int) -> None:
    """Moments alone, where it will install all weights anew; the island's present path has everything."""
    run = launch(tmp_path, **DEEP, layout=GRID, islands=1, schedule=PathRounds(lag=lag, replicas=1))
    states = [read_source(run.summary["checkpoint"], SourceId(source)) for source in range(4)]
    parts = [{name.partition("/")[0] for name in state.tensors} for state in states if state is not None]
    assert sorted(map(len, parts)) == ([1, 1, 1, 3] if lag == 0 else [3, 3, 3, 3])
    assert all(found in ({"inner"}, {"inner", "local", "anchor"}) for found in parts)


def test_a_path_goes_on_when_its_own_modules_have_stepped(tmp_path: Path) -> None:
    """Two flat paths share nothing: the fast one never waits for the slow one."""
    runtime = Local(seconds_per_step=[1.0, 10.0])
    run = launch(
        tmp_path, **DEEP, islands=2, layout=Paths(levels=[2], private=["."]), schedule=PathRounds(), runtime=runtime
    )
    ends = [(r["island"], r["clock_s"]) for r in records(run.directory, "segment")]
    assert max(at_s for island, at_s in ends if island == 0) == ROUNDS * 6
    assert max(at_s for island, at_s in ends if island == 1) == ROUNDS * 60


def test_the_first_values_are_not_sent(tmp_path: Path) -> None:
    """To islands that have just built the same model; nor do they change anything."""
    run = launch(tmp_path, **DEEP, layout=GRID, schedule=PathRounds(), islands=4)
    down = [(r["round"], r["comm/bytes_down"]) for r in records(run.directory, "segment") if r["segment"] == 0]
    assert {round_: size > 0 for round_, size in down} == {0: False, 1: True, 2: True}
    assert len(down) == 4 * ROUNDS


def test_every_path_contributes_once_a_round(tmp_path: Path) -> None:
    run = launch(tmp_path, **DEEP, layout=GRID, schedule=PathRounds(), islands=3)
    assert run.summary["contributions"]["accepted"] == 4 * ROUNDS
    trained = [(r["source"], r["round"], r["segment"]) for r in records(run.directory, "segment")]
    assert len(trained) == len(set(trained)) == 4 * ROUNDS * 3


@pytest.mark.parametrize(("islands", "lag", "at_shard", "at_step"), [(4, 0, 1, 8), (2, 0, 3, 7), (3, 2, 2, 13)])
def test_a_run_that_was_stopped_within_a_round_goes_on_to_the_bit(
    tmp_path: Path, islands: int, lag: int, at_shard: int, at_step: int
) -> None:
    """By SIGTERM, wherever the paths are; resumed on one island more."""
    settings = {**DEEP, "layout": GRID, "schedule": PathRounds(lag=lag, replicas=1), "segment_steps": 2}
    file = tmp_path / "signal"
    stopping = Signalling(blocks=4, file=str(file), at_shard=at_shard, at_step=at_step, number=15)
    expected = launch(tmp_path / "expected", **{**settings, "workload": stopping}, islands=4)
    file.write_text("")
    first = launch(tmp_path / "first", **{**settings, "workload": stopping}, islands=islands)
    assert first.summary["status"] == "interrupted"
    again = {**settings, "workload": stopping, "resume": str(first.directory), "islands": islands + 1}
    found = launch(tmp_path / "again", **again)
    assert found.summary["status"] == "finished"
    assert digests(found) == digests(expected)
    assert found.summary["contributions"]["accepted"] == 4 * ROUNDS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": Barrier(), "islands": 3}, r"islands=3 are fewer than the layout's 4 paths.*schedule=path_rounds"),
        ({"replica": "fsdp2", "islands": 4}, r"replica=fsdp2.*use ddp"),
        ({"layout": Paths(levels=[2, 2, 2, 2, 2])}, r"levels=\[2, 2, 2, 2, 2\] do not cover the model's 4 blocks"),
        ({"layout": Paths(levels=[2, 2], first_blocks=[4])}, r"first_blocks=\[4\] do not cover the model's 4 blocks"),
        ({"layout": Paths(levels=[2, 2], private=["nothing"])}, r"private: 'nothing' matches no parameter"),
        ({"layout": Paths(levels=[2, 2], fragments=5)}, r"fragments=5 are more than the model's 4 blocks"),
    ],
)
def test_runs_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(tmp_path, **{**DEEP, "layout": GRID, "schedule": PathRounds(), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": []}, r"levels=\[\]: name one or more levels"),
        ({"levels": [2, 0]}, r"levels=\[2, 0\]: name one or more levels, each with at least 1 module"),
        ({"first_blocks": [1, 2]}, "must name the first block of each level after the first: 1 for layout"),
        ({"first_blocks": [0]}, "must rise from above 0"),
        ({"fragments": 0}, "fragments=0 must be at least 1"),
        ({"private": ["("]}, "is no regular expression"),
        ({"table": [[0, 0], [1]]}, r"path 1 has 1 modules, \[1\]; layout.levels=\[2, 2\] needs 2"),
        ({"table": [[0, 0], [1, 2]]}, "path 1 names module 2 of level 1, which has 2: 0 to 1"),
        ({"table": [[0, 0], [0, 1]]}, "no path goes through module 1 of level 0"),
    ],
)
def test_layouts_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Paths(**settings)


def test_the_modules_of_a_table_with_private_parts_and_fragments() -> None:
    """Three paths, of which two share level 0; the embedding is each path's own."""
    shapes = {"embed.weight": (5, 2), **{f"layers.{i}.weight": (2, 2) for i in range(4)}, "norm.weight": (2,)}
    layout = Paths(levels=[2, 3], table=[[0, 0], [0, 1], [1, 2]], first_blocks=[1], private=["embed"], fragments=2)
    modules = layout.build(shapes, 2)
    assert {slot: names for slot, names in modules.slots.items()} == {
        "private.fragment1": ("embed.weight",),
        "level0.fragment0": ("layers.0.weight",),
        "level1.fragment1": ("layers.1.weight", "layers.3.weight"),
        "level1.fragment0": ("layers.2.weight",),
        "shared.fragment1": ("norm.weight",),
    }
    assert modules.paths[1] == {
        "private.fragment1": "private.fragment1/1",
        "level0.fragment0": "level0.fragment0/0",
        "level1.fragment1": "level1.fragment1/1",
        "level1.fragment0": "level1.fragment0/1",
        "shared.fragment1": "shared.fragment1/0",
    }
    assert modules.fragments == (
        ("level0.fragment0", "level1.fragment0"),
        ("private.fragment1", "level1.fragment1", "shared.fragment1"),
    )
    assert len(modules.shards) == 3 + 2 + 3 + 3 + 1 and set(modules.shards.values()) == {0, 1}
