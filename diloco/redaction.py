"""Secrets stay out of what a run leaves behind: its configuration is refused with them, texts lose them.

A configuration is saved with the run and shown in many places, so credentials in it are a mistake. Texts, such as
the errors of libraries, may still have some: what goes to a file or a terminal passes `redacted` on its way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache

HIDDEN = "***"
SHORTEST = 8  # characters of a secret in the environment: what is shorter may well be a word of any text

# user:password@ of a URL, where what follows the colon is no port; and any user@ of http, which is a token. One slash
# is left of two where a URL was taken for a path.
_USER = re.compile(r"(https?:/{1,2}(?=[^/\s@]+@)|\w:/{1,2}(?=[^/\s:@]*:(?!\d{1,5}/)))[^\s\"'@]+@")
_QUERY = re.compile(
    r"(?i)([?&](?:[\w-]*(?:token|secret|signature|passw(?:or)?d|credential|api[_-]?key|access[_-]?key(?:id)?)|sig|key|pwd)"
    r"=)[^&\s\"']+"
)
_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|ACCESS_KEY_ID|CREDENTIALS?)$")


def redacted(text: str) -> str:
    """`text` without credentials in URLs, and without the values of variables such as HF_TOKEN."""
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
    for secret in _environment():
        text = text.replace(secret, HIDDEN)
    return text


def redacted_values(value: object) -> object:
    """The same for all texts in nested mappings and sequences."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [redacted_values(item) for item in value]
    return value


def check(settings: object) -> None:
    """Raise ValueError where a text in a dataclass of settings, or in those below it, is a URL with credentials."""
    for key, text in _texts(settings, ""):
        if _USER.search(text) or _QUERY.search(text):
            raise ValueError(
                f"{key}={redacted(text)} has credentials, which would be saved with the run: leave them out, and give"
                " them to every node by variables (AWS_ACCESS_KEY_ID, ..., FSSPEC_FTP_PASSWORD) or ~/.config/fsspec"
            )


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """All texts with their dotted keys."""
    below = f"{key}." if key else ""
    if isinstance(value, str):
        yield key, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(vars(value).get(field.name), f"{below}{field.name}")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{below}{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


@cache
def _environment() -> tuple[str, ...]:
    """Values of the environment that are secrets by their names, the longest first; not paths of files with some."""
    found = {value for name, value in os.environ.items() if _NAMES.search(name.upper()) and len(value) >= SHORTEST}
    return tuple(sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True))
