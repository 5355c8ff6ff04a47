"""What the README shows is run: its commands, made small, and its Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import cli, entry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [(title, text) for language, title, text in BLOCKS if language == "python"]
SMALL = ["runtime=local", "rounds=1", "data.batch=2", "data.sequence_length=16"]
SMALL += ["data.eval_sequences=4", "data.max_tokens=400000"]


def commands() -> Iterator[str]:
    """Each command of the README that this project itself answers, `make` aside."""
    shown = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
    shown += re.findall(r"`((?:python -m experiments\.train|diloco train) [^`]*)`", README)
    for line in shown:
        command = line.partition("  #")[0].strip().replace("\\|", "|")
        if command.startswith(("python -m experiments.", "diloco ")):
            yield command


TRAINING = [c for c in commands() if c.startswith(("python -m experiments.train", "diloco train"))]
FRESH = [c for c in TRAINING if "resume=" not in c]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the README's own parts and rows in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for _, title, text in BLOCKS:
        if title:
            (tmp_path / title).write_text(text)
    return tmp_path


def run_small(command: str) -> int:
    words = shlex.split(command)
    words = words[3:] if words[0] == "python" else words[2:]
    given = {word.partition("=")[0] for word in words}
    fragments = 24 if "+experiment=quorum" in words else 5
    few = [f"inner_steps={fragments}"] if "inner_steps" not in given else []
    return entry.main([*words, *SMALL, *few])


def test_the_readme_shows_commands_and_python() -> None:
    assert len(FRESH) >= 8
    assert any(title for title, _ in SNIPPETS) and any(not title for title, _ in SNIPPETS)


@pytest.mark.parametrize("command", FRESH)
def test_training_commands_finish(command: str, folder: Path) -> None:
    assert run_small(command) == 0
    assert (folder / "runs" / "latest").exists()


def test_python_snippets_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for title, text in SNIPPETS:
        if not title:
            exec(compile(text, "README.md", "exec"), {})
    assert (folder / "runs" / "latest" / "summary.json").is_file()


def test_plans_are_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = [shlex.split(command) for command in commands() if command.startswith("diloco plan")]
    assert plans
    for words in plans:
        assert cli.main(words[1:]) == 0
        assert capsys.readouterr().out in README
    assert not (folder / "runs").exists()


def test_commands_on_a_finished_run(folder: Path) -> None:
    assert entry.main(["+experiment=smoke", *SMALL, "inner_steps=2"]) == 0
    for command in commands():
        words = shlex.split(command)
        if words[0] == "diloco" and words[1] in ("report", "sample", "export"):
            assert cli.main(words[1:]) == 0, command
    assert (folder / "exported" / "config.json").is_file()
    assert (folder / "runs" / "latest" / "report" / "index.html").is_file()


def test_resume_command_goes_on(folder: Path) -> None:
    assert entry.main(["+experiment=smoke", *SMALL, "inner_steps=2"]) == 0
    assert "diloco train resume=runs/latest" in TRAINING
    assert entry.main(["resume=runs/latest", "rounds=2"]) == 0


def test_named_files_exist() -> None:
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
