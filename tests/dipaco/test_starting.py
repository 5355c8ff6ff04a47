"""init_from: every module starts from its own values of a run with several paths, or all from one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diloco import Result
from diloco.inner import AdamW
from diloco.layout import Layout, Whole
from diloco.outer import Sgd
from diloco.runtime.base import Runtime, Store
from diloco.runtime.local import Local
from diloco.runtime.ray_cluster import RayCluster
from diloco.runtime.spmd import Spmd
from diloco.schedule import Barrier, Schedule
from diloco.starting import read_values
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from tests.conftest import BASE, Start
from tests.toy import Line, launch

SETTINGS: dict[str, Any] = {
    "workload": Line(blocks=4),
    "islands": 4,
    "inner": AdamW(lr=0.01),
    "inner_steps": 2,
    "rounds": 2,
    "layout": Paths(levels=[2, 2]),
    "schedule": Barrier(),
    "store": Store(shards=2),
}
STILL = {"outer": Sgd(lr=1e-60), "rounds": 1}  # a step too short for float32: a run ends with what it began with


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return launch(tmp_path_factory.mktemp("before") / "run", **{**BASE, **SETTINGS})


def modules_of(run: Result) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> parameter -> value, read without our code."""
    folder = Path(run.summary["checkpoint"]) / "modules"
    found = {path.stem: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    return {
        key: {name: value for name, value in tensors.items() if name.startswith("values/")}
        for key, tensors in found.items()
    }


def assert_equal(found: Result, expected: Result) -> None:
    ours, theirs = modules_of(found), modules_of(expected)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for key, values in ours.items():
        assert values.keys() == theirs[key].keys()
        assert all(torch.equal(value, theirs[key][name]) for name, value in values.items()), key
    assert not all(torch.equal(theirs["level0.0"][name], value) for name, value in theirs["level0.1"].items())


@pytest.mark.parametrize(("runtime", "shards"), [(Local(), 1), (Local(), 3), (Spmd(), 4)])
def test_every_module_starts_from_its_own_values(before: Result, runs: Path, runtime: Runtime, shards: int) -> None:
    more = {"runtime": runtime, "store": Store(shards=shards), "init_from": str(before.directory)}
    found = launch(runs / "after", **{**BASE, **SETTINGS, **STILL, **more})
    assert_equal(found, before)


def test_on_ray(before: Result, start: Start) -> None:
    more: dict[str, Any] = {"runtime": RayCluster(tick_s=0.2), "init_from": str(before.directory), "islands": 2}
    assert_equal(start("after", **{**SETTINGS, **STILL, **more, "schedule": PathRounds(replicas=1)}), before)


def test_its_evaluation_goes_on(before: Result, runs: Path) -> None:
    found = launch(runs / "after", **{**BASE, **SETTINGS, **STILL}, init_from=str(before.directory))
    assert found.summary["initial_val_loss"] == before.summary["val_loss"] == found.summary["val_loss"]


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Whole(), Barrier()),
        (Paths(levels=[2, 1]), Barrier()),
        (Paths(levels=[2, 2], first_blocks=[1]), Barrier()),
        (Paths(levels=[2, 2], fragments=2), Barrier()),
        (Paths(levels=[4]), Barrier()),
    ],
)
def test_other_modules_are_refused(before: Result, runs: Path, layout: Layout, schedule: Schedule) -> None:
    settings = {**BASE, **SETTINGS, "layout": layout, "schedule": schedule, "inner_steps": 4}
    with pytest.raises(ValueError, match=r"has several modules of a slot, and not those of this layout: .*path0"):
        launch(runs / "after", **settings, init_from=str(before.directory))
    assert not (runs / "after").exists()


def test_one_set_of_weights_is_every_modules(before: Result, runs: Path) -> None:
    """From a run of one path, and from safetensors."""
    one = launch(runs / "one", **{**BASE, **SETTINGS, "layout": Whole()})
    expected = read_values(one.summary["checkpoint"])
    (runs / "folder").mkdir()
    save_file(expected, runs / "folder" / "model.safetensors")
    for number, given in enumerate((one.directory, runs / "folder")):
        found = launch(runs / f"{number}", **{**BASE, **SETTINGS, **STILL}, init_from=str(given))
        for values in modules_of(found).values():
            assert values
            assert all(torch.equal(value, expected[name.removeprefix("values/")]) for name, value in values.items())


def test_what_has_no_single_model_says_so(before: Result, runs: Path) -> None:
    with pytest.raises(ValueError, match=r"is of a run with several paths, and no single model"):
        read_values(before.summary["checkpoint"])
    settings = {**BASE, **SETTINGS}
    with pytest.raises(ValueError, match=r"holds several paths: give the run itself"):
        launch(runs / "after", **settings, init_from=str(before.directory / "export"))
    with pytest.raises(ValueError, match=r"holds no run and no \*\.safetensors"):
        launch(runs / "after", **settings, init_from=str(runs))
