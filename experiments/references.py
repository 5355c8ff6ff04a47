"""`@NAME` in a member of an experiment: the directory of an earlier member, known only when all are about to run."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.mistakes import Mistake

REFERENCE = re.compile(r"@([^/]+)(/.*)?")  # a whole value, or the beginning of a path


def references(values: DictConfig) -> dict[str, str]:
    """Dotted key, with an index for the item of a list -> the member that is named there."""
    return {key: name for key, name, _ in _found(OmegaConf.to_container(values, resolve=False), "")}


def check_references(values: DictConfig, earlier: Sequence[str]) -> None:
    """Raise Mistake where a value names what is none of the `earlier` members."""
    for key, name in references(values).items():
        if name not in earlier:
            known = f"only {', '.join(earlier)}" if earlier else "it is the first"
            raise Mistake(f"{key}=@{name}: there is no member {name} before it, {known}")


def placed(values: DictConfig, folders: Mapping[str, Path]) -> DictConfig:
    """A copy with directories in place of the members that are named."""
    filled = copy.deepcopy(values)
    for key, name, rest in _found(OmegaConf.to_container(values, resolve=False), ""):
        OmegaConf.update(filled, key, f"{folders[name]}{rest}")
    return filled


def _found(node: object, key: str) -> Iterator[tuple[str, str, str]]:
    """Key, name, and what follows the name, of each reference in plain values."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _found(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _found(child, f"{key}.{index}")
    elif isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
        yield key, match[1], match[2] or ""
