"""The asynchronous parts as configuration: by name, in a run's config.yaml, and resolved once, at a run's start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diloco import RunConfig
from diloco.async_.outer import DelayedNesterov, HeLoCo
from diloco.async_.schedule import FirstCome
from diloco.checkpoint import Checkpoint
from diloco.config import load, to_yaml
from diloco.merge import RDA
from diloco.outer import OuterOptimizer
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from experiments import entry
from experiments.composition import Request, single
from experiments.mistakes import Mistake
from tests.toy import Line, digests, launch

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "workload": Line(),
    "rounds": 2,
    "inner_steps": 2,
    "runtime": Local(),
    "checkpoint": Checkpoint(every=1),
    "schedule": FirstCome(),
}


def composed(*overrides: str) -> RunConfig:
    return single(Request(overrides=overrides)).config


def test_the_command_line_knows_them() -> None:
    assert composed("outer=delayed_nesterov", "outer.delay=8").outer == DelayedNesterov(delay=8)
    assert composed("outer=heloco", "outer.damping=0.5").outer == HeLoCo(damping=0.5)
    assert composed("merge=rda").merge == RDA()
    assert composed("merge=rda", "merge.mean_for='embed|head'").merge == RDA(mean_for="embed|head")


def test_a_mistake_is_told_by_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Mistake, match=r"outer\.activation=0\.9"):
        composed("outer=delayed_nesterov", "outer.delay=2", "outer.activation=0.9")
    with pytest.raises(Mistake, match=r"merge\.mean_for"):
        composed("merge=rda", "merge.mean_for='('")
    assert entry.main(["outer=delayed_nesterov", "outer.delay=-2", "--cfg", "job"]) == 2
    assert "outer.delay=-2" in capsys.readouterr().err


@pytest.mark.parametrize("outer", [DelayedNesterov(delay=3, activation=0.1), HeLoCo(aligned=0.5)], ids=["dn", "heloco"])
def test_config_yaml_comes_back(outer: OuterOptimizer, tmp_path: Path) -> None:
    config = RunConfig(outer=outer, merge=RDA(mean_for="x"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_importing_the_package_is_enough() -> None:
    source = (
        "import diloco.async_\nfrom diloco.config import choices\n"
        "assert {'delayed_nesterov', 'heloco'} <= set(choices('outer'))"
    )
    subprocess.run([sys.executable, "-c", source], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_delay_is_resolved_at_the_start_and_kept_with_more_islands(runs: Path) -> None:
    directory = runs / "run"
    launch(directory, **RUN, islands=2, outer=DelayedNesterov())
    assert load(directory / "config.yaml").outer == DelayedNesterov(delay=2)
    more = {**RUN, "resume": str(directory)}
    for islands, rounds in ((3, 3), (4, 4)):
        launch(directory, **{**more, "rounds": rounds}, islands=islands, outer=DelayedNesterov())
        assert load(directory / "config.yaml").outer == DelayedNesterov(delay=2)
    with pytest.raises(ValueError, match=r"outer\.delay=4 was 2"):
        launch(directory, **more, islands=4, outer=DelayedNesterov(delay=4))
    with pytest.raises(ValueError, match=r"outer\.lr=0\.5 was 0\.7"):
        launch(directory, **more, islands=4, outer=DelayedNesterov(lr=0.5))


def test_a_barrier_makes_one_outer_step_of_all_contributions(runs: Path) -> None:
    launch(runs / "run", **{**RUN, "schedule": Barrier()}, islands=2, outer=DelayedNesterov())
    assert load(runs / "run" / "config.yaml").outer == DelayedNesterov(delay=1)
    launch(runs / "batch", **{**RUN, "schedule": FirstCome(batch=2)}, islands=4, outer=DelayedNesterov())
    assert load(runs / "batch" / "config.yaml").outer == DelayedNesterov(delay=2)


def test_an_activation_that_fits_the_islands_of_the_start_goes_on_with_more(runs: Path) -> None:
    launch(runs / "run", **RUN, islands=2, outer=DelayedNesterov(activation=0.5))
    more = {**RUN, "rounds": 3, "resume": str(runs / "run")}
    found = launch(runs / "run", **more, islands=3, outer=DelayedNesterov(activation=0.5))
    assert found.summary["status"] == "finished"


def test_an_activation_that_does_not_fit_the_islands_is_refused_before_anything_is_written(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"outer\.activation=0\.5"):
        launch(runs / "run", **RUN, islands=3, outer=DelayedNesterov(activation=0.5))
    assert not (runs / "run").exists()


def test_the_digest_of_the_outer_state_is_the_same_over_any_number_of_shards(runs: Path) -> None:
    found = [
        digests(launch(runs / f"{n}", **RUN, outer=DelayedNesterov(), store=Store(shards=n), merge=RDA()))
        for n in (1, 2)
    ]
    assert found[0] == found[1]
