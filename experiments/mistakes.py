"""What a user did wrong, in one or two lines: Hydra's and OmegaConf's errors reworded, with the nearest right names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from diloco import config as configuration
from diloco.config import RunConfig
from diloco.redaction import redacted

KINDS = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "text"}
MOST_NAMES = 6  # listed in a message


class Mistake(ValueError):
    """A mistake in the command line or the configuration: its text is all that the user is to see."""


def explain(error: Exception, overrides: Sequence[str], experiments: Sequence[str]) -> str:
    """What `error`, raised while `overrides` were composed, means for the user; `experiments` are the shipped ones."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    match error:
        case OverrideParseException():
            return _unreadable(error)
        case MissingConfigException():
            return _unknown_choice(error, overrides, experiments)
        case ConfigCompositionException() if cause is None:
            return _not_composed(error, overrides)
    match cause:
        case ConfigAttributeError() | ConfigKeyError():
            return unknown_key(str(cause.full_key))
        case ValidationError():
            return _wrong_type(cause, overrides)
        case MissingMandatoryValue():
            return f"{cause.full_key} has no value: give {cause.full_key}=..."
        case InterpolationResolutionError():
            return f"{cause.full_key}: {_lines(cause)[0]}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return " ".join(_lines(error)[:2])
    return str(error)


def unknown_key(key: str) -> str:
    """That no setting has this dotted key, and which come near it."""
    parent, _, name = key.rpartition(".")
    if parent in open_keys():
        return f"{key} is not there yet: write +{parent}.{name}=... (what may stand there, the part chosen checks)"
    owners = _owners(key)
    if owners:
        return f"{key} is a setting of {' and '.join(owners)} only: choose that too, or leave {key} out"
    return f"unknown key {key}{_meant(_near_keys(key))}"


def group_without_choice(key: str, value: str) -> str:
    """How a part under `key` is chosen, or which settings it has where there is nothing to choose.

    `value` is what was given instead.
    """
    if key in configuration.SINGLE:
        names = ", ".join(f"{key}.{name}" for name in _field_names(configuration.SINGLE[key])[:MOST_NAMES])
        return f"{key} is a group of settings: give them one by one ({names}, ...)"
    group = configuration.GROUPS[key]
    address = key if key == group else f"{group}@{key}"
    known = configuration.choices(group)
    if value in known:
        return f"write {address}={value}"
    return f"write {address}=, one of {', '.join(known)}"


def first_lines(error: BaseException) -> str:
    """At most two lines of an error's text, or its kind where it has none."""
    return "\n".join(_lines(error)[:2])


def _unreadable(error: OverrideParseException) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"{error.override!r} is not key=value; flags begin with -, see --help"
    if not key.strip("+~ "):
        return f"{error.override!r} has no key before the equals sign"
    return f"{error.override!r} cannot be read; quote its value: '{key}=\"{value}\"'"


def _last_given(overrides: Sequence[str], key: str) -> str:
    """The override of a key or group that counts, of several; empty where there is none."""
    named = (each for each in reversed(overrides) if each.lstrip("+").partition("=")[0].partition("@")[0] == key)
    return next(named, "")


def _unknown_choice(error: MissingConfigException, overrides: Sequence[str], experiments: Sequence[str]) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    known = list(experiments) if group == "experiment" else configuration.choices(group)
    given = _last_given(overrides, group) or f"{group}={choice}"
    if not choice or choice not in given:
        given = f"{group}={choice}" if choice else given
    closest = difflib.get_close_matches(choice, known, n=1)
    hint = f"; did you mean {closest[0]}?" if closest else ""
    rest = "" if group == "experiment" else " (a part of your own: --import the module that registers it)"
    return f"{given}: there is no such choice, only {', '.join(known) or 'none'}{hint or rest}"


def _wrong_type(cause: ValidationError, overrides: Sequence[str]) -> str:
    key, text = str(cause.full_key), _lines(cause)[0]
    given = _last_given(overrides, key) or key
    if "is not a subclass of" in text and (key in configuration.GROUPS or key in configuration.SINGLE):
        return f"{given}: {group_without_choice(key, given.partition('=')[2])}"
    if "expected one of" in text:
        return f"{given}: use one of {text.partition('expected one of')[2].strip(' []')}"
    if "could not be converted to" in text:
        kind = text.rpartition(" ")[2]
        return f"{given}: {key} must be {KINDS.get(kind, kind)}"
    if "is not a valid bool" in text:
        return f"{given}: {key} must be true or false"
    if "is not a ListConfig" in text:
        return f"{given}: {key} must be a list: write '{key}=[{given.partition('=')[2]}]'"
    if "is not Optional" in text:
        return f"{given}: {key} must have a value"
    return f"{given}: {text}"


def _not_composed(error: ConfigCompositionException, overrides: Sequence[str]) -> str:
    text = _lines(error)
    named = text[0].partition("'")[2].rpartition("'")[0]
    if "Ambiguous value" in text[0] or "requires --multirun" in text[0]:
        key, _, value = named.partition("=")
        as_list = "" if "(" in value else f", or write '{key}=[{value}]' for a list"
        return f"{named} gives several values: add -m to run them all{as_list}"
    if "No match in the defaults list" in text[0]:
        given = next((o for o in overrides if o.partition("=")[0] == named), f"{named}=...")
        return f"{given} needs a plus sign: write +{given}"
    set_by = re.search(r"In '(.*)': .*Key '.*' not in '(.*)' full_key: (\S+)", " ".join(text))
    if set_by is not None:
        where, part, key = set_by.groups()
        name, top = where.replace("experiment/", "+experiment="), key.partition(".")[0]
        chosen = next((o for o in overrides if re.match(rf"(\w+@)?{top}=", o)), f"what chooses {part}")
        return f"{name} sets {key}, which {part} has not: leave out {chosen}, or {name}"
    return " ".join(text[:2])


def _owners(key: str) -> list[str]:
    """The choices that have this setting, such as `codec=int8` for `codec.block`."""
    top, _, name = key.partition(".")
    group = configuration.GROUPS.get(top, "")
    address = top if top == group else f"{group}@{top}"
    parts = {choice: configuration.part(group, choice) for choice in configuration.choices(group)}
    return [f"{address}={choice}" for choice, part in parts.items() if name in _field_names(part)]


def _near_keys(key: str) -> list[str]:
    known = _known_keys()
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    top = key.partition(".")[0]
    beside = [name for name in known if "." in key and name.startswith(f"{top}.")]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.8) or difflib.get_close_matches(key, known, n=1)
    return list(dict.fromkeys([*same, *close, *beside]))[:MOST_NAMES]


def _known_keys() -> list[str]:
    keys = _field_names(RunConfig)
    for top, group in configuration.GROUPS.items():
        for choice in configuration.choices(group):
            keys += [f"{top}.{name}" for name in _field_names(configuration.part(group, choice))]
    for top, node in configuration.SINGLE.items():
        keys += [f"{top}.{name}" for name in _field_names(node)]
    return list(dict.fromkeys(keys))


def open_keys() -> list[str]:
    """Settings that are mappings of the user's own, such as `workload.settings`."""
    parts = [
        (top, configuration.part(group, choice))
        for top, group in configuration.GROUPS.items()
        for choice in configuration.choices(group)
    ]
    return [f"{top}.{field.name}" for top, part in parts for field in fields(part) if field.default_factory is dict]


def _field_names(node: type) -> list[str]:
    return [field.name for field in fields(node)]


def _meant(names: Iterable[str]) -> str:
    found = list(names)
    return f"; did you mean {' or '.join(found)}?" if found else "; --help lists the keys"


def _lines(error: BaseException) -> list[str]:
    found = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
    return found or [type(error).__name__]
