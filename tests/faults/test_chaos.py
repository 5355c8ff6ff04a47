"""`diloco chaos` and what goes with it: schedules of faults, a journal to be replayed, kills at chosen moments."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diloco.codec import Int8
from diloco.merge import Mean
from diloco.messages import Commit, Contribution, IslandId, ModuleKey, Snapshot, SourceId
from diloco.outer import Nesterov
from diloco.processes import born
from diloco.store import ModuleStore
from experiments import aftermath, cli, entry, journal
from experiments.benchmarks import chaos as benchmark
from experiments.benchmarks import wan
from experiments.benchmarks.chaos_matrix import COMBINATIONS, ambushed
from experiments.cast import Cast
from experiments.chaos import Act, drawn
from tests.toy import launch, wait_for

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 110.0  # for a command to come so far, on a busy machine


# --- schedules ---


def test_the_same_seed_is_the_same_schedule() -> None:
    given: dict[str, Any] = {"minutes": 10.0, "per_hour": 126.0, "kinds": ["kill", "stall"], "lasts_s": (2.0, 15.0)}
    faults = drawn(seed=1, **given)
    assert faults == drawn(seed=1, **given) != drawn(seed=2, **given)
    assert len(faults) == 21  # 126 an hour
    assert [fault.kind for fault in faults[:4]] == ["kill", "stall"] * 2
    assert all(index * 3600 / 126 <= fault.at_s <= (index + 1) * 3600 / 126 for index, fault in enumerate(faults))
    assert all(2 <= fault.lasts_s <= 15 and 0 <= fault.victim < 1 for fault in faults)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds=kill,explode"], "--kinds explode is unknown; use some of kill, stall"),
        (["--minutes=0"], "--minutes 0 and --per-hour 125 must be positive"),
        (["--per-hour=-1"], "must be positive"),
        (["--minutes=inf"], "must be positive and finite"),
        (["--minutes=.1"], "--minutes 0.1 and --per-hour 125 are less than one fault"),
        (["--lasts=9"], "--lasts 9 is not two numbers of seconds, such as 2:15"),
        (["--lasts=9:2"], "--lasts 9:2: give two finite numbers, 0 <= first <= second"),
        (["--lasts=9:inf"], "--lasts 9:inf: give two finite numbers"),
        (["--kinds=cut"], "--kinds cut and slow need --hosts PREFIX"),
        (["--kinds=join"], "--kinds join needs --join COMMAND"),
        (["--kinds=join", "--join=no-such-program a"], "there is no program no-such-program here"),
        (["--kinds=join", "--join=ray 'start"], "is no command: No closing quotation"),
        (["--kinds=join", "--join= "], "--kinds join needs --join COMMAND"),
    ],
)
def test_what_cannot_be_is_refused(
    runs: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (runs / "run").mkdir()
    (runs / "run" / "metrics.jsonl").write_text("")
    assert cli.main(["chaos", str(runs / "run"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hosts=none"], "there are no hosts none-0, none-1 ...; ip netns list says what there is"),
        (["--hosts=wan1", "--rate=fast"], "--rate: rate 'fast' is not a number with kbit, mbit or gbit"),
        (["--hosts=wan1", "--slow-rate=1"], "--slow-rate: rate '1' is not a number with kbit, mbit or gbit"),
    ],
)
def test_hosts_and_rates_are_looked_at_before_the_first_fault(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(wan, "check", lambda *given: None)
    monkeypatch.setattr(wan, "_ip", lambda *given: "wan1-hub (id: 0)\nwan1-0 (id: 1)\nwan1-1 (id: 2)\n")
    (runs / "run").mkdir()
    (runs / "run" / "metrics.jsonl").write_text("")
    assert cli.main(["chaos", str(runs / "run"), "--kinds=cut", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds=kill,explode"], "--kinds explode is unknown"),
        (["--minutes=0"], "must be positive"),
        (["--wan=fast"], "rate 'fast' is not a number with kbit, mbit or gbit between 8kbit and 32gbit"),
        (["--wan=1gbit", "--matrix"], "--matrix has runs and kills of its own; leave --wan out"),
        (["--matrix", "--per-hour=5", "inner_steps=4"], "leave --per-hour, key=value out"),
        (["--kinds=kill,cut"], "--kinds cut needs hosts: give --wan RATE"),
        (["--kinds=node"], "--kinds node needs hosts: give --wan RATE"),
        (["--kinds=kill,driver"], "--kinds driver: the runs of this benchmark are not started again"),
        (["--to", "/proc/x"], "--to /proc/x cannot be made: No such file or directory; give another folder"),
        (["runtime=local"], "runtime=local: the runs are on Ray, whose processes are killed; leave it out"),
        (["--to", str(ROOT)], "is no empty folder; give one, or a new one"),
        (["--quick", "islands=many"], "error: islands=many: islands must be an integer"),
    ],
)
def test_mistakes_of_the_benchmark_are_told_before_it_begins(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert benchmark.main(options) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_a_run_that_is_none_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chaos", str(runs / "none")]) == 2
    assert "is no run that has begun" in capsys.readouterr().err


# --- whom it may act on ---


def test_only_processes_of_the_run_are_acted_on(tmp_path: Path) -> None:
    """A number that belongs to another process by now is not."""
    own = {"kind": "island", "island": 0, "rank": 0, "pid": os.getpid(), "raylet": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "process", **own, "born": born(os.getpid())}) + "\n")
    assert Cast(tmp_path).living("island") == []  # it does not call itself one of Ray's
    driver = {**own, "kind": "driver", "born": born(os.getpid())}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "process", **driver}) + "\n")
    assert [process.pid for process in Cast(tmp_path).living("driver")] == [os.getpid()]
    driver["born"] -= 1
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "process", **driver}) + "\n")
    assert Cast(tmp_path).living("driver") == []


# --- what is told ---


def test_how_long_a_run_took_to_go_on(tmp_path: Path) -> None:
    """By hand: a kill at 20 s, told as lost at 21, a commit of the others at 24, back at 31, counted at 37."""

    def line(time_s: float, event: str, **values: object) -> str:
        return json.dumps({"time_s": time_s, "event": event, **values}) + "\n"

    commits = [(12.0, [0, 1]), (24.0, [0]), (33.0, [0]), (37.0, [0, 1])]
    lines = [line(0.5, "start", unix_s=1000.5), line(21.0, "lost", island=1), line(31.0, "joined", island=1)]
    lines += [line(31.0, "process", kind="island", island=1, rank=0)]
    lines += [line(time_s, "commit", **{"outer/contributors": sources}) for time_s, sources in commits]
    lines.sort(key=lambda each: json.loads(each)["time_s"])
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    kill = Act(unix_s=1020.0, kind="kill", target="island 1", pid=1, island=1)
    found = aftermath.told(tmp_path, [kill], begun_s=1010.0, there=True)
    assert found["next_commit_s"] == {"median": 4.0, "most": 4.0, "seen": 1}
    assert found["contributes_again_s"] == {"median": 17.0, "most": 17.0, "seen": 1}
    assert (found["islands_lost"], found["islands_joined"], found["commits"], found["not_back"]) == (1, 1, 4, 0)
    assert aftermath.went_on(tmp_path, [kill])
    assert not aftermath.went_on(tmp_path, [kill, Act(unix_s=1038.0, kind="stall", target="island 0")])
    assert any("17.0 s in the median" in each for each in aftermath.lines({**found, "missed": 0}))
    assert (found["status"], found["no_commit_after"]) == ("goes on", 0)


def test_a_run_that_did_not_outlive_its_faults(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"time_s": 0.5, "event": "start", "unix_s": 1000.5}\n')
    kill = Act(unix_s=1020.0, kind="driver", target="driver 0", pid=1)
    found = aftermath.told(tmp_path, [kill], begun_s=1010.0, there=False)
    said = "\n".join(aftermath.lines({**found, "missed": 3}))
    assert "1 driver; 3 more found nobody" in said
    assert "until the next one       -; none after 1 of them" in said
    assert "the run                  is gone; diloco train resume=RUN goes on with it" in said


# --- the journal ---

KEY = ModuleKey("whole/0")


class Kept:
    """A store with a journal of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("fill", "push", "commit", "load_state"):  # put back at the end
            monkeypatch.setattr(ModuleStore, name, getattr(ModuleStore, name))
        folder.mkdir()
        self._file = journal.begin(folder)
        self.folder = folder
        self.codec = Int8()
        self.store = self.made()
        values = {"a": torch.arange(40.0).reshape(8, 5), "b": torch.ones(3)}
        full = self.store._full.encode(values)
        self.store.fill([Snapshot(module=KEY, version=0, base_version=None, payload=full)])
        self.version = 0

    def close(self) -> None:
        self._file.close()

    def made(self) -> ModuleStore:
        return ModuleStore(outer=Nesterov(), merge=Mean(), codec=self.codec, codec_down=self.codec)

    def round(self, seed: int) -> None:
        for source in (0, 1):
            draw = np.random.default_rng([seed, source])
            delta = {"a": torch.from_numpy(draw.normal(size=(8, 5)).astype("f4")), "b": torch.full((3,), 0.1 * seed)}
            self.store.push(
                Contribution(
                    module=KEY,
                    source=SourceId(source),
                    island=IslandId(source),
                    round=self.version,
                    base_version=self.version,
                    payload=self.codec.encode(delta),
                )
            )
        order = Commit(module=KEY, round=self.version, sources=(SourceId(0), SourceId(1)), weights=(1.0, 1.0))
        self.version = self.store.commit(order)


def test_a_journal_is_replayed_to_the_same_bits_whatever_was_lost_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Three rounds, a return to the second, and other contributions from there on."""
    kept = Kept(tmp_path / "journal", monkeypatch)
    request.addfinalizer(kept.close)
    kept.round(1)
    kept.round(2)
    saved = kept.store.state()
    kept.round(3)
    lost = kept.store.state()[KEY].tensors
    kept.store = kept.made()
    kept.store.load_state(copy.deepcopy(saved))
    kept.version = 2
    kept.round(4)
    kept.round(5)
    job = type("Job", (), {"make_store": lambda self: kept.made()})()
    replay = journal.Replay(job, {}, kept.folder)
    assert replay.versions(KEY) == 4
    states = [dict(state) for state in replay.states(KEY)]
    assert len(states) == 5
    held = kept.store.state()[KEY].tensors
    assert all(torch.equal(held[name], value) for name, value in states[4].items())
    assert all(torch.equal(saved[KEY].tensors[name], value) for name, value in states[2].items())
    assert not torch.equal(states[3]["values/a"], lost["values/a"])
    assert not torch.equal(states[3]["values/a"], states[2]["values/a"])  # it shows something


def test_a_line_of_a_journal_that_was_cut_off_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    kept = Kept(tmp_path / "journal", monkeypatch)
    request.addfinalizer(kept.close)
    kept.round(1)
    (file,) = kept.folder.iterdir()
    whole = file.read_bytes()
    kinds = [entry.header["kind"] for entry in journal.entries(kept.folder)]
    assert kinds == ["fill", "push", "push", "commit"]
    file.write_bytes(whole[:-3])
    assert [entry.header["kind"] for entry in journal.entries(kept.folder)] == kinds[:-1]


# --- with real processes ---


@pytest.mark.timeout(900)
def test_what_is_durable_stays_when_one_process_after_the_other_is_killed() -> None:
    """It finishes, no round counts twice, and no process is left. Four of 24; all of them alone: `chaos --matrix`.

    A driver is killed in tests/runtimes/test_ray.py, with the same bits after it, a node in tests/cluster/test_runs.py.
    """
    assert len(COMBINATIONS) == 24
    kills = [("rank0", "pushing"), ("shard", "committing"), ("evaluator", "training"), ("rank1", "checkpointing")]
    outcome = ambushed(*kills)
    assert outcome.problems == ()
    assert outcome.recoveries == 1  # for the shard
    assert outcome.islands_lost >= 1  # the second; the first may have been in a round that was lost


@pytest.mark.timeout(600)
def test_faults_for_a_running_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark with some seconds of them: kills and stalls, and the checkpoints equal a replay of the journal."""
    code = benchmark.main(["--quick", "--to", str(tmp_path / "kept"), "islands=2", "inner_steps=4"])
    output = capsys.readouterr().out
    assert code == 0, output
    figures = json.loads(output.splitlines()[-1])
    assert figures["digests_equal"] == 1.0
    assert figures["checkpoints"] >= 1
    assert figures["faults"].keys() <= {"kill", "stall"} and sum(figures["faults"].values()) >= 2
    assert figures["contributions"]["accepted"] > 0
    told = (tmp_path / "kept" / "faults" / "chaos.txt").read_text()
    assert re.search(r"kill +island \d", told)
    assert "until one contributes" in told


# --- started again by itself ---

QUICK = ["--import", "tests.toy", "workload=line", "workload.batch_size=4", "name=again", "runtime=local"]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "experiments.train", *QUICK, *more]


def test_a_killed_command_goes_on_with_its_run(runs: Path) -> None:
    """SIGKILL once there is a checkpoint; the parent starts it again, and the result is that of a run in one go."""
    settings = ["islands=2", "rounds=20", "inner_steps=40", "checkpoint.every=1", "eval_every=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command("--restarts", "2", *settings), env=environment, cwd=runs.parent, stderr=subprocess.PIPE, text=True
    ) as parent:
        run = runs / "latest"
        wait_for(lambda: any(run.glob("checkpoints/round-??????/manifest.json")), limit_s=LIMIT_S)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        _, said = parent.communicate(timeout=LIMIT_S)
    assert parent.returncode == 0, said
    assert "the run's process was killed (exit status -9); starting it again, 1 more time(s)" in said
    assert len([folder for folder in runs.iterdir() if not folder.is_symlink()]) == 1  # the same run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert entry.main([*QUICK, *settings, "name=alone"]) == 0
    expected = json.loads((runs / "latest" / "summary.json").read_text())
    same = ("weights_sha256", "outer_state_sha256", "tokens", "outer_steps", "contributions")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--restarts", "-1"], "--restarts -1 is negative"),
        (["--restarts", "1", "-m", "seed=1,2"], "--restarts is for one run on its own: a sweep goes on"),
        (["--restarts=x"], "invalid int value"),
        (["--restarts", "1", "islands=0"], "islands=0 is too small"),  # a mistake is no reason to try again
    ],
)
def test_restarts_that_cannot_be(
    runs: Path, given: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    try:
        status = entry.main([*QUICK, *given])
    except SystemExit as ended:  # argparse's own
        status = int(str(ended.code))
    told = capfd.readouterr().err
    assert status == 2
    assert message in told and "starting it again" not in told


def test_an_interruption_is_passed_on_and_no_reason_to_start_again(runs: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = ["islands=2", "rounds=100000", "inner_steps=20", "eval_every=0", "--restarts", "3"]
    with subprocess.Popen(
        command(*settings), env=environment, cwd=runs.parent, stderr=subprocess.PIPE, text=True
    ) as parent:
        wait_for((runs / "latest" / "metrics.jsonl").exists, limit_s=LIMIT_S)
        parent.send_signal(signal.SIGTERM)
        _, said = parent.communicate(timeout=LIMIT_S)
    assert parent.returncode == 130, said
    assert "starting it again" not in said
    assert json.loads((runs / "latest" / "summary.json").read_text())["status"] == "interrupted"


def test_a_sink_takes_over_what_records_tell(runs: Path) -> None:
    """Names of metrics of Ray, which the dashboard for Grafana uses, are those that the sink has."""
    from diloco.runtime import ray_metrics

    names = {*ray_metrics.OF_THE_RUN, *ray_metrics.OF_ISLANDS} | {f"{name}_total" for name in ray_metrics.COUNTED}
    board = json.loads((ROOT / "docker" / "grafana.json").read_text())
    used = {
        name for text in re.findall(r'"expr": "([^"]*)', json.dumps(board)) for name in re.findall(r"ray_(\w+)", text)
    }
    assert used and used <= names, used - names
    result = launch(runs / "run")
    told = {(record["event"], key) for record in aftermath.records(result.directory) for key in record}
    assert {*ray_metrics.OF_THE_RUN.values(), *ray_metrics.OF_ISLANDS.values()} <= told
