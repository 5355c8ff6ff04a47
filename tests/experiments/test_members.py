"""Experiments with `members`: how they are composed, refused and run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from diloco.config import load
from experiments.composition import Request, named, single, sweep
from experiments.entry import main
from experiments.mistakes import Mistake
from experiments.planning import main as plan

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


# members that build on members

CHAIN = """\
# @package _global_
name: chain
inner_steps: 4
rounds: 2
members:
  first: [seed=3]
  alone: [outer=sgd]
  second: [init_from=@first]
  third: ["init_from=@second/checkpoints/round-000002", "data.files=[a.txt, '@first/log.txt', @alone]"]
"""


def chain(*overrides: str) -> Request:
    own(CHAIN)
    return pair(*overrides)


def test_what_a_member_builds_on_is_known_when_it_runs(here: Path) -> None:
    first, alone, second, third = named(chain())
    assert [member.builds_on for member in (first, alone, second)] == [(), (), ("first",)]
    assert third.builds_on == ("second", "first", "alone")
    assert second.values.init_from == "@first" and second.overrides["init_from"] == "@first"  # as it is shown
    folders = {"first": here / "a b/0_first", "second": here / "='2", "alone": here / "1"}
    assert first.placed({}) is first.config
    assert second.placed(folders).init_from == str(here / "a b/0_first")
    config = third.placed(folders)
    assert config.init_from == f"{here}/='2/checkpoints/round-000002"
    assert config.data.files == [str(here / "a.txt"), f"{here}/a b/0_first/log.txt", str(here / "1")]
    assert config.rounds == 2 and config.outer == first.config.outer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("init_from=@frist", ["member second", "init_from=@frist", "no member frist before it, only first, alone"]),
        ("init_from=@third/export", ["member second", "no member third before it"]),
        ("init_from=@second", ["member second", "no member second before it"]),
    ],
)
def test_members_that_are_not_there_or_later(
    given: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own(CHAIN.replace("[init_from=@first]", f"['{given}']"))
    assert main([*TOY, "workload=line", "+experiment=pair"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= 2 and all(word in said for word in words), said
    assert [path.name for path in here.iterdir()] == ["conf"]


def test_the_first_builds_on_none_also_where_the_command_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    own(CHAIN)
    assert main([*TOY, "workload=line", "+experiment=pair", "init_from=@first"]) == 2
    assert "init_from=@first: there is no member first before it, it is the first" in capsys.readouterr().err


def test_a_chain_is_shown_and_planned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own(CHAIN)
    assert main([*TOY, "workload=line", "+experiment=pair", "--cfg", "job"]) == 0
    assert capsys.readouterr().out.count("init_from: '@first'") == 1
    assert plan([*TOY, "workload=line", "+experiment=pair", "rounds=5"]) == 0
    said = capsys.readouterr().out
    assert "pair second" in said and said.count("4 steps") >= 4
    assert [path.name for path in here.iterdir()] == ["conf"]


def test_a_chain_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Each goes on where the one before ended, and single values hold for all."""
    own(CHAIN.replace(", \"data.files=[a.txt, '@first/log.txt', @alone]\"", ""))
    assert main([*TOY, "workload=line", "+experiment=pair", "inner_steps=2"]) == 0
    rows = {row["member"]: row for row in csv_rows()}
    assert all(row["status"] == "finished" and row["inner_steps"] == "2" for row in rows.values())
    assert rows["second"]["initial_val_loss"] == rows["first"]["val_loss"]
    assert rows["third"]["initial_val_loss"] == rows["second"]["val_loss"] != rows["first"]["val_loss"]
    assert rows["second"]["init_from"] == "@first"
    saved = load(Path("runs/latest/2_second/config.yaml"))
    assert saved.init_from == str(Path("runs/latest").resolve() / "0_first")


def test_who_builds_on_what_did_not_finish_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    broken = CHAIN.replace("seed=3", "init_from=nowhere")
    own(broken.replace(", \"data.files=[a.txt, '@first/log.txt', @alone]\"", ""))
    assert main([*TOY, "workload=line", "+experiment=pair"]) == 1
    rows = csv_rows()
    assert [row["status"] for row in rows] == ["failed", "finished", "not run", "not run"]
    assert rows[2]["reason"] == "builds on member first, which did not finish"
    assert rows[3]["reason"] == "builds on member second, which did not finish"
    assert not Path("runs/latest/2_second").exists()
    said = capsys.readouterr()
    assert "not run: it builds on first, which did not finish" in said.err and "index.html" in said.out


def csv_rows() -> list[dict[str, str]]:
    with Path("runs/latest/sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_members_that_all_fail_leave_a_table_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["+experiment=compare", "runtime=local", "data.files=nowhere.txt"]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert (tmp_path / "runs" / "latest" / "sweep.csv").is_file()
