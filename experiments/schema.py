"""The keys that Hydra knows: those of a run, and the members of an experiment that is several runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import diloco.async_  # noqa: F401 - registers its parts
import dipaco  # noqa: F401 - likewise
from diloco import config as configuration
from diloco.config import RunConfig
from experiments.mistakes import Mistake, unknown_key

RUN_KEYS = tuple(key.name for key in fields(RunConfig))


@dataclass(kw_only=True)
class Composed(RunConfig):
    """What Hydra composes: one run, or what the `members` of an experiment have in common."""

    members: dict[str, list[str]] = field(default_factory=dict)  # name -> its own overrides


def refuse_additions(values: DictConfig) -> None:
    """Raise Mistake for a key that `+key=value` added and no part knows."""
    for key in _additions(values, ""):
        raise Mistake(unknown_key(key))


def _additions(values: DictConfig, prefix: str) -> Iterator[str]:
    node = OmegaConf.get_type(values)
    known = [key.name for key in fields(node)] if node is not None and is_dataclass(node) else None
    for key, child in values.items_ex(resolve=False):
        key = str(key)
        if known is not None and key not in known:
            yield f"{prefix}{key}"
        elif isinstance(child, DictConfig):
            yield from _additions(child, f"{prefix}{key}.")


def _register() -> None:
    """Replace the schema of a run by that of several."""
    schema = Composed()
    for key in configuration.GROUPS:
        setattr(schema, key, MISSING)
    ConfigStore.instance().store(name="schema", node=schema)


_register()
