"""docker/README.md says what is so: its commands are taken, its ports are those that are used, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ray.scripts import scripts

from experiments import cli, composition

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "docker" / "README.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()
NODE = (ROOT / "docker" / "node.sh").read_text()
LINES = [line.partition("  #")[0].strip() for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
         for line in block.splitlines()]  # fmt: skip
TICKS = re.findall(r"`([^`\n]+)`", README)


def trainings() -> list[list[str]]:
    """The overrides of each command that trains."""
    found = []
    for text in [*LINES, *TICKS]:
        for start in ("diloco train ", "python -m experiments.train "):
            if start in text and "..." not in text:
                found.append(shlex.split(text.partition(start)[2]))
    return found


def test_there_are_commands() -> None:
    assert len(trainings()) >= 6 and len(LINES) >= 15


@pytest.mark.parametrize("words", trainings(), ids=" ".join)
def test_trainings_are_composed(words: list[str]) -> None:
    flags = 2 * words[:1].count("--restarts")  # the command's own, which composes nothing
    request = composition.Request(overrides=tuple(words[flags:]), imports=(), config_dir="")
    assert composition.single(request).config.islands >= 1


def test_doctor_and_ray_have_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    for text in [*LINES, *TICKS]:
        words = shlex.split(text)
        if words[:2] == ["diloco", "doctor"]:
            cli._parser().parse_args(words[1:])
        if words[:2] == ["ray", "drain-node"]:
            known = {option for parameter in scripts.drain_node.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words[2:]} <= known
        if words[:1] == ["ray"] and len(words) > 1:
            assert words[1].replace("_", "-") in scripts.cli.commands or words[1] == "job", text


def test_files_and_anchors_exist() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for text, folder in (README, ROOT / "docker"), (SECURITY, ROOT):
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            path, _, anchor = target.partition("#")
            assert (folder / path).exists(), target
            assert not anchor or anchor in anchors, target
    for path in re.findall(r"\bdocker/[\w.-]+", README + SECURITY):
        if path != "docker/ray_token":
            assert (ROOT / path.rstrip(".")).exists(), path


def test_the_ports_are_those_of_node_sh() -> None:
    table = dict(re.findall(r"^\| (\d+)(?:-\d+)? `(--[\w-]+)", README, re.M))
    first = int(re.search(r"NODE_PORTS:=(\d+)", NODE)[1])  # type: ignore[index]
    used = {"8265": "--dashboard-port"}
    for option, more in re.findall(r'(--[\w-]+port)="(?:\$NODE_PORTS|\$\(\(NODE_PORTS \+ (\d+)\)\))"', NODE):
        used[str(first + int(more or 0))] = option
    last = next(port for port, option in used.items() if option == "--max-worker-port")
    assert f"-{last} `--min-worker-port --max-worker-port`" in README
    assert table == {port: option for port, option in used.items() if port != last}
    assert "| 6379 |" in README and "--port=6379" in NODE


def test_variables_are_read_somewhere() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "docker").iterdir() if path.suffix in (".sh", ".yaml"))
    for name in sorted(set(re.findall(r"\b(?:NODE|HEAD)_[A-Z_]+\b", README))):
        assert name in sources, name
    names = re.findall(r"\bRAY_[A-Za-z_]+", README)
    assert {"RAY_AUTH_MODE", "RAY_USE_TLS", "RAY_object_manager_max_bytes_in_flight"} <= set(names)
