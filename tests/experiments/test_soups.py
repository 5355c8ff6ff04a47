"""`diloco soup` and `diloco pairs` as a user has them: what they write, what they tell, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diloco.inner import AdamW, RateSchedule
from diloco.outer import Sgd
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.online import Online, Update
from diloco.workloads.preference import Preference
from diloco.workloads.reward_model import RewardModel
from diloco.workloads.sft import SFT
from experiments import cli
from tests.toy import launch
from tests.workloads.test_preference import some_pairs
from tests.workloads.test_sft import data, some_rows

PLAIN: dict[str, Any] = {
    "islands": 1, "inner_steps": 4, "rounds": 1, "outer": Sgd(lr=1.0),
    "inner": AdamW(lr=3e-3, rate=RateSchedule.constant),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LanguageModel.named("micro", trust_remote_code=False).build(3).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three fine-tuned ones, in other orders of the data."""
    folder = tmp_path_factory.mktemp("runs")
    given = data(folder, some_rows())
    return [
        launch(folder / f"run{seed}", workload=SFT(model=model), data=given, seed=seed, **PLAIN).directory
        for seed in range(3)
    ]


def soup(*words: object) -> int:
    return cli.main(["soup", *map(str, words)])


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "soup.json").read_text()))


def test_of_one_run_it_is_its_export(runs: list[Path], tmp_path: Path) -> None:
    assert soup(runs[0], "--to", tmp_path / "one") == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", runs[0] / "export"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], value) for name, value in theirs.items())
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert told(tmp_path / "one")["soup"]["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


def test_of_several_it_is_their_mean(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soup(*runs, "--weights", "1,1,2", "--to", tmp_path / "mean") == 0
    found = load_file(tmp_path / "mean" / "model.safetensors")
    each = [load_file(run / "export" / "model.safetensors") for run in runs]
    for name, value in found.items():
        expected = (each[0][name] + each[1][name] + 2 * each[2][name]) / 4
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert told(tmp_path / "mean")["weights"] == {"run0": 0.25, "run1": 0.25, "run2": 0.5}
    output = capsys.readouterr().out
    assert "run0" in output and "soup" in output and str(tmp_path / "mean") in output
    again = LanguageModel.named(str(tmp_path / "mean"), trust_remote_code=False).build(0)
    assert sum(p.numel() for p in again.parameters()) > 0


def test_greedy_is_no_worse_than_the_best(runs: list[Path], tmp_path: Path) -> None:
    assert soup(*runs, "--greedy", "--to", tmp_path / "greedy") == 0
    found = told(tmp_path / "greedy")
    assert found["soup"]["loss"] <= min(one["loss"] for one in found["runs"].values()) + 1e-6


def test_the_way_between_two(runs: list[Path], tmp_path: Path) -> None:
    assert soup(*runs[:2], "--points", 3, "--to", tmp_path / "way") == 0
    front, alone = told(tmp_path / "way")["front"], told(tmp_path / "way")["runs"]
    assert [point["share"] for point in front] == [0.0, 0.5, 1.0]
    assert [front[0]["loss"], front[2]["loss"]] == pytest.approx([alone["run0"]["loss"], alone["run1"]["loss"]])
    assert (tmp_path / "way" / "front.csv").read_text().startswith("share,loss")
    assert (tmp_path / "way" / "front.png").read_bytes()[1:4] == b"PNG"


def test_the_way_from_the_start_by_two_judges(model: str, tmp_path: Path) -> None:
    """Each run measures by its own judge, and both measure every point; the start is where training began."""
    folders = []
    for judge in ("sentiment", "brevity"):
        workload = Online(model=model, judge=judge, update=Update.reinforce, completion_tokens=6)
        rows = [{"prompt": f"{i} is "} for i in range(24)]
        folders.append(launch(tmp_path / judge, workload=workload, data=data(tmp_path, rows), **PLAIN).directory)
    assert soup(*folders, "--points", 2, "--to", tmp_path / "front") == 0
    first, last = told(tmp_path / "front")["front"]
    assert {"sentiment/reward", "brevity/reward", "brevity/kl"} < set(first)
    assert soup(folders[1], "--points", 2, "--start", folders[1], "--to", tmp_path / "none") == 0
    same = told(tmp_path / "none")["front"]
    assert same[0]["kl"] == pytest.approx(same[1]["kl"]) and same[0]["kl"] > 0
    assert soup(folders[1], "--points", 2, "--to", tmp_path / "own") == 0
    begun, ended = told(tmp_path / "own")["front"]
    assert begun["kl"] == 0 < ended["kl"] == pytest.approx(last["brevity/kl"])


def test_averaged_reward_models_are_measured_once_and_judge(model: str, tmp_path: Path) -> None:
    """Runs that differ in dropout measure alike."""
    folders = [
        launch(
            tmp_path / f"rm{seed}", workload=RewardModel(model=model, dropout=0.1 * seed), seed=seed,
            data=data(tmp_path, some_pairs()), **PLAIN,
        ).directory
        for seed in range(2)
    ]  # fmt: skip
    assert soup(*folders, "--to", tmp_path / "warm") == 0
    assert set(told(tmp_path / "warm")["soup"]) == {"loss", "accuracy", "margin"}
    from diloco.workloads.judges import Answer, named

    scores = named(str(tmp_path / "warm"))([Answer(prompt="3 is ", completion=text) for text in ("a number.", "no??")])
    assert scores[0] > scores[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_one_start_are_averaged_and_others_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = data(tmp_path, some_pairs())
    workload = Preference(model=model, lora=LoRA(rank=2))
    first = launch(tmp_path / "first", workload=workload, data=given, **PLAIN).directory
    other = launch(tmp_path / "other", workload=workload, data=given, seed=1, **PLAIN).directory
    assert soup(first, other, "--to", tmp_path / "no") == 2
    assert "were not trained from one start" in (error := capsys.readouterr().err) and "lora_A" in error
    assert not (tmp_path / "no").exists()
    again = {**PLAIN, "init_from": str(first)}
    pair = [
        launch(tmp_path / f"from{seed}", workload=workload, data=given, seed=seed, **again).directory
        for seed in range(2)
    ]
    assert soup(*pair, "--to", tmp_path / "yes") == 0
    assert (tmp_path / "yes" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--weights", "1,2"], "--weights has 2 numbers for 3 runs"),
        (["--weights", "1,-1,1"], "they must be 0 or positive"),
        (["--weights", "0,0,0"], "not all 0"),
        (["--greedy", "--weights", "1,1,1"], "--greedy finds the weights itself"),
        (["--points", "1"], "--points 1: a way has at least 2"),
        (["--eta", "nan"], "--eta nan: it must be a number"),
        (["--start", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert soup(*runs, *words, "--to", tmp_path / "soup") == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "soup").exists()


def test_more_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for words, problem in (
        ([runs[0], "--to", tmp_path / "full"], "is not empty: give a new folder"),
        ([runs[0], runs[0], "--to", tmp_path / "new"], "a run is named twice"),
        ([tmp_path, "--to", tmp_path / "new"], "is not the directory of a run"),
    ):
        assert soup(*words) == 2
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        soup(runs[0], "--weights", "a,b", "--to", tmp_path / "new")


def test_pairs_of_the_best_and_the_worst(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i} is "} for i in range(24)]
    workload = Online(model=model, judge="brevity", completion_tokens=8)
    run = launch(tmp_path / "run", workload=workload, data=data(tmp_path, rows), **PLAIN).directory
    to = tmp_path / "pairs.jsonl"
    words = ["pairs", str(run), "--completions", "4", "--prompts", "10", "--to"]
    assert cli.main([*words, str(to)]) == 0
    found = [json.loads(line) for line in to.read_text().splitlines()]
    assert 1 < len(found) <= 10
    assert all(len(row["chosen"]) < len(row["rejected"]) and row["prompt"].endswith(" is ") for row in found)
    differences = [len(row["rejected"]) - len(row["chosen"]) for row in found]
    assert differences == sorted(differences, reverse=True)
    assert f"{len(found)} pairs of 10 prompts" in capsys.readouterr().out
    assert cli.main([*words, str(tmp_path / "half.jsonl"), "--keep", "0.5"]) == 0
    assert (tmp_path / "half.jsonl").read_text().splitlines() == to.read_text().splitlines()[: -(-len(found) // 2)]
    (tmp_path / "more").mkdir()
    launch(tmp_path / "rm", workload=RewardModel(model=model), data=data(tmp_path / "more", found), **PLAIN)
    for more, problem in (
        ([str(to)], "give a new file that ends in .jsonl"),
        ([str(tmp_path / "x.txt")], "ends in .jsonl"),
        ([str(tmp_path / "x.jsonl"), "--keep", "0"], "--keep 0.0"),
        ([str(tmp_path / "x.jsonl"), "--completions", "1"], "at least 2 are compared"),
        ([str(tmp_path / "x.jsonl"), "--judge", "nobody"], "workload.judge=nobody is unknown"),
    ):
        assert cli.main([*words, *more]) == 2
        assert problem in capsys.readouterr().err
    assert cli.main(["pairs", str(tmp_path / "rm"), "--to", str(tmp_path / "y.jsonl")]) == 2
    assert "has no prompts to answer" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_on_other_models_are_refused(
    model: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the adapters themselves began alike."""
    given = data(tmp_path, some_rows())
    folders = [
        launch(tmp_path / name, workload=SFT(model=base, lora=LoRA(rank=2)), data=given, **PLAIN).directory
        for name, base in (("first", model), ("other", str(runs[0] / "export")))
    ]
    assert soup(*folders, "--to", tmp_path / "no") == 2
    assert "were not trained from one start" in (error := capsys.readouterr().err) and "base_layer" in error


def test_models_that_cannot_be_started_from(model: str, runs: list[Path], tmp_path: Path) -> None:
    reward = launch(tmp_path / "rm", workload=RewardModel(model=model), data=data(tmp_path, some_pairs()), **PLAIN)
    for name, problem in (
        (str(reward.directory / "export"), "is a reward model, and writes nothing"),
        (str(runs[0]), f"is a run: give {runs[0] / 'export'}"),
    ):
        with pytest.raises(ValueError, match=problem):
            LanguageModel.named(name, trust_remote_code=False).build(0)
