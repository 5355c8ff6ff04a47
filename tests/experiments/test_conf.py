"""Every shipped experiment composes to a sound RunConfig, and says only what differs from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from importlib.resources import files
from typing import Any

import pytest
from omegaconf import OmegaConf

from diloco.config import GROUPS, SINGLE, RunConfig, choice_of, defaults_of_changed
from diloco.inner import Sgd
from experiments.composition import Request, experiments, named, single

FOLDER = files("experiments.conf") / "experiment"
NAMES = sorted(path.name.removesuffix(".yaml") for path in FOLDER.iterdir() if path.name.endswith(".yaml"))

NEEDS = {"warp": ("workload.model=RUN/export",)}  # what it cannot know


def overrides(name: str) -> tuple[str, ...]:
    return (f"+experiment={name}", *NEEDS.get(name, ()))


def content(name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.create((FOLDER / f"{name}.yaml").read_text()))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_experiments_are_found() -> None:
    assert NAMES == experiments() and {"smoke", "quickstart"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_and_is_known_by_its_name(name: str) -> None:
    config = single(Request(overrides=overrides(name))).config
    assert isinstance(config, RunConfig)
    assert config.experiment == config.name == name


def test_the_defaults_of_what_a_command_changes() -> None:
    config = single(Request(overrides=("islands=3", "inner=sgd", "inner.lr=0.5", "metrics.wandb=offline"))).config
    usual = {"inner": "adamw", "islands": 2, "inner.lr": Sgd().lr, "metrics.wandb": "off"}
    assert defaults_of_changed(config) == usual and defaults_of_changed(RunConfig()) == {}


@pytest.mark.parametrize("name", NAMES)
def test_it_repeats_no_default(name: str) -> None:
    config, default = single(Request(overrides=overrides(name))).config, RunConfig()
    given = content(name)
    given.pop("members", None)
    for choice in given.pop("defaults", []):
        for address, chosen in choice.items():
            key = address.removeprefix("override ").removeprefix("/").rpartition("@")[2]
            assert chosen != choice_of(key, vars(default)[key]), f"{address}: {chosen} is the default"
    for path, value in leaves(given):
        top, _, rest = path.partition(".")
        if top in (*GROUPS, *SINGLE):
            usual = OmegaConf.select(OmegaConf.structured(type(vars(config)[top])), rest)
            assert value != (usual.value if isinstance(usual, Enum) else usual), f"{path}: the default"
        else:
            assert value != vars(default)[top], f"{path}: {value} is the default"


STAGES = {"align_quickstart", "warp"}  # whose members build on each other, and are not compared
EQUAL_A_PATH = {"dipaco_compare"}  # as arXiv:2403.10616 compares: a dense model has the tokens of one path


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_its_members_train_on_equal_tokens(name: str) -> None:
    configs = [member.config for member in named(Request(overrides=overrides(name)))]
    tokens = {c.islands * c.inner_steps * c.rounds * c.data.batch * c.data.sequence_length for c in configs}
    steps = {c.inner_steps * c.rounds * c.data.batch * c.data.sequence_length for c in configs}
    assert name in STAGES or len(steps if name in EQUAL_A_PATH else tokens) <= 1
    assert all(config.name == config.experiment == name for config in configs)
