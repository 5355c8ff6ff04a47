"""Sizes and habits of the packages: short files and functions, documented names, no guessed attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("diloco", "dipaco", "experiments")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 50

# "path" or "path:Class.function" -> why it may break a rule of this file, and until when. Best kept empty.
ALLOWED: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Every class and function, nested ones too, with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def functions(tree: ast.AST) -> Iterator[tuple[str, Function]]:
    yield from ((name, node) for name, node in definitions(tree) if isinstance(node, Function))


def public(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """A module's classes and functions without an underscore, and their methods, overrides too."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, Function) and not child.name.startswith("_"):
                        yield f"{node.name}.{child.name}", child


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def source(request: pytest.FixtureRequest) -> tuple[str, str, ast.Module]:
    """A file's name, text and tree."""
    text = request.param.read_text(encoding="utf-8")
    return request.param.relative_to(ROOT).as_posix(), text, ast.parse(text)


def breaches(found: list[str]) -> list[str]:
    """Those that the list of exceptions does not name; an entry is "place", or "place: what is wrong"."""
    return [breach for breach in found if breach.split(": ")[0] not in ALLOWED]


def test_files_are_short(source: tuple[str, str, ast.Module]) -> None:
    name, text, _ = source
    lines = len(text.splitlines())
    assert lines <= MOST_LINES_OF_A_FILE or name in ALLOWED, f"{name} has {lines} lines: find the next noun"


def test_functions_are_short(source: tuple[str, str, ast.Module]) -> None:
    name, _, tree = source
    sizes = {where: (node.end_lineno or 0) - node.lineno + 1 for where, node in functions(tree)}
    long = {where: size for where, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION}
    assert not breaches([f"{name}:{where}: {size} lines" for where, size in long.items()])


def test_public_names_have_docstrings(source: tuple[str, str, ast.Module]) -> None:
    name, _, tree = source
    bare = []
    for where, node in public(tree):
        setter = any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
        if not ast.get_docstring(node) and not setter:
            bare.append(f"{name}:{where}")
    assert not breaches(bare)


def test_no_guessing_at_attributes(source: tuple[str, str, ast.Module]) -> None:
    name, _, tree = source
    guesses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = len(node.args) + len(node.keywords)
            if node.func.id == "hasattr" or (node.func.id == "getattr" and arguments > 2):
                guesses.append(f"{name}: line {node.lineno} calls {node.func.id}")
    assert not breaches(guesses)


def test_no_signature_takes_anything(source: tuple[str, str, ast.Module]) -> None:
    name, _, tree = source
    assert not breaches([f"{name}:{where}: **kwargs" for where, node in functions(tree) if node.args.kwarg])


def test_sources_are_ascii(source: tuple[str, str, ast.Module]) -> None:
    name, text, _ = source
    lines = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not lines or name in ALLOWED, f"{name}: lines {lines}"


def test_exceptions_name_what_exists() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert not [place for place in ALLOWED if place.split(":")[0] not in names]
