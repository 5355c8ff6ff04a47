"""Kinds of text: up to eight true domains that the project's own dependencies carry, each in a file of its own.

A model of a few hundred thousand parameters tells C++ from prose, and learns more where it has to know but one of them;
parts of one manual are too much alike for it.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from diloco.sources import passages

BYTES = 1_000_000  # of each kind, at most
LEAST_CHARACTERS = 400  # of a docstring: shorter ones say little
SKIPPED = frozenset(("test", "tests", "testing", "idle_test", "site-packages", "pydoc_data", "encodings"))


def files(folder: Path, count: int, *, most_bytes: int = BYTES) -> list[Path]:
    """JSON lines with `text` and `domain` for the first `count` kinds, made in `folder` unless they are there.

    Raises ValueError where there are not so many.
    """
    if not 1 <= count <= len(KINDS):
        raise ValueError(f"{count} kinds of text: there are 1 to {len(KINDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in list(KINDS)[:count]:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(_lines(name, most_bytes)), encoding="utf-8")
            temporary.rename(path)
        made.append(path)
    return made


def _lines(name: str, most_bytes: int) -> Iterator[str]:
    """Distinct passages in random order, so that what is left out is left out everywhere."""
    read = (passage for text in KINDS[name]() for passage in passages(text.splitlines(), "\n"))
    distinct = list(dict.fromkeys(passage for passage in read if passage.strip()))
    random.Random(0).shuffle(distinct)
    size = 0
    for passage in distinct:
        size += len(passage.encode())
        if size > most_bytes:
            return
        yield json.dumps({"text": passage, "domain": name}) + "\n"


def _site(package: str) -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / package


def _texts(root: Path, pattern: str) -> Iterator[str]:
    for path in sorted(root.rglob(pattern)):
        if not SKIPPED.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _of(pattern: str, *packages: str) -> Callable[[], Iterable[str]]:
    return lambda: (text for package in packages for text in _texts(_site(package), pattern))


def _docstrings(*packages: str) -> Callable[[], Iterable[str]]:
    def read() -> Iterator[str]:
        for text in _of("*.py", *packages)():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    found = ast.get_docstring(node) or ""
                    if len(found) >= LEAST_CHARACTERS:
                        yield found

    return read


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "python": lambda: _texts(Path(sysconfig.get_paths()["stdlib"]), "*.py"),
    "cpp": _of("*.h", "torch/include/ATen"),
    "manuals": _docstrings("numpy", "scipy", "sklearn"),
    "stubs": _of("*.pyi", "torch", "numpy", "pyarrow"),
    "models": _of("modeling_*.py", "transformers/models"),
    "mathematics": _of("*.py", "sympy"),
    "cython": _of("*.pyx", "scipy", "sklearn", "pandas", "pyarrow"),
    "help": _docstrings("torch", "transformers"),
}
