"""Experiments with `members`: how they are composed, refused and run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from experiments.composition import Request, named, single, sweep
from experiments.entry import main
from experiments.mistakes import Mistake

TOY = ["--import", "tests.toy", "--config-dir", "conf", "runtime=local", "metrics.live=false"]
PAIR = """\
# @package _global_
# Two runs.
name: pair
inner_steps: 4
rounds: 2
members:
  plain: [outer=sgd, islands=1, inner_steps=8]
  slow start: [outer.lr=0.1]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own(PAIR)
    return tmp_path


def own(text: str) -> None:
    Path("conf/experiment").mkdir(parents=True, exist_ok=True)
    Path("conf/experiment/pair.yaml").write_text(text)


def pair(*overrides: str) -> Request:
    return Request(overrides=("+experiment=pair", *overrides), config_dir="conf")


def test_members_take_the_common_settings_then_their_own_then_the_command_lines() -> None:
    plain, slow = named(pair("rounds=3"))
    assert (plain.name, slow.name) == ("plain", "slow start")
    assert (plain.config.islands, plain.config.inner_steps, slow.config.inner_steps) == (1, 8, 4)
    assert (plain.config.outer.__class__.__name__, slow.config.outer.__class__.__name__) == ("Sgd", "Nesterov")
    assert plain.config.rounds == slow.config.rounds == 3
    assert slow.overrides == {"experiment": "pair", "outer.lr": "0.1", "rounds": "3"}
    first, second = named(pair("inner_steps=2", "outer=nesterov", "outer.lr=0.5"))
    assert first.config.inner_steps == 2 and first.config.outer == second.config.outer


def test_what_is_shown_of_a_member_has_no_members() -> None:
    assert all("members" not in member.values for member in [*named(pair()), single(pair())])


def test_an_experiment_that_is_one_run_has_none() -> None:
    assert named(Request(overrides=("+experiment=smoke",))) == []


def test_members_of_the_command_line() -> None:
    (found,) = named(Request(overrides=("+members.only=['rounds=1']", "seed=4")))
    assert (found.name, found.config.rounds, found.config.seed) == ("only", 1, 4)


def test_a_comparison_is_no_part_of_a_sweep() -> None:
    with pytest.raises(Mistake, match="without -m"):
        sweep(pair("seed=1,2"))
    with pytest.raises(Mistake, match="without -m"):
        sweep(pair())


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("inner_step=3", ["member plain", "unknown key inner_step"]),
        ("islands=0", ["member plain", "islands=0"]),
        ("islands=1,2", ["member plain", "islands=1,2"]),
        ("experiment=smoke", ["member plain", "members of its own"]),
        ("resume=runs/x", ["member plain", "go on with a run"]),
    ],
)
def test_a_mistake_in_a_member_is_found_before_anything_starts(
    member: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own(PAIR.replace("outer=sgd, islands=1", f'"{member}"'))
    assert main([*TOY, "workload=line", "+experiment=pair"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= 2 and all(word in said for word in words), said
    assert [path.name for path in here.iterdir()] == ["conf"]


@pytest.mark.parametrize("given", ["resume=runs/latest", "-m", "islands=1,2"])
def test_a_mistake_of_the_command_line(given: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "workload=line", "+experiment=pair", given]) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 2
    assert [path.name for path in here.iterdir()] == ["conf"]


def test_members_run_one_after_the_other_into_one_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "workload=line", "+experiment=pair", "seed=1"]) == 0
    directory = Path("runs/latest").resolve()
    assert directory.name.endswith("_pair")
    with (directory / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["member"] for row in rows] == ["plain", "slow start"]
    assert [row["directory"] for row in rows] == ["0_plain", "1_slow-start"]
    assert all(row["status"] == "finished" and row["seed"] == "1" for row in rows)
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert {"index.html", "comparison.png"} <= {path.name for path in (directory / "report").iterdir()}
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(directory / "report" / "index.html")
    assert "run 2 of 2: slow start" in said and "member" in said
