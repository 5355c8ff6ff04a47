"""Options and fixtures that several folders of tests use."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from hypothesis import settings

from diloco import Result
from diloco.inner import AdamW
from diloco.runtime.base import Backend, Job, Store
from diloco.runtime.local import Local
from diloco.runtime.ray_cluster import RayCluster
from tests import warm
from tests.toy import Line, launch

# As in every worker: fused kernels round differently on two threads, which also wait for each other on busy cores.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
# In a worker nothing of the tests is imported but what `imports` names; it travels by Ray's py_modules.
# One shard, since each is a process that takes seconds to start; more of them where a test is about the store.
BASE: dict[str, Any] = {
    "imports": ["tests.toy"],
    "inner": AdamW(lr=0.01),
    "workload": Line(dropout=0.3),
    "store": Store(shards=1),
}


os.environ.setdefault("RAY_worker_niceness", "0")  # as a run sets it: 15 starves workers beside other tests
settings.register_profile("unhurried", deadline=None)  # examples share the cores with other tests
settings.load_profile("unhurried")
gc.disable()  # until the tests are collected: a million objects that stay


def pytest_collection_finish() -> None:
    """What has been collected is not looked through for garbage again and again."""
    gc.freeze()
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden histories anew instead of comparing with them; review the difference",
    )


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written anew."""
    return bool(request.config.getoption("--regenerate-golden"))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder for the directories of runs, with the working directory above it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def forker() -> Iterator[None]:
    """Forks the workers of a Ray that is started within `warm.forked_workers`."""
    with warm.forker():
        yield


@pytest.fixture(scope="module")
def one_ray(forker: None) -> Iterator[None]:
    """One Ray for most tests of this file: a run uses that to which its process is connected, and leaves it running."""
    with warm.forked_workers():
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=200 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
    yield
    ray.shutdown()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Those that runtime local is given, as it is given them."""
    given: list[Job] = []
    before = Local.open

    def opened(self: Local, job: Job) -> Backend:
        given.append(job)
        return before(self, job)

    monkeypatch.setattr(Local, "open", opened)
    return given


Start = Callable[..., Result]


@pytest.fixture
def start(one_ray: None, runs: Path) -> Start:
    """A run on that Ray; `folder` in `runs`."""

    def run(folder: str, **settings: Any) -> Result:
        found = launch(runs / folder, **{**BASE, "runtime": RayCluster(tick_s=0.2), **settings})
        assert ray.is_initialized()
        return found

    return run
