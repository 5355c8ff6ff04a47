"""The registry: which classes a group of the configuration may choose from, by name."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

# group -> choice -> class; what `register` was told
_PARTS: dict[str, dict[str, type]] = {}
# config key -> the group its choices come from
GROUPS = {
    **{key: key for key in ("workload", "inner", "layout", "schedule", "merge", "outer", "codec", "runtime")},
    "codec_down": "codec",
}


def register(*, group: str, name: str, node: type) -> None:
    """Make the dataclass `node` the choice `name` of `group`, as in `codec=mine`.

    Raises ValueError for an unknown group, or a name that another class has.
    """
    if group not in set(GROUPS.values()):
        raise ValueError(f"group={group!r} is unknown; use one of {', '.join(sorted(set(GROUPS.values())))}")
    taken = _PARTS.setdefault(group, {}).get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (node.__module__, node.__qualname__):
        raise ValueError(f"{group}={name} is already {taken.__module__}.{taken.__qualname__}; use another name")
    _PARTS[group][name] = node
    ConfigStore.instance().store(group=group, name=name, node=node)


def choice_of(key: str, part: object) -> str:
    """The registered name of a part, as `config.yaml` records it."""
    for name, node in _PARTS[GROUPS[key]].items():
        if node is type(part):
            return name
    known = f"{type(part).__module__}.{type(part).__qualname__}"
    raise ValueError(f"{known} is not registered; call diloco.config.register(group={GROUPS[key]!r}, ...) for it")


def choices(group: str) -> list[str]:
    """The registered names of a group."""
    return sorted(_PARTS.get(group, {}))


def part(group: str, name: str) -> type:
    """The registered class `name` of a group."""
    return _PARTS[group][name]
