"""From the command line to RunConfigs: Hydra composes, everything is checked, and nothing is written."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diloco import config as configuration
from diloco.config import RunConfig
from experiments import references
from experiments.mistakes import Mistake, explain, first_lines, group_without_choice, open_keys
from experiments.schema import RUN_KEYS, refuse_additions

CONFIGS = "experiments.conf"
NOT_OF_A_MEMBER = ("experiment", "members", "resume")
PATHS = ("resume", "init_from")  # keys whose value is a path that a shell may have completed


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks for."""

    overrides: tuple[str, ...]
    imports: tuple[str, ...] = ()
    config_dir: str = ""  # a folder with experiment/*.yaml of the user's own


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run, alone or among others."""

    overrides: dict[str, str]  # all of them: key -> value
    varying: tuple[str, ...]  # the keys that a sweep is over
    name: str = ""  # of a member of an experiment
    builds_on: tuple[str, ...] = ()  # earlier members whose directories `values` name, as @NAME
    values: DictConfig
    config: RunConfig  # checked; where members are named, not yet what is to be run: see `placed`

    def placed(self, folders: Mapping[str, Path]) -> RunConfig:
        """The configuration with the directories of the members that it names. Raises Mistake."""
        if not self.builds_on:
            return self.config
        with _explained(()):
            return _config(references.placed(self.values, folders))


def look_here() -> str:
    """Let modules of the current folder be imported, as `python -m` does and a console script does not."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return here


def import_parts(modules: Sequence[str]) -> None:
    """Import the user's own parts, also from the current folder. Raises Mistake where there is no such module."""
    here = look_here()
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Mistake(
                f"--import {module}: {error}; it is looked for in {here} and among installed packages"
            ) from error
        except ValueError as error:  # such as a name that is taken
            raise Mistake(f"--import {module}: {error}") from error


def single(request: Request) -> Member:
    """The one run that is asked for, or what the members of an experiment have in common. Raises Mistake."""
    with _hydra(request) as overrides:
        return _member(_parsed(overrides), request)


def named(request: Request) -> list[Member]:
    """The members of the experiment that is asked for, in its order; none where it is one run. Raises Mistake.

    What the command line gives holds for all of them, also where a member has something else. A value that is or begins
    with @NAME stands for the directory of an earlier member.
    """
    with _hydra(request) as overrides:
        parsed = _parsed(overrides)
        common = _composed(parsed, request)
        first = [override for override in parsed if override.key_or_group == "experiment"]
        rest = [override for override in parsed if override not in first]
        found: list[Member] = []
        for name, lines in common.members.items():
            try:
                own = _parsed(lines)
                if common.resume or any(override.key_or_group in NOT_OF_A_MEMBER for override in own):
                    raise Mistake("it can neither go on with a run nor have members of its own")
                member = _member([*first, *own, *rest], request, name=str(name))
                references.check_references(member.values, [other.name for other in found])
                found.append(member)
            except Mistake as error:
                raise Mistake(f"member {name}: {error}") from error
        return found


def sweep(request: Request) -> list[Member]:
    """All runs that the overrides ask for, in the order of the command line; each of them is sound. Raises Mistake."""
    with _hydra(request) as overrides:
        parsed = _parsed(overrides)
        varying = [override for override in parsed if override.is_sweep_override()]
        for override in parsed:
            if override.key_or_group == "resume":
                raise Mistake(f"{override.input_line} goes on with one run: use it without -m")
        keys = tuple(override.get_key_element().lstrip("+") for override in varying)
        members: list[Member] = []
        for values in itertools.product(*(_choices(override) for override in varying)):
            chosen = dict(zip(map(id, varying), values, strict=True))
            lines = [chosen.get(id(override), str(override.input_line)) for override in parsed]
            try:
                if not members and _composed(_parsed(lines), request).members:
                    raise Mistake("the experiment has members of its own: use it without -m")
                members.append(_member(_parsed(lines), request, varying=keys))
            except Mistake as error:
                label = f"member {len(members)} ({' '.join(values)}): " if values else ""
                raise Mistake(label + str(error)) from error
        return members


def experiments(config_dir: str = "") -> list[str]:
    """The names that `+experiment=` takes: those shipped, then those of the user's folder."""
    shipped = (files(CONFIGS) / "experiment").iterdir()
    own = Path(config_dir, "experiment").expanduser().glob("*.yaml") if config_dir else ()
    return [name[:-5] for found in (shipped, own) for name in sorted(p.name for p in found) if name.endswith(".yaml")]


@contextmanager
def _hydra(request: Request) -> Iterator[list[str]]:
    """Hydra set up for this request; the overrides as it is to read them."""
    overrides = [_quoted_path(override) for override in request.overrides]
    if request.config_dir:
        folder = Path(request.config_dir).expanduser().absolute()
        if not folder.is_dir():
            raise Mistake(f"--config-dir {request.config_dir} is no folder")
        overrides.append(f"hydra.searchpath=['file://{folder}']")
    with initialize_config_module(CONFIGS, version_base="1.3"):
        yield overrides


def _quoted_path(override: str) -> str:
    """`resume=runs/x/0_islands=2` as the shell completes it would not be read: the value needs quotes."""
    key, _, value = override.partition("=")
    if key in PATHS and '"' not in value and "'" not in value and Path(value).exists():
        return f"{key}='{value}'"
    return override


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    with _explained(overrides):
        for text in overrides:
            if not text.partition("=")[0].strip("+~ "):
                raise Mistake(f"{text!r} has no key before the equals sign")
        parsed = parser.parse_overrides(list(overrides))
    for override in parsed:
        if override.is_hydra_override() and override.key_or_group != "hydra.searchpath":
            raise Mistake(f"{override.input_line}: settings of Hydra itself have no effect here; leave it out")
        if override.is_delete():
            raise Mistake(f"{override.input_line}: nothing can be taken away; give another value instead")
    return parsed


def _choices(override: Override) -> list[str]:
    if not override.is_discrete_sweep():
        raise Mistake(f"{override.input_line}: a sweep needs values to try, as in {override.key_or_group}=1,2")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _member(parsed: list[Override], request: Request, *, varying: tuple[str, ...] = (), name: str = "") -> Member:
    """Compose and check one run."""
    values = _composed(parsed, request)
    with _explained([str(override.input_line) for override in parsed], request.config_dir):
        shown = OmegaConf.masked_copy(values, list(RUN_KEYS))
        config = _config(shown)
        named = references.references(shown) if name else {}
        if not any(key.startswith("metrics.") for key in named):
            config.metrics.check()
    told = {o.get_key_element().lstrip("+"): _text(o) for o in parsed if not o.is_hydra_override()}
    on = tuple(dict.fromkeys(named.values()))
    return Member(overrides=told, varying=varying, name=name, builds_on=on, values=shown, config=config)


def _config(values: DictConfig) -> RunConfig:
    """The objects themselves. Raises what they raise."""
    found = OmegaConf.to_object(values)
    assert isinstance(found, dict)
    return RunConfig(**{str(key): value for key, value in found.items()})


def _composed(parsed: list[Override], request: Request) -> DictConfig:
    """All values, not checked together yet."""
    named = [_text(o) for o in parsed if o.key_or_group == "experiment"]
    run = next((_text(o) for o in parsed if o.key_or_group == "resume"), "")
    lines = [str(override.input_line) for override in parsed]
    with _explained(lines, request.config_dir):
        if run not in ("", "auto") and not named:
            values = _on_saved(run, parsed)
        else:
            values = compose("config", overrides=lines)
            values.experiment = ",".join(named)
        refuse_additions(values)
        values.imports = list(dict.fromkeys([*values.imports, *request.imports]))
    return values


def _on_saved(run: str, parsed: list[Override]) -> DictConfig:
    """A run's own configuration, with exactly what was given on top; whether that may differ is checked later."""
    chosen, saved = _saved(Path(run) / "config.yaml", run)
    given = {o.package or o.key_or_group for o in parsed if _is_choice(o)}
    base = [f"{_address(key)}={choice}" for key, choice in chosen.items() if key not in given]
    fresh = compose("config", overrides=[*base, *(str(override.input_line) for override in parsed)])
    for key in open_keys():
        if OmegaConf.is_dict(OmegaConf.select(fresh, key)):
            OmegaConf.set_struct(OmegaConf.select(fresh, key), False)
    kept = {key: value for key, value in saved.items() if key not in given}
    try:
        values = OmegaConf.merge(fresh, kept)
    except OmegaConfBaseException as error:
        raise Mistake(f"{run}/config.yaml is no configuration of this version: {first_lines(error)}") from error
    assert isinstance(values, DictConfig)
    for override in parsed:
        if not _is_choice(override) and not override.is_hydra_override():
            OmegaConf.update(values, override.key_or_group, override.value(), merge=True)
    return values


def _saved(file: Path, run: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What a run's config.yaml says: the choice under each key, and all values; its own parts are imported."""
    if not file.is_file():
        raise Mistake(f"resume={run} is not the directory of a run: it has no config.yaml")
    try:
        saved = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(saved, dict)
        chosen = {key: str(choice) for key, choice in saved.pop("choices").items() if key in configuration.GROUPS}
    except (YAMLError, AttributeError, KeyError, AssertionError, OmegaConfBaseException) as error:
        raise Mistake(f"{file} is not what a run wrote: {first_lines(error)}") from error
    import_parts(saved.get("imports", []))
    return chosen, {str(key): value for key, value in saved.items()}


def _is_choice(override: Override) -> bool:
    """Whether it chooses a part, as `codec=int8` does, rather than set a value."""
    return override.key_or_group in configuration.GROUPS.values() and isinstance(override.value(), str)


def _address(key: str) -> str:
    group = configuration.GROUPS[key]
    return key if key == group else f"{group}@{key}"


def _text(override: Override) -> str:
    value = override.value()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def _explained(overrides: Sequence[str], config_dir: str = "") -> Iterator[None]:
    """Turn what goes wrong with the command line inside into a Mistake."""
    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if equals and configuration.GROUPS.get(key, key) != key and value[:1] not in ("{", "$"):
                raise Mistake(f"{override}: {group_without_choice(key, value)}")
        yield
    except Mistake:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise Mistake(explain(error, overrides, experiments(config_dir))) from error
