"""`diloco train`: exit statuses, messages, what is left behind, and going on with a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import Tensor, nn

from diloco.config import load, register
from diloco.workload import Batch
from experiments import entry, train
from experiments.entry import main
from tests.toy import Constant

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--import", "tests.toy", "runtime=local", "workload=line", "metrics.live=false", "inner_steps=4", "rounds=2"]


@dataclass(kw_only=True)
class Refusing(Constant):
    """Raises in mid-run what would be a mistake of the user's before it."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        raise ValueError("raised while training")


register(group="workload", name="refusing", node=Refusing)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def summary(run: str | Path = "runs/latest") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "summary.json").read_text())
    return found


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "experiments.train", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- mistakes ---

MISTAKES = {
    "inner_step=3": ["unknown key inner_step", "inner_steps"],
    "+inner_step=3": ["unknown key inner_step"],
    "lr=0.1": ["unknown key lr", "inner.lr", "outer.lr"],
    "outer=sgd outer.momentum=.5": ["outer.momentum", "outer=nesterov"],
    "islands=two": ["islands=two", "an integer"],
    "islands=4 islands=two": ["islands=two", "an integer"],  # the one that counts
    "codec=int8 codec=bfloat": ["codec=bfloat", "no such choice"],
    "inner.lr=high": ["inner.lr=high", "a number"],
    "metrics.live=maybe": ["metrics.live=maybe", "true or false"],
    "inner.rate=square": ["inner.rate=square", "cosine, wsd, constant"],
    "islands=null": ["islands=null", "must have a value"],
    "inner_steps=0": ["inner_steps=0", "at least 1"],
    "outer.momentum=1": ["outer.momentum", "[0, 1)"],
    "codec=bfloat": ["codec=bfloat", "bfloat16, float32"],
    "codec@codec_down=mine": ["codec@codec_down=mine", "--import"],
    "codec_down=bfloat16": ["write codec@codec_down=bfloat16"],
    "codec=int4 codec.block=48": ["codec.block=48", "power of two"],
    "codec@codec_down=int8 codec_down.block=0": ["block=0", "power of two"],
    "codec=topk codec.density=0": ["density=0"],
    "schedule.keep=1.5": ["schedule.keep=1.5", "[0, 1]"],
    "inner_steps=4 schedule.lag=4": ["schedule.lag=4", "inner_steps=4", "at most 3"],
    "layout=fragments": ["no numbered blocks", "layout=whole"],
    "workload.blocks=4 layout=fragments layout.count=5": ["layout.count=5", "4 blocks", "use fewer"],
    "workload.blocks=4 layout=fragments inner_steps=7": ["inner_steps=7", "divisible by the 4 fragments", "4 or 8"],
    "layout=fragments layout.cut=random": ["layout.cut=random", "strided"],
    "runtime.latency_s=-1": ["latency_s=-1"],
    "runtime=local runtime.mbits_per_s=[0,1]": ["mbits_per_s=[0.0, 1.0]", "positive"],
    "data=text": ["data.corpus", "one by one"],
    "+experiment=quickstar": ["+experiment=quickstar", "did you mean quickstart?"],
    "experiment=smoke": ["write +experiment=smoke"],
    "islands=2,4": ["islands=2,4", "-m"],
    "islands=range(1,3)": ["-m"],
    "islands": ["'islands' is not key=value"],
    "workload=preference workload.settings.beta=1": ["write +workload.settings.beta="],
    "metrics.beside=x": ["metrics.beside must be a list: write 'metrics.beside=[x]'"],
    "=2": ["no key"],
    "data.files=a=b": ["quote"],
    "name=${nothing}": ["name", "nothing"],
    "~codec": ["~codec"],
    "hydra.run.dir=elsewhere": ["hydra.run.dir"],
    "--import no_such_package.parts": ["--import no_such_package.parts", "No module named"],
    "--config-dir nowhere": ["--config-dir nowhere"],
    "--cfg hydra": ["--cfg", "job"],
    "--no-such-flag": ["--no-such-flag", "--help"],
    "resume=nowhere": ["resume=nowhere"],
    "-m islands=1,0": ["member 1", "islands=0"],
    "-m islands=interval(1,2)": ["islands=interval(1,2)"],
    "-m resume=x seed=1,2": ["resume=x", "-m"],
    "runtime=local runtime.seconds_per_step=[1]": ["runtime.seconds_per_step has 1"],  # found while starting
    "init_from=nowhere": ["init_from=nowhere"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_said_in_two_lines_and_leaves_nothing_behind(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--import", "tests.toy", "workload=line", "runtime=local", *line.split(" ")]
    arguments = list(dict.fromkeys(arguments)) if "--import no" not in line else line.split(" ")
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse
        status = int(str(error.code))
    said = [text for text in capsys.readouterr().err.splitlines() if not text.startswith(("preparing ", "starting "))]
    assert status == 2
    assert 1 <= len(said) <= 2 and said[0].startswith("error: "), said
    assert all(part in " ".join(said) for part in MISTAKES[line]), said
    assert not list(here.iterdir())


def test_an_imported_module_that_lacks_something_is_a_mistake(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "lacking_parts.py").write_text("import what_is_nowhere\n")
    assert main(["--import", "lacking_parts"]) == 2
    assert "No module named 'what_is_nowhere'" in capsys.readouterr().err


# --- how runs end ---


def test_a_run_that_finishes(here: Path) -> None:
    assert main([*TOY, "name=plain"]) == 0
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert len(list((here / "runs").iterdir())) == 2  # the run and `latest`
    found = summary()
    assert (found["status"], found["name"], found["experiment"], found["rounds"]) == ("finished", "plain", "", 2)
    assert Path(found["run_directory"]).name.endswith("_plain")
    assert load(Path("runs/latest/config.yaml")).imports == ["tests.toy"]


def test_a_run_stopped_by_its_own_rule() -> None:
    poison = ["workload.poisoned_steps=[0]", "workload.poisoned_shards=[0,1]"]
    assert main([*TOY, "workload=constant", *poison]) == 3
    assert summary()["status"] == "stopped" and "rejected" in summary()["reason"]


@pytest.mark.parametrize("workload", ["constant", "refusing"])
def test_what_nobody_expects_keeps_its_traceback(workload: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        main([*TOY, f"workload={workload}", "workload.fails_after_step=5"])
    assert summary()["status"] == "failed"


def test_terminated_while_starting(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "attempt", lambda config, directory: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(TOY) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before and not list(here.iterdir())


def test_ctrl_c_writes_a_checkpoint_to_go_on_from(here: Path) -> None:
    many = [*TOY, "rounds=1000000", "checkpoint.every=0", "inner=sgd"]
    with subprocess.Popen(command(*many), stdout=subprocess.PIPE, text=True, env=environment()) as run:
        try:
            assert run.stdout is not None
            for line in run.stdout:
                if line.split()[:2] == ["round", "3/1000000"]:
                    run.send_signal(signal.SIGINT)
                    break
            run.stdout.read()
            assert run.wait(timeout=120) == 130
        finally:
            run.kill()
    stopped = summary()
    assert stopped["status"] == "interrupted" and stopped["rounds"] >= 3
    assert Path(stopped["checkpoint"], "manifest.json").is_file()

    assert main(["resume=runs/latest", f"rounds={stopped['rounds'] + 2}"]) == 0
    assert summary()["rounds"] == stopped["rounds"] + 2


# --- going on with a run ---


def test_resume_alone_takes_the_saved_configuration_and_what_is_given(here: Path) -> None:
    settings = [*TOY, "inner=sgd", "inner.lr=0.05", "outer.lr=0.5", "seed=3"]
    assert main([*settings, "rounds=4", "name=whole"]) == 0
    whole = summary()
    assert main([*settings, "name=parts"]) == 0
    first = load(Path("runs/latest/config.yaml"))
    assert main(["rounds=4", "resume=runs/latest", "checkpoint.keep=5"]) == 0
    parts = summary()
    assert parts["weights_sha256"] == whole["weights_sha256"] and parts["tokens"] == whole["tokens"]
    assert parts["name"] == "parts" and len(list((here / "runs").iterdir())) == 3
    last = load(Path("runs/latest/config.yaml"))
    assert (last.rounds, last.checkpoint.keep, last.imports) == (4, 5, ["tests.toy"])
    assert (last.inner, last.outer, last.workload, last.seed) == (first.inner, first.outer, first.workload, 3)


def test_a_resumed_run_has_the_settings_that_the_user_added(here: Path) -> None:
    """Those of an objective, whose names the schema does not know."""
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["runtime=local", "islands=1", "inner_steps=1", "rounds=1", "metrics.live=false", "data.batch=2"]
    settings += ["workload=preference", "workload.model=micro", "+workload.settings.beta=0.5"]
    data = ["data.files=pairs.jsonl", "data.tokenizer=bytes", "data.sequence_length=8", "data.cache=cache"]
    assert main([*settings, *data]) == 0
    assert main(["resume=runs/latest", "rounds=2"]) == 0
    assert vars(load(Path("runs/latest/config.yaml")).workload)["settings"] == {"beta": 0.5}
    assert summary()["rounds"] == 2


def test_resume_refuses_what_would_make_it_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "inner.lr=0.05"]) == 0
    before = summary()
    capsys.readouterr()
    for given, words in {
        "inner.lr=0.1": ["inner.lr=0.1 was 0.05"],
        "inner=sgd": ["inner"],
        "rounds=1": ["rounds=1", "2"],
        "inner.speed=3": ["unknown key inner.speed"],
    }.items():
        assert main(["resume=runs/latest", given]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) <= 2 and all(word in error for word in words), error
    # A named experiment stands for a whole configuration, so all of it is compared.
    assert main(["+experiment=smoke", "resume=runs/latest"]) == 2
    assert "may differ" in capsys.readouterr().err
    assert summary() == before


def test_resume_of_what_no_run_wrote(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TOY) == 0
    file = Path("runs/latest/config.yaml")
    for text in ("a: [", "just text", "name: x\n", file.read_text() + "colour: red\n"):
        file.write_text(text)
        assert main(["resume=runs/latest"]) == 2
        assert "config.yaml" in capsys.readouterr().err


def test_resume_auto_begins_and_goes_on(here: Path) -> None:
    auto = [*TOY, "resume=auto", "name=again"]
    assert main([*TOY, "name=not_again"]) == 0  # another name, though it ends the same
    assert main(auto) == 0
    first = summary()
    assert main([*auto, "rounds=3"]) == 0
    assert summary()["run_directory"] == first["run_directory"] and summary()["rounds"] == 3
    shutil.rmtree(Path("runs/latest/checkpoints").resolve())
    assert main(auto) == 0
    assert summary()["run_directory"] != first["run_directory"]


def test_paths_are_read_as_the_shell_completes_them(here: Path) -> None:
    assert main([*TOY, "-m", "seed=1,2"]) == 0
    run = next(path for path in Path("runs/latest/").iterdir() if path.name == "1_seed=2")
    assert main([f"resume={run}", "rounds=3"]) == 0
    assert summary(run)["rounds"] == 3 and summary(run)["seed"] == 2


# --- the command line ---


def test_flags_may_come_after_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["islands=3", "--cfg", "job", "workload=line", "--import", "tests.toy", "name=x"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.islands, shown.name, list(shown.imports)) == (3, "x", ["tests.toy"])
    assert main(["outer.lr=0.3", "-p", "outer", "-c", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out) == {"lr": 0.3, "momentum": 0.9}


def test_help_lists_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h", "--import", "tests.toy"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", "smoke", "inner_steps=", "codec@codec_down=", "constant"))


def test_experiments_of_ones_own(here: Path) -> None:
    folder = here / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nname: mine\nrounds: 1\nouter:\n  lr: 0.25\n")
    assert main([*TOY[:-1], "+experiment=mine", "--config-dir", "conf"]) == 0
    found = summary()
    assert (found["experiment"], found["name"], found["rounds"]) == ("mine", "mine", 1)


def test_one_copied_file_with_parts_of_ones_own(here: Path) -> None:
    copied = here / "home" / "train.py"
    copied.parent.mkdir()
    shutil.copy(str(train.__file__), copied)
    (here / "my_parts.py").write_text(
        "from dataclasses import dataclass\n"
        "from diloco.config import register\n"
        "from tests.toy import Line\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(Line):\n"
        "    pass\n"
        "register(group='workload', name='mine', node=Mine)\n"
    )
    arguments = ["rounds=1", "inner_steps=2", "runtime=local", "workload=mine", "--import", "my_parts"]
    run = [sys.executable, "-W", "error", str(copied), *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["home", "my_parts.py", "runs"]
    assert OmegaConf.load("runs/latest/config.yaml").choices.workload == "mine"
