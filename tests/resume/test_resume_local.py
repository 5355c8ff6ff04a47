"""Stopped and resumed equals never stopped, bit for bit: runtime `local`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diloco import Result, RunConfig
from diloco.checkpoint import Checkpoint, CheckpointFolder
from diloco.codec import BFloat16, Float32
from diloco.config import load, to_yaml
from diloco.events import Event
from diloco.inner import AdamW, Muon, RateSchedule, Sgd
from diloco.layout import Fragments, Outside
from diloco.merge import Mean
from diloco.messages import Tensors
from diloco.outer import Nesterov
from diloco.resume import again, resolve
from diloco.runtime.base import Job, Store
from diloco.runtime.local import Local, LocalBackend
from diloco.schedule import Barrier
from tests.toy import Line, Remembering, Signalling, assert_same_sources, digests, launch, records, warned

ROUNDS = 4
BASE: dict[str, Any] = {
    "rounds": ROUNDS,
    "inner_steps": 6,
    "segment_steps": 2,
    "checkpoint": Checkpoint(every=1, keep=100),
    "runtime": Local(seconds_per_step=[1.0, 2.5]),  # so that one is ahead of the other
}
DEEP: dict[str, Any] = {
    "workload": Line(blocks=2),
    "inner": AdamW(lr=0.01),
    "layout": Fragments(layers_per_fragment=2, outside=Outside.balanced, count=2),
}
KINDS: dict[str, dict[str, Any]] = {
    "adamw with dropout": {"workload": Line(dropout=0.3), "inner": AdamW(lr=0.01, warmup_steps=3)},
    "muon": {"workload": Line(dropout=0.1), "inner": Muon(lr=0.01, adamw_lr=0.01)},
    "a workload with state": {"workload": Remembering(dropout=0.1), "inner": AdamW(lr=0.01)},
    "streaming": {**DEEP, "schedule": Barrier(lag=2, keep=0.5)},
    "streaming with a long lag": {**DEEP, "schedule": Barrier(lag=5), "outer": Nesterov(lr=0.5)},
    "streaming, coded": {
        **DEEP,
        "schedule": Barrier(lag=1),
        "codec": BFloat16(error_feedback=True),
        "codec_down": BFloat16(error_feedback=True),
    },
    "dropping": {"workload": Line(dropout=0.1), "inner": AdamW(lr=0.01), "schedule": Barrier(drop_probability=0.5)},
}
DEATHS = range(7, 45, 4)  # before which event the process ends; the first checkpoint is there from about the 11th on
INTERRUPTIONS = (0, 1, 2, 3, 5, 8, 13, 20, 22, 27, 31, 36)
# Some runs need no more than one kind.
ADAMW = KINDS["adamw with dropout"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """The run of a kind that was never stopped; made once."""
    found: dict[str, Result] = {}

    def make(kind: str) -> Result:
        if kind not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("whole"))
                found[kind] = launch(Path("runs", "whole").absolute(), **{**BASE, **KINDS[kind]})
        return found[kind]

    return make


class Broken(BaseException):
    """Stands for the death of the process: nothing that would be done on an error may be relied on."""


@contextmanager
def at_event(number: int, do: Callable[[LocalBackend], None]) -> Iterator[None]:
    """Does something just before the runtime tells of its `number`-th event (0 = the first)."""
    original = LocalBackend.next_event
    seen = 0

    def next_event(self: LocalBackend, wake_s: Callable[[], float | None]) -> Event:
        nonlocal seen
        seen += 1
        if seen == number + 1:
            do(self)
        return original(self, wake_s)

    LocalBackend.next_event = next_event  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalBackend.next_event = original  # type: ignore[method-assign]


def die(backend: LocalBackend) -> None:
    raise Broken


def events_of(kind: str, folder: Path) -> int:
    """How many events a whole run has."""
    count = 0

    def one_more(self: LocalBackend, wake_s: Callable[[], float | None]) -> Event:
        nonlocal count
        count += 1
        return original(self, wake_s)

    original = LocalBackend.next_event
    LocalBackend.next_event = one_more  # type: ignore[method-assign]
    try:
        launch(folder, **{**BASE, **KINDS[kind]})
    finally:
        LocalBackend.next_event = original  # type: ignore[method-assign]
    return count


Key = tuple[object, ...]
TIMED = re.compile("time_s|clock_s|seconds|_per_s")


def measured(directory: Path) -> dict[Key, Any]:
    """What a run's metrics say of its training, by (event, round, fragment, island, segment); nothing twice."""
    found: dict[Key, Any] = {}
    # With a lag, running totals hold what was done ahead, which depends on who was faster. After a resume all that is
    # installed is sent, and where a source had nothing to send it may have been there already.
    schedule = load(directory / "config.yaml").schedule
    ahead = isinstance(schedule, Barrier) and (schedule.lag > 0 or schedule.drop_probability > 0)
    passing = re.compile(f"{TIMED.pattern}|total/|comm/bytes_down") if ahead else TIMED
    for record in records(directory, "segment", "commit", "evaluation"):
        key = (record["event"], record["round"], record.get("fragment"), record.get("island"), record.get("segment"))
        assert key not in found, f"{key} is told twice"
        found[key] = {name: value for name, value in record.items() if not passing.search(name)}
    return found


def nearly(records_: dict[Key, Any]) -> dict[Key, Any]:
    """Statistics of contributions are products of matrices: their last bits depend on where these lie in memory."""
    return {
        key: {n: pytest.approx(v, rel=1e-4) if n.startswith("outer/") and v else v for n, v in record.items()}
        for key, record in records_.items()
    }


COUNTED = (
    "status", "rounds", "outer_steps", "tokens", "initial_val_loss", "val_loss", "best_val_loss", "perplexity",
    "bytes_up", "bytes_data_parallel", "contributions", "islands_lost", "islands_joined",
    "weights_sha256", "outer_state_sha256", "data_sha256", "parameters",
)  # fmt: skip


def assert_same(found: Result, expected: Result) -> None:
    """Weights, outer state, what was counted, and every line of metrics of training."""
    assert digests(found) == digests(expected)
    assert {key: found.summary[key] for key in COUNTED} == {key: expected.summary[key] for key in COUNTED}
    both = measured(found.directory), measured(expected.directory)
    assert Counter(key[0] for key in both[0]) == Counter(key[0] for key in both[1])
    assert both[0] == nearly(both[1])
    config = load(found.directory / "config.yaml")
    dropping = isinstance(config.schedule, Barrier) and config.schedule.drop_probability > 0
    if isinstance(config.codec_down, Float32) and not dropping:  # else full values once after a resume
        assert found.summary["bytes_down"] == expected.summary["bytes_down"]
    assert warned(found.directory) == warned(expected.directory)


def resumed(directory: Path, kind: str, **settings: Any) -> Result:
    return launch(directory, **{**BASE, **KINDS[kind], "resume": str(directory), **settings})


def cut_back(whole: Result, directory: Path, round_: int) -> None:
    """The run's directory as it was when the checkpoint of a round was the newest, metrics being further."""
    shutil.copytree(whole.directory, directory)
    for path in (directory / "checkpoints").iterdir():
        if path.name > f"round-{round_:06d}":
            shutil.rmtree(path)


# --- stopped between two checkpoints ---


@pytest.mark.parametrize(
    ("kind", "round_"),
    [*(("adamw with dropout", r) for r in range(1, ROUNDS + 1)), *((k, r) for k in [*KINDS][1:] for r in (1, 3))],
)
def test_stopped_at_a_round_equals_never_stopped(
    runs: Path, whole: Callable[[str], Result], kind: str, round_: int
) -> None:
    cut_back(whole(kind), runs / "run", round_)
    assert_same(resumed(runs / "run", kind), whole(kind))


@pytest.mark.parametrize(
    ("kind", "event"),
    [*(("adamw with dropout", e) for e in DEATHS), *(("streaming with a long lag", e) for e in (21, 30, 38, 47, 55))],
)
def test_died_at_any_moment_equals_never_stopped(
    runs: Path, whole: Callable[[str], Result], kind: str, event: int
) -> None:
    expected = whole(kind)
    with at_event(event, die), pytest.raises(Broken):
        launch(runs / "run", **{**BASE, **KINDS[kind]})
    assert json.loads((runs / "run" / "summary.json").read_text())["status"] == "failed"
    if not CheckpointFolder(str(runs / "run" / "checkpoints")).names():
        with pytest.raises(ValueError, match="no complete checkpoint"):
            resumed(runs / "run", kind)
        return
    assert_same(resumed(runs / "run", kind), expected)


def test_the_moments_tried_go_over_the_whole_run(runs: Path) -> None:
    events = events_of("adamw with dropout", runs / "run")
    assert 0.85 * events < max(DEATHS) < events
    assert 0.75 * events < max(INTERRUPTIONS) < events


def test_the_metrics_tell_of_every_checkpoint_once(runs: Path, whole: Callable[[str], Result]) -> None:
    """Also of that from which the run went on."""
    cut_back(whole("muon"), runs / "run", 2)
    found = records(resumed(runs / "run", "muon").directory, "checkpoint")
    told = [(record["round"], Path(record["path"]).name) for record in found]
    assert told == [(round_, f"round-{round_:06d}") for round_ in range(1, ROUNDS + 1)]


def test_more_rounds_after_the_end_equal_more_rounds_from_the_start(runs: Path) -> None:
    """A run that finished can go on; with a rate that does not depend on the number of rounds."""
    settings = {**BASE, "workload": Line(dropout=0.3), "inner": AdamW(lr=0.01, rate=RateSchedule.constant)}
    expected = launch(runs / "whole", **settings)
    launch(runs / "run", **{**settings, "rounds": 2})
    found = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert_same(found, expected)


# --- interrupted within a round ---


@pytest.mark.parametrize("event", INTERRUPTIONS)
def test_interrupted_at_any_moment_equals_never_stopped(runs: Path, whole: Callable[[str], Result], event: int) -> None:
    with at_event(event, LocalBackend.interrupt):
        first = launch(runs / "run", **{**BASE, **ADAMW})
    assert first.summary["status"] == "interrupted"
    assert first.summary["export"] is None
    assert_same(resumed(runs / "run", "adamw with dropout"), whole("adamw with dropout"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw with dropout"])
@pytest.mark.parametrize("event", [3, 18])
def test_interrupted_within_a_round_equals_never_stopped(
    runs: Path, whole: Callable[[str], Result], kind: str, event: int
) -> None:
    with at_event(event, LocalBackend.interrupt):
        first = launch(runs / "run", **{**BASE, **KINDS[kind]})
    assert first.summary["status"] == "interrupted"
    assert first.summary["rounds"] < ROUNDS
    assert_same(resumed(runs / "run", kind), whole(kind))


@pytest.mark.parametrize("event", [2, 8])
def test_interrupted_again_and_again_equals_never_stopped(
    runs: Path, whole: Callable[[str], Result], event: int
) -> None:
    with at_event(event, LocalBackend.interrupt):
        result = launch(runs / "run", **{**BASE, **ADAMW})
    times = 1
    while result.summary["status"] == "interrupted":
        with at_event(event, LocalBackend.interrupt):
            result = resumed(runs / "run", "adamw with dropout")
        times += 1
        assert times < 60, "it does not get on"
    assert times >= 3
    assert_same(result, whole("adamw with dropout"))


@pytest.mark.parametrize("event", [3, 9, 15])
def test_a_checkpoint_of_a_round_that_was_resumed_within_holds_every_source(
    runs: Path, whole: Callable[[str], Result], event: int
) -> None:
    """The faster island was through with the round before the interruption: its state is in the next checkpoint too."""
    with at_event(event, LocalBackend.interrupt):
        launch(runs / "run", **{**BASE, **ADAMW})
    name = Path(CheckpointFolder(str(runs / "run" / "checkpoints")).newest()[0]).name
    due = f"round-{int(name.split('-')[1]) + 1:06d}"
    resumed(runs / "run", "adamw with dropout")
    for path in (runs / "run" / "checkpoints").iterdir():
        if path.name > due:
            shutil.rmtree(path)
    files = json.loads((runs / "run" / "checkpoints" / due / "manifest.json").read_text())["files"]
    assert {f"sources/{source}/state.safetensors" for source in (0, 1)} <= set(files)
    assert_same(resumed(runs / "run", "adamw with dropout"), whole("adamw with dropout"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_and_the_run_goes_on_later(
    runs: Path, whole: Callable[[str], Result], number: signal.Signals
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the run did not take the signal")

    before = signal.signal(number, fail)  # if nothing handles it: not the end of the whole test session
    try:
        with at_event(12, lambda _: os.kill(os.getpid(), number)):
            first = launch(runs / "run", **{**BASE, **ADAMW})
        assert signal.getsignal(number) is fail  # given back
    finally:
        signal.signal(number, before)
    assert first.summary["status"] == "interrupted"
    assert_same(resumed(runs / "run", "adamw with dropout"), whole("adamw with dropout"))


DRIVER = """
import sys
from pathlib import Path
from diloco.config import load
from diloco import train
import tests.toy
train(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_process_equals_never_stopped(runs: Path) -> None:
    """SIGKILL in the batch of a step of round 2: what is on disk is what there is."""
    flag = runs / "kill"
    workload = Signalling(dropout=0.3, file=str(flag), at_shard=1, at_step=17, number=int(signal.SIGKILL))
    settings = {**BASE, "workload": workload, "inner": AdamW(lr=0.01)}
    expected = launch(runs / "whole", **settings)
    flag.write_text("")
    config = runs / "config.yaml"
    given = {"islands": 2, "metrics": replace(RunConfig().metrics, live=False), **settings}
    config.write_text(to_yaml(RunConfig(**given)))
    command = [sys.executable, "-c", DRIVER, str(config), str(runs / "run")]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not flag.exists()
    assert not (runs / "run" / "summary.json").exists()
    newest, _ = CheckpointFolder(str(runs / "run" / "checkpoints")).newest()
    assert Path(newest).name == "round-000002"
    found = launch(runs / "run", **settings, resume=str(runs / "run"))
    assert_same(found, expected)


# --- with other settings ---


@pytest.mark.parametrize("islands", [1, 3])
@pytest.mark.parametrize("event", [12, 100], ids=["within a round", "at the end"])
def test_another_number_of_islands_goes_on_and_says_so(runs: Path, islands: int, event: int) -> None:
    settings = {**BASE, **ADAMW, "runtime": Local()}
    with at_event(event, LocalBackend.interrupt):
        launch(runs / "run", **{**settings, "rounds": 2})
    before = records(runs / "run", "commit")
    found = launch(runs / "run", **{**settings, "islands": islands, "resume": str(runs / "run")})
    assert found.summary["status"] == "finished"
    assert (found.summary["islands"], found.summary["rounds"]) == (islands, ROUNDS)
    (note,) = found.summary["notes"]
    assert f"{islands} islands instead of 2" in note
    assert note in warned(runs / "run")
    commits = records(runs / "run", "commit")
    assert [record["round"] for record in commits] == [1, 2, 3, 4]
    done = max((record["round"] for record in before), default=0)
    for record in commits:
        expected = [0, 1] if record["round"] <= done else list(range(islands))
        assert record["outer/contributors"] == expected
    assert found.summary["contributions"]["late"] == 0
    assert found.summary["tokens"] == 8 * 6 * sum(len(record["outer/contributors"]) for record in commits)


def test_what_was_sent_before_the_islands_changed_is_not_merged(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is trained again, so what the store still holds of it must not take the place of the new."""
    settings = {**BASE, **ADAMW, "rounds": 1}
    with at_event(3, LocalBackend.interrupt):  # the first island will be heard, the second not
        first = launch(runs / "run", **settings)
    (manifest,) = (runs / "run" / "checkpoints").glob("*/manifest.json")
    modules = json.loads(manifest.read_text())["view"]["modules"]
    assert first.summary["status"] == "interrupted"
    assert all([a[1] for a in module["arrivals"]] == [0] for module in modules.values())
    norms: dict[str, list[float]] = {"sent": [], "merged": []}
    original_push, original_combine = LocalBackend._push, Mean.combine

    def combine(self: Mean, deltas: Any, weights: Any) -> Tensors:
        kept = list(deltas)
        norms["merged"] += [float(value.norm()) for delta in kept for value in delta.values()]
        return original_combine(self, kept, weights)

    def push(self: LocalBackend, task: Any) -> None:
        for contribution in self._sent[task.turn]:
            norms["sent"] += [float(v.norm()) for v in self._job.codec.decode(contribution.payload).values()]
        original_push(self, task)

    monkeypatch.setattr(Mean, "combine", combine)
    monkeypatch.setattr(LocalBackend, "_push", push)
    launch(runs / "run", **{**settings, "islands": 3, "runtime": Local(), "resume": str(runs / "run")})
    assert len(norms["sent"]) == 3 * 5
    assert sorted(norms["merged"]) == sorted(norms["sent"])


def test_settings_that_may_differ_may(runs: Path, whole: Callable[[str], Result]) -> None:
    cut_back(whole("muon"), runs / "run", 2)
    other = {"runtime": Local(), "checkpoint": Checkpoint(every=2, keep=1), "threads_per_worker": 1}
    found = resumed(runs / "run", "muon", **other)
    assert digests(found) == digests(whole("muon"))
    assert CheckpointFolder(str(runs / "run" / "checkpoints")).names() == ["round-000004"]


def test_checkpoints_may_move(runs: Path, whole: Callable[[str], Result]) -> None:
    cut_back(whole("muon"), runs / "run", 2)
    elsewhere = Checkpoint(every=1, keep=100, path=str(runs / "elsewhere"))
    with at_event(8, LocalBackend.interrupt):
        resumed(runs / "run", "muon", checkpoint=elsewhere)
    found = resumed(runs / "run", "muon", checkpoint=elsewhere)
    assert digests(found) == digests(whole("muon"))
    assert str(found.summary["checkpoint"]).startswith(str(runs / "elsewhere"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"inner_steps": 5}, "inner_steps=5 was 6"),
        ({"seed": 1}, "seed=1 was 0"),
        ({"segment_steps": 3}, "segment_steps=3 was 2"),
        ({"outer": Nesterov(lr=0.6)}, "outer.lr=0.6 was 0.7"),
        ({"inner": AdamW(lr=0.02, warmup_steps=3)}, "inner.lr=0.02 was 0.01"),
        ({"inner": Sgd()}, "choices.inner=sgd was adamw"),
        ({"workload": Line(dropout=0.2)}, "workload.dropout=0.2 was 0.3"),
        ({"store": Store(shards=3)}, "store.shards=3 was 2"),
        ({"schedule": Barrier(drop_probability=0.1)}, "schedule.drop_probability=0.1 was 0.0"),
        ({"name": "other"}, "name=other was run"),
    ],
)
def test_another_setting_is_refused_by_name(
    runs: Path, whole: Callable[[str], Result], given: dict[str, Any], named: str
) -> None:
    cut_back(whole("adamw with dropout"), runs / "run", 2)
    before = {path: path.stat().st_mtime_ns for path in (runs / "run").rglob("*")}
    with pytest.raises(ValueError, match="may differ") as caught:
        resumed(runs / "run", "adamw with dropout", **given)
    assert named in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in (runs / "run").rglob("*")} == before


def test_fewer_rounds_than_there_are_are_refused(runs: Path, whole: Callable[[str], Result]) -> None:
    cut_back(whole("muon"), runs / "run", 3)
    with pytest.raises(ValueError, match="rounds=2.*3 already"):
        resumed(runs / "run", "muon", rounds=2)


def test_the_present_number_of_rounds_finishes_at_once(runs: Path, whole: Callable[[str], Result]) -> None:
    shutil.copytree(whole("muon").directory, runs / "run")
    assert_same(resumed(runs / "run", "muon"), whole("muon"))


def test_another_model_is_refused_by_parameter(runs: Path, whole: Callable[[str], Result]) -> None:
    """The same settings, but the code of the workload has changed: the checkpoint says what it holds."""
    cut_back(whole("muon"), runs / "run", 2)
    path = runs / "run" / "checkpoints" / "round-000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    slot = next(slot for slot, names in manifest["layout"].items() if "norm.bias" in names)
    manifest["layout"][slot]["norm.bias"] = [8]
    path.write_text(json.dumps(manifest, indent=1))
    (runs / "run" / "checkpoints" / "round-000001").rename(runs / "away")
    with pytest.raises(ValueError, match=r"norm\.bias|manifest"):
        resumed(runs / "run", "muon")


# --- what cannot be resumed ---


@pytest.mark.parametrize("kind", ["no folder", "no config", "empty config", "no checkpoints", "only a part", "damaged"])
def test_an_incomplete_run_is_refused(runs: Path, whole: Callable[[str], Result], kind: str) -> None:
    cut_back(whole("muon"), runs / "run", 1)
    checkpoint = runs / "run" / "checkpoints" / "round-000001"
    match kind:
        case "no folder":
            shutil.rmtree(runs / "run")
        case "no config":
            (runs / "run" / "config.yaml").unlink()
        case "empty config":
            (runs / "run" / "config.yaml").write_text("")
        case "no checkpoints":
            shutil.rmtree(checkpoint)
        case "only a part":
            checkpoint.rename(checkpoint.with_name("round-000001.tmp"))
            (checkpoint.with_name("round-000001.tmp") / "manifest.json").unlink()
        case "damaged":
            (checkpoint / "sources" / "0" / "state.safetensors").unlink()
    with pytest.raises(ValueError, match=str(runs / "run")):
        resumed(runs / "run", "muon")


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_and_told(
    runs: Path, whole: Callable[[str], Result]
) -> None:
    cut_back(whole("muon"), runs / "run", 3)
    path = runs / "run" / "checkpoints" / "round-000003" / "modules" / "whole.0.0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = resumed(runs / "run", "muon")
    assert digests(found) == digests(whole("muon"))
    assert any("round-000003" in note for note in found.summary["notes"])


# --- auto ---


def test_auto_takes_the_newest_run_of_the_name_that_has_a_checkpoint(
    runs: Path, whole: Callable[[str], Result]
) -> None:
    cut_back(whole("muon"), runs / "2026-01-01_00-00-00_run", 3)
    cut_back(whole("muon"), runs / "2026-01-02_00-00-00_run", 2)
    cut_back(whole("muon"), runs / "2026-01-03_00-00-00_run", 0)  # without a checkpoint
    cut_back(whole("muon"), runs / "2026-01-04_00-00-00_other", 1)
    found = launch(None, **{**BASE, **KINDS["muon"], "resume": "auto"})  # type: ignore[arg-type]
    assert found.directory.name == "2026-01-02_00-00-00_run"
    assert digests(found) == digests(whole("muon"))


def test_auto_begins_anew_where_there_is_nothing(runs: Path, whole: Callable[[str], Result]) -> None:
    found = launch(runs / "fresh", **{**BASE, **KINDS["muon"], "resume": "auto"})
    assert found.directory == runs / "fresh"
    assert digests(found) == digests(whole("muon"))


def test_a_checkpoint_has_every_source_as_it_was_then(runs: Path) -> None:
    """Also where a round is one task, so that the next round's is given out before the checkpoint is written."""
    settings: dict[str, Any] = {"workload": Line(), "inner": AdamW(lr=0.01), "checkpoint": Checkpoint(every=1, keep=9)}
    expected = launch(runs / "cut", **settings, rounds=3)
    found = launch(runs / "uncut", **settings, rounds=3, segment_steps=0)
    assert digests(found) == digests(expected)
    assert_same_sources(found.directory, expected.directory, rounds=3)


def test_a_run_that_somebody_takes_up_begins_like_any_other(runs: Path, jobs: list[Job]) -> None:
    """Though it was killed with rounds that are trained again; only after a loss in the same process it makes do."""
    settings: dict[str, Any] = {**BASE, "rounds": 2, "checkpoint": Checkpoint(every=1)}
    launch(runs / "run", **settings)
    with (runs / "run" / "metrics.jsonl").open("a") as told:
        told.write('{"time_s": 9.0, "event": "commit", "round": 3, "total/rounds": 3}\n')
    jobs.clear()
    found = launch(runs / "run", **{**settings, "rounds": 3}, resume=str(runs / "run"))
    assert found.summary["recoveries"] == 1 and [job.goes_on for job in jobs] == [False]


def test_a_run_that_starts_again_by_itself_says_so_though_no_round_was_lost(runs: Path) -> None:
    launch(runs / "run", **{**BASE, "rounds": 2, "checkpoint": Checkpoint(every=1)})
    config = replace(load(runs / "run" / "config.yaml"), rounds=3, resume=str(runs / "run"))
    by_somebody, by_itself = (resolve(config, None, goes_on=goes_on) for goes_on in (False, True))
    assert (by_somebody.recoveries, by_somebody.notes) == (0, ())
    note = "the run's process was killed; the run goes on from round 2, 0 round(s) before"
    assert (by_itself.recoveries, by_itself.rounds_again, by_itself.notes) == (1, 0, (note,))


def test_a_return_that_was_itself_lost_before_a_checkpoint_counts(runs: Path) -> None:
    """The process that made it wrote when it began what no checkpoint has."""
    launch(runs / "run", **{**BASE, "rounds": 2, "checkpoint": Checkpoint(every=1)})
    with (runs / "run" / "metrics.jsonl").open("a") as told:
        told.write('{"time_s": 9.0, "event": "start", "round": 2, "recoveries": 1, "rounds_again": 1}\n')
        told.write('{"time_s": 9.5, "event": "commit", "round": 3, "total/rounds": 3}\n')
    found = launch(runs / "run", **{**BASE, "rounds": 3}, resume=str(runs / "run"))
    assert (found.summary["recoveries"], found.summary["rounds_again"]) == (2, 2)
    assert found.summary["wall_s"] > 9.5  # what was lost took its time too
    assert [(each["recoveries"], each["rounds_again"]) for each in records(runs / "run", "start")] == [(0, 0), (2, 2)]


def test_an_attempt_that_never_began_loses_nothing_more(runs: Path) -> None:
    """What the run had lost by then is still in its metrics, which the next process to begin cuts back."""
    launch(runs / "run", **{**BASE, "rounds": 2, "checkpoint": Checkpoint(every=1)})
    config = replace(load(runs / "run" / "config.yaml"), rounds=9, resume=str(runs / "run"))
    start = resolve(config, None)
    with (runs / "run" / "metrics.jsonl").open("a") as told:
        told.write('{"time_s": 9.0, "event": "commit", "round": 5, "total/rounds": 5}\n')
    once = again(start, "a shard is gone.")
    twice = again(once, "a process was lost while the run started")
    assert (once.recoveries, once.rounds_again, once.tries) == (1, 3, 1)
    assert (twice.recoveries, twice.rounds_again, twice.tries) == (1, 3, 2)
