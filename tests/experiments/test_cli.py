"""The other commands of `diloco`: report, export, sample and doctor."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from experiments import doctor
from experiments.cli import main
from experiments.doctor import MISSING, OK, WARNING, Findings

LINE = ["--import", "tests.toy", "runtime=local", "workload=line", "metrics.live=false", "inner_steps=2", "rounds=1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["sample", "--help"],
        ["export", "-h"],
        ["report", "-h"],
        ["route", "-h"],
        ["doctor", "-h"],
    ],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: diloco")


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["fly"], ["export", "runs/x"], ["report"], ["sample", "x", "--prompt", "", "--tokens", "0"]),
        *(["route"], ["route", "x", "--every", "9,x"], ["route", "x", "--steps", "few"]),
    ],
)
def test_what_argparse_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_train_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "islands=none", "-m"]) == 2
    assert "islands=none" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: diloco train ")


def test_export_is_the_same_from_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *LINE]) == 0
    assert main(["export", "runs/latest", "--to", "copied"]) == 0
    shutil.rmtree(Path("runs/latest/export").resolve())
    Path("made").mkdir()  # an empty folder will do
    assert main(["export", "runs/latest", "--to", "made"]) == 0
    copied, made = (torch.load(Path(name, "model.pt")) for name in ("copied", "made"))
    assert copied.keys() == made.keys() and all(torch.equal(copied[name], made[name]) for name in copied)
    capsys.readouterr()
    for arguments, words in (
        (["export", "runs/latest", "--to", "made"], "not empty"),
        (["export", "runs", "--to", "new"], "not the directory of a run"),
        (["sample", "runs/latest", "--prompt", "x"], "writes no text"),
        (["sample", "nowhere", "--prompt", "x"], "not the directory of a run"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1
    shutil.rmtree(Path("runs/latest/checkpoints").resolve())
    assert main(["export", "runs/latest", "--to", "new"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err and not Path("new").exists()


def test_report_of_a_run_a_sweep_and_both(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *LINE, "name=alone"]) == 0
    assert main(["train", "-m", "outer.lr=0.1,0.7", "name=swept", *LINE]) == 0
    (alone,) = Path("runs").glob("*_alone")
    for arguments, words in (
        (["report", str(alone)], ("validation: from ", "Settings that differ from the defaults")),
        (["report", "runs/latest"], ("(best)", "outer.lr=0.7")),
        (["report", "runs/latest", str(alone), "--to", "both"], ("(best)", "3 runs")),
        (["report", "runs/latest", str(alone)], ("(best)", "3 runs")),
    ):
        capsys.readouterr()
        assert main(arguments) == 0
        page = Path(capsys.readouterr().out.rstrip("\n"))
        assert page.name == "index.html" and all(word in page.read_text() for word in words)
        assert {"bytes.png", "contributions.png"} < {path.name for path in page.parent.iterdir()}
    assert page.parent.parent == here / "runs" and page.parent.name.endswith("_report")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is not a directory; give that of a run or a sweep, such as runs/latest"),
        (["."], "is not the directory of a run or a sweep"),
        (["empty"], "empty is a sweep without any run"),
        (["run", "--to", "file"], "file cannot be written to"),
    ],
)
def test_report_says_what_is_wrong(
    here: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in ("empty", "sweep.csv"), ("run", "metrics.jsonl"):
        (here / folder).mkdir()
        (here / folder / name).touch()
    (here / "file").touch()
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_sweep_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "seed=1,2", *LINE]) == 0
    assert main(["export", "runs/latest", "--to", "new"]) == 2
    assert f"runs/latest{os.sep}0_seed=1" in capsys.readouterr().err


def test_sample_and_export_of_a_language_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (here / "poem.txt").write_text("\n\n".join(f"{n} green bottles hanging on the wall, and if" * 3 for n in range(60)))
    data = ["data.files=poem.txt", "data.tokenizer=bytes", "data.sequence_length=16", f"data.cache={here}/cache"]
    assert (
        main(["train", "runtime=local", "metrics.live=false", "rounds=1", "inner_steps=1", "data.batch=1", *data]) == 0
    )
    capsys.readouterr()
    texts = []
    for seed in "1", "1", "2":
        assert main(["sample", "runs/latest", "--prompt", "10 green", "--tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("10 green") and texts[0] == texts[1] != texts[2]

    shutil.rmtree(Path("runs/latest/checkpoints").resolve())  # what was exported will do
    assert main(["sample", "runs/latest", "--prompt", "10 green", "--tokens", "8", "--seed", "1"]) == 0
    assert capsys.readouterr().out == texts[0]
    assert main(["export", "runs/latest", "--to", "model"]) == 0
    capsys.readouterr()
    assert main(["report", "runs/latest"]) == 0  # with the text that the run wrote at its end
    assert capsys.readouterr().out == "runs/latest/report/index.html\n"
    assert "Samples" in Path("runs/latest/report/index.html").read_text()
    assert AutoTokenizer.from_pretrained("model")("green")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained("model").num_parameters() > 10**6


# --- doctor ---


def test_doctor_finds_a_run_possible_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("python", "torch", "ray", "transformers", "cores", "memory", "disk", "wandb"))
    assert "a run is possible" in text and not list(here.iterdir())


def test_doctor_says_what_is_missing_and_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: ["torch>=99", "no-such-package>=1", "numpy>=1"])
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    assert "pip install 'torch>=99'" in text and "pip install 'no-such-package>=1'" in text
    assert "no run is possible yet: 2 missing" in text


def test_doctor_knows_what_the_project_needs() -> None:
    assert {"torch", "ray", "transformers", "hydra-core"} <= {
        line.split(">")[0].split("[")[0] for line in doctor.requirements()
    }


def test_doctor_compares_socket_buffers(here: Path) -> None:
    for name, size in {"rmem_max": 1 << 26, "wmem_max": 1 << 18}.items():
        (here / name).write_text(f"{size}\n")
    findings = Findings()
    doctor.check_sockets(findings, here)
    assert [row.state for row in findings.rows] == [WARNING] and "wmem_max = 0.25 MiB" in findings.rows[0].found
    (here / "wmem_max").write_text(str(1 << 26))
    doctor.check_sockets(findings, here)
    doctor.check_sockets(findings, here / "nowhere")  # not this kind of system
    assert [row.state for row in findings.rows] == [WARNING, OK]


def test_doctor_looks_for_room(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = Findings()
    doctor.check_disk(findings, {"runs": here / "not" / "yet"})
    assert str(here) in findings.rows[0].found and findings.rows[0].state in (OK, WARNING)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    doctor.check_disk(findings, {"runs": here})
    assert findings.rows[1].state == MISSING


def test_doctor_asks_the_cluster_that_is_named() -> None:
    findings = Findings()
    doctor.check_ray(findings, "127.0.0.1:1")
    assert findings.rows[0].state == MISSING and "127.0.0.1:1 cannot be reached" in findings.rows[0].found
