"""The one door to models and tokenizers from outside: no Python code of theirs, no pickles, no questions asked.

transformers would ask on the terminal whether to run the code that comes with a model, and would unpickle weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Settings = Mapping[str, object] | None  # more keyword arguments of `from_pretrained`


class NeedsCode(ValueError):
    """A model or tokenizer that works with Python code of its own only, which was not allowed."""


def load(kind: Any, source: str | Path, *, trust_remote_code: bool | None = None, settings: Settings = None) -> Any:
    """What `kind`, an Auto class of transformers for configurations or tokenizers, loads from a folder or hub id.

    `trust_remote_code`: the user's setting, None where there is none. Raises NeedsCode where it must be true and is
    not; OSError and ValueError where there is nothing to load.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=bool(trust_remote_code), **(settings or {}))
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        unless = "" if trust_remote_code is None else ", unless you read it and set workload.trust_remote_code=true"
        raise NeedsCode(
            f"{source} comes with Python code of its own, which is not run{unless}: give a model that transformers has"
        ) from error


def load_model(
    kind: Any, source: str | Path, *, trust_remote_code: bool | None = None, settings: Settings = None
) -> Any:
    """The same for models, whose weights must be safetensors."""
    safe = {**(settings or {}), "use_safetensors": True}
    return load(kind, source, trust_remote_code=trust_remote_code, settings=safe)
