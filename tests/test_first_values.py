"""Who built the model that the store was filled with does not download it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import tasks
from diloco.anchors import Anchors
from diloco.codec import Codec, Float32, Int4
from diloco.layout import Fragments
from diloco.messages import EVALUATOR, IslandId
from diloco.replica import Single
from diloco.schedule import Barrier
from diloco.views import RunView
from tests.toy import Deep, Line, digests, launch, make_view, records

ISLANDS = 2
SETTINGS: dict[str, Any] = {"workload": Line(blocks=2), "islands": ISLANDS, "rounds": 4, "eval_every": 1}
CODECS = {"float32": Float32(), "int4": Int4(block=8)}


def followers(codec_down: Codec) -> tuple[Anchors, Anchors, Any]:
    """What fills a store, who built the same model, and the layout."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Deep(2)
        made.append(Anchors(Single(model), codec_down))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return made[0], made[1], Fragments(layers_per_fragment=1).build(shapes, 1)


def test_the_same_values_are_adopted_and_others_are_not() -> None:
    first, second, modules = followers(Float32())
    keys = list(modules.shards)
    filled = first.initial(modules, keys, None)
    changed = filled[-1].payload.body.copy()
    changed[0] ^= 1
    digests = {snapshot.module: snapshot.payload.sha256() for snapshot in filled}
    other = Float32().encode({"x": torch.from_numpy(changed.view("float32"))}).sha256()
    digests[keys[-1]] = other
    assert second.adopt(modules, digests) == keys[:-1]
    assert set(second.versions) == {modules.slot_of(key) for key in keys[:-1]}
    second.install(modules, [], dict(second.versions), 0.0)
    with pytest.raises((AssertionError, KeyError)):  # what it does not have must be sent
        second.install(modules, [], {modules.slot_of(keys[-1]): 0}, 0.0)


def test_what_is_adopted_is_a_copy() -> None:
    first, second, modules = followers(Float32())
    filled = first.initial(modules, list(modules.shards), None)
    second.adopt(modules, {snapshot.module: snapshot.payload.sha256() for snapshot in filled})
    before = {name: value.clone() for name, value in second.values.items()}
    with torch.no_grad():
        for parameter in second._replica.parameters().values():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in second.values.items())
    second.install(modules, [], dict(second.versions), 0.5)
    for name, parameter in second._replica.parameters().items():
        torch.testing.assert_close(parameter.detach(), before[name] + 0.5)


@pytest.mark.parametrize("name", CODECS)
def test_a_run_of_its_own_model_downloads_one_version_less(tmp_path: Path, name: str) -> None:
    settings = {**SETTINGS, "codec_down": CODECS[name]}
    own = launch(tmp_path / "own", **settings)
    again = launch(tmp_path / "again", **settings, init_from=str(tmp_path / "own"))
    assert own.summary["bytes_down"] % (3 * ISLANDS) == 0
    version = own.summary["bytes_down"] // (3 * ISLANDS)
    first = again.summary["bytes_down"] - 3 * ISLANDS * version
    assert first % ISLANDS == 0
    full = first // ISLANDS  # of each, where the values come from elsewhere
    assert full == version if name == "float32" else full > 2 * version


def test_the_evaluator_follows_updates_and_measures_the_stores_values(tmp_path: Path) -> None:
    settings = {**SETTINGS, "codec_down": CODECS["int4"]}
    found = launch(tmp_path / "often", **settings)
    seldom = launch(tmp_path / "seldom", **{**settings, "eval_every": 0})
    assert digests(found) == digests(seldom)
    assert [r["round"] for r in records(found.directory, "evaluation")] == [0, 1, 2, 3, 4]
    assert found.summary["val_loss"] == seldom.summary["val_loss"]


def held(view: RunView) -> list[dict[Any, int]]:
    return [dict(view.evaluator.holds), *[dict(island.holds) for island in view.islands.values()]]


def test_what_is_held_is_not_asked_for_and_what_is_older_is_updated() -> None:
    view = make_view()
    task = tasks.evaluation(view)
    keys = list(task.modules.values())
    assert view.evaluator.give(task) == dict.fromkeys(keys)
    view = make_view()
    view.hold({EVALUATOR: keys, IslandId(0): keys[:1], IslandId(1): []})
    assert held(view) == [dict.fromkeys(keys, 0), {keys[0]: 0}, {}]
    assert view.evaluator.give(tasks.evaluation(view)) == {}
    view.modules[keys[0]].version = 1
    assert view.evaluator.give(tasks.evaluation(view)) == {keys[0]: 0}
    assert view.evaluator.holds == {keys[0]: 1, keys[1]: 0}


def test_with_delayed_installs_too(tmp_path: Path) -> None:
    settings = {**SETTINGS, "schedule": Barrier(lag=1), "codec_down": CODECS["int4"]}
    own = launch(tmp_path / "own", **settings)
    assert own.summary["status"] == "finished"
