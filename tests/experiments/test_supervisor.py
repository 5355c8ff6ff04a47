"""`--restarts N`: a killed command is started again, is told so, and makes do with what is left of a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diloco import RunConfig
from diloco.metrics import Metrics
from diloco.runtime.base import Job
from diloco.runtime.local import Local
from experiments import entry, supervisor
from tests.toy import Line


def test_only_what_is_started_again_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = tmp_path / "python"
    command.write_text(f'#!/bin/sh\necho "${{{entry.STARTED_AGAIN}-no}}" >> {tmp_path}/told\nkill -KILL $$\n')
    command.chmod(0o755)
    monkeypatch.setattr(supervisor.sys, "executable", str(command))
    monkeypatch.delenv(entry.STARTED_AGAIN, raising=False)
    assert supervisor.watch([], 2) == 128 + 9
    assert (tmp_path / "told").read_text().split() == ["no", "1", "1"]
    first, second, last = capfd.readouterr().err.splitlines()
    killed = "warning: the run's process was killed (exit status -9); "
    assert (first, second) == tuple(f"{killed}starting it again, {left} more time(s)" for left in (1, 0))
    assert last == f"{killed}no more restarts"


def test_where_to_go_on_is_told_when_nothing_starts_it_again(runs: Path) -> None:
    config = RunConfig(workload=Line(), runtime=Local(), rounds=1, inner_steps=2, metrics=Metrics(live=False))
    entry.attempt(replace(config, islands=1), runs / "run")
    (runs / "told").write_text(str(runs / "run"))
    left = supervisor._going_on(["workload=line", "resume=auto"], runs / "told")
    assert supervisor._given_up(left) == f"no more restarts; go on with: diloco train resume={runs / 'run'}"


@pytest.mark.parametrize("again", [False, True])
def test_a_command_that_was_started_again_goes_on_with_what_is_left(
    runs: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.delenv(entry.STARTED_AGAIN, raising=False)
    if again:
        monkeypatch.setenv(entry.STARTED_AGAIN, "1")
    config = RunConfig(workload=Line(), runtime=Local(), rounds=1, inner_steps=2, metrics=Metrics(live=False))
    assert entry.attempt(replace(config, islands=1), runs / "run").summary["status"] == "finished"
    assert [job.goes_on for job in jobs] == [again]
