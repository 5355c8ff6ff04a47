"""Who may import whom, checked in the source: the layers stay layers only if a test says so."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("diloco", "dipaco", "experiments")

# What each module of ours may import of ours. The first pattern that fits counts, so special ones come first;
# `!` takes away from what the others give. A new file needs a row: decide where it belongs.
TYPES = {  # records
    *("diloco.messages", "diloco.counters", "diloco.events", "diloco.pool", "diloco.progress", "diloco.views"),
}
DATA = {
    *("diloco.data", "diloco.dealing", "diloco.examples", "diloco.files", "diloco.sources", "diloco.tokens"),
    *("diloco.pretrained", "diloco.prompts", "diloco.vocabulary"),
}
MAY_IMPORT: dict[str, set[str]] = {
    "diloco.messages": set(),
    "diloco.events": {"diloco.messages"},
    "diloco.counters": {"diloco.messages"},
    "diloco.pool": {"diloco.messages"},
    "diloco.progress": {"diloco.messages", "diloco.pool"},
    "diloco.paces": {"diloco.messages", "diloco.progress"},
    "diloco.norms": {"diloco.messages", "diloco.progress"},
    "diloco.views": {
        *("diloco.counters", "diloco.messages", "diloco.norms", "diloco.paces", "diloco.pool", "diloco.progress"),
    },
    "diloco.waiting": {"diloco.messages"},
    "diloco.tasks": TYPES,
    "diloco.folding": {"diloco.schedule", *TYPES},
    "diloco.hearing": {"diloco.records", "diloco.schedule", *TYPES},
    "diloco.saved_view": {"diloco.seats", *TYPES},
    "diloco.saves": {"diloco.saved_view", *TYPES},
    "diloco.seats": {"diloco.schedule", "diloco.waiting", *TYPES},
    "diloco.stopping": {"diloco.workload", *TYPES},
    "diloco.evaluations": {"diloco.records", "diloco.stopping", "diloco.tasks", *TYPES},
    "diloco.pushes": {"diloco.events", "diloco.messages"},
    "diloco.watch": {"diloco.records", *TYPES},
    "diloco.records": TYPES,
    "diloco.membership": {"diloco.pushes", "diloco.records", "diloco.seats", *TYPES},
    "diloco.patience": {"diloco.messages"},
    "diloco.garbage": set(),
    "diloco.versions": set(),
    "diloco.processes": set(),
    "diloco.jobs": {"diloco.config", "diloco.runtime.base"},
    "diloco.outer": {"diloco.messages"},
    "diloco.buffers": {"diloco.messages"},
    "diloco.sums": set(),
    "diloco.merge": {"diloco.buffers", "diloco.messages", "diloco.sums"},
    "diloco.soup": {"diloco.merge", "diloco.messages", "diloco.outer"},
    "diloco.placing": {"diloco.messages"},
    "diloco.layout": {"diloco.messages", "diloco.placing"},
    "diloco.blocks": {"diloco.messages"},
    "diloco.quantize": {"diloco.blocks", "diloco.buffers"},
    "diloco.sparse": {"diloco.blocks", "diloco.buffers"},
    "diloco.codec": {"diloco.blocks", "diloco.buffers", "diloco.messages", "diloco.quantize", "diloco.sparse"},
    "diloco.feedback": {"diloco.codec", "diloco.messages"},
    "diloco.schedule": {"diloco.messages", "diloco.patience", "diloco.progress", "diloco.views"},
    "diloco.coordinator": {
        "diloco.folding",
        "diloco.hearing",
        "diloco.membership",
        "diloco.schedule",
        "diloco.tasks",
        "diloco.records",
        "diloco.pushes",
        "diloco.saved_view",
        "diloco.evaluations",
        "diloco.saves",
        "diloco.seats",
        "diloco.waiting",
        "diloco.watch",
        *TYPES,
    },
    "diloco.inbox": {"diloco.codec", "diloco.merge", "diloco.messages"},
    "diloco.store": {
        "diloco.buffers",
        "diloco.inbox",
        "diloco.outer",
        "diloco.merge",
        "diloco.codec",
        "diloco.feedback",
        "diloco.messages",
    },
    "diloco.anchors": {"diloco.codec", "diloco.messages", "diloco.replica"},
    "diloco.island": {
        "diloco.stopping",
        "diloco.anchors",
        "diloco.replica",
        "diloco.feedback",
        "diloco.codec",
        "diloco.inner",
        "diloco.workload",
        "diloco.messages",
    },
    "diloco.workers": set(),
    "diloco.replica": {"diloco.feedback", "diloco.messages", "diloco.workers"},
    "diloco.fsdp2": {
        "diloco.buffers",
        "diloco.feedback",
        "diloco.replica",
        "diloco.layout",
        "diloco.messages",
        "diloco.workers",
    },
    "diloco.inner": {"diloco.messages"},
    "diloco.workload": {"diloco.messages"},
    **dict.fromkeys(sorted(DATA), DATA),
    "diloco.checkpoint": {"diloco.layout", "diloco.messages", "diloco.sharded", "diloco.workers"},
    "diloco.starting": {"diloco.checkpoint", "diloco.messages"},
    "diloco.sharded": {"diloco.checkpoint", "diloco.messages", "diloco.workers"},
    "diloco.beside": {"diloco.rundir"},
    "diloco.metrics": {
        *("diloco.beside", "diloco.display", "diloco.fleet", "diloco.formats", "diloco.messages"),
        "diloco.redaction",
    },
    "diloco.display": {"diloco.fleet", "diloco.formats", "diloco.outcome", "diloco.redaction"},
    "diloco.outcome": {"diloco.fleet", "diloco.formats"},
    "diloco.redaction": set(),
    "diloco.fleet": {"diloco.formats"},
    "diloco.formats": set(),
    "diloco.rundir": {"diloco.checkpoint", "diloco.config", "diloco.messages"},
    "diloco.resume": {
        *(
            "diloco.checkpoint",
            "diloco.config",
            "diloco.messages",
            "diloco.norms",
            "diloco.rundir",
            "diloco.seats",
            "diloco.views",
            "diloco.workload",
        ),
    },
    "diloco.interrupts": {"diloco.runtime.base"},
    "diloco.summary": {
        *("diloco.beside", "diloco.redaction", "diloco.runtime.base", "diloco.counters", "diloco.messages"),
    },
    "diloco.plan": {"diloco.messages"},
    "diloco.planner": {
        "diloco.codec",
        "diloco.config",
        "diloco.formats",
        "diloco.messages",
        "diloco.plan",
        "diloco.schedule",
    },
    "diloco.report*": {"diloco.formats", "diloco.rundir", "diloco.report*"},
    "diloco.workloads.*": {"diloco.garbage", "diloco.workload", "diloco.workloads*", "diloco.messages", *DATA},
    "diloco.runtime.reaper": set(),
    "diloco.runtime.spmd_start": {"diloco.workers"},
    "diloco.runtime.spmd_hub": {"diloco.runtime.spmd_start"},
    "diloco.runtime.spmd_exchange": {"diloco.runtime.spmd_start"},
    "diloco.runtime.spmd_orders": {"diloco.runtime.base", "diloco.events", "diloco.messages"},
    "diloco.runtime.spmd_save": {"diloco.checkpoint", "diloco.events"},
    "diloco.runtime.spmd_member": {"diloco.*", "!diloco.train", "!diloco.config", "!diloco.runtime.ray_*"},
    "diloco.runtime.spmd_serve": {"diloco.runtime.base", "diloco.runtime.spmd_*"},
    "diloco.runtime.spmd": {"diloco.*", "!diloco.train", "!diloco.config", "!diloco.runtime.ray_*"},
    "diloco.runtime.*": {"diloco.*", "!diloco.train", "!diloco.config", "!diloco.async_*"},
    "diloco.async_.config": {"diloco.config", "diloco.async_*"},
    "diloco.async_.outer": {"diloco.messages", "diloco.outer", "diloco.sums"},
    "diloco.async_*": {"diloco.outer", "diloco.schedule", "diloco.async_*", *TYPES},
    "diloco.registry": set(),
    "diloco.config": {"diloco.*", "!diloco.train", "!diloco.async_*"},
    "diloco.train": {"diloco.*", "!diloco.async_*"},
    "diloco": {"diloco.*", "!diloco.async_*"},
    "diloco.workloads": set(),
    "diloco.runtime": set(),
    "dipaco.saved": set(),
    "dipaco.features": {"dipaco.saved", "diloco.pretrained", "diloco.workloads.language"},
    "dipaco.router": {"dipaco.saved"},
    "dipaco.shards": {"dipaco.router", "dipaco.saved"},
    "dipaco.documents": {"dipaco.saved", "diloco.dealing", "diloco.tokens", "diloco.workloads.language"},
    "dipaco.routing": {"dipaco.features", "dipaco.router", "dipaco.saved", *DATA},
    "dipaco.reshard": {
        "diloco.workloads.language",
        "dipaco.documents",
        "dipaco.features",
        "dipaco.router",
        "dipaco.routing",
        "dipaco.saved",
        *DATA,
    },
    "dipaco.dealing": {"dipaco.reshard", "dipaco.router", "dipaco.routing", "dipaco.saved", "dipaco.shards", *DATA},
    "dipaco.specialities": {"dipaco.features", "dipaco.routing", "dipaco.saved", *DATA},
    "dipaco.corpus": {
        *("dipaco.dealing", "dipaco.documents", "dipaco.routing", "dipaco.saved", "dipaco.shards"),
        "dipaco.specialities",
        *DATA,
    },
    "dipaco.workload": {
        "diloco.messages",
        "diloco.workload",
        "diloco.workloads.causal_lm",
        "dipaco.corpus",
        "dipaco.documents",
        "dipaco.router",
        "dipaco.routing",
        "dipaco.saved",
        *DATA,
    },
    "dipaco.config": {"diloco.config", "dipaco.*"},
    "dipaco.paths": {"diloco.layout", "diloco.messages", "diloco.placing"},
    "dipaco.schedule": {"diloco.folding", "diloco.messages", "diloco.progress", "diloco.schedule", "diloco.views"},
    "dipaco.token_router": {
        *("diloco.workloads.language", "diloco.workloads.sampling", "dipaco.features", "dipaco.saved"),
        "diloco.pretrained",
    },
    "dipaco.finished": {
        *("diloco.config", "diloco.workloads.language", "dipaco.corpus", "dipaco.documents", "dipaco.saved"),
        *("diloco.pretrained", "dipaco.token_router", "dipaco.workload"),
    },
    "dipaco.evaluate": {
        *("dipaco.documents", "dipaco.finished", "dipaco.saved", "dipaco.shards", "dipaco.token_router"),
    },
    "dipaco.loaded": {
        *("diloco.workloads.language", "diloco.workloads.sampling", "dipaco.routing", "dipaco.saved"),
        *("diloco.pretrained", "dipaco.token_router"),
    },
    "dipaco": {"dipaco.config", "dipaco.loaded"},
    "experiments*": {"diloco*", "dipaco*", "experiments*"},
}
# Names that only annotations need, under `if TYPE_CHECKING`, from where the table allows no import.
ONLY_FOR_TYPES: dict[str, set[str]] = {
    "diloco.workload": {"diloco.data"},
    "diloco.runtime.*": {"diloco.config"},
}


@dataclass(frozen=True)
class Library:
    """Where a library outside may be imported."""

    name: str
    modules: tuple[str, ...]  # patterns of our modules
    inside_functions: bool = False  # importing it takes seconds: not at the top of a module


LIBRARIES = (
    Library("ray", ("diloco.runtime.ray_*", "experiments.cli", "experiments.nodes", "experiments.benchmarks.*")),
    Library("hydra", ("experiments*", "*.config", "diloco.registry")),
    Library(
        "torch.distributed",
        (
            "diloco.replica",
            "diloco.fsdp2",
            "diloco.workers",
            "diloco.runtime.spmd",
            "diloco.runtime.spmd_start",
            "diloco.checkpoint",
            "diloco.sharded",
            "experiments.benchmarks.peers",
        ),
    ),
    Library("torchft", ("experiments.benchmarks.peers",), inside_functions=True),
    Library(
        "transformers",
        (
            *("diloco.workloads.*", *sorted(DATA)),
            *("dipaco.features", "dipaco.finished", "dipaco.loaded", "dipaco.specialities", "dipaco.token_router"),
        ),
        inside_functions=True,
    ),
    Library("sklearn", ("dipaco.features", "dipaco.router"), inside_functions=True),
    Library("scipy", ("dipaco.features",), inside_functions=True),
    Library("rich", ("diloco.display", "diloco.fleet", "diloco.outcome", "experiments*"), inside_functions=True),
    Library("matplotlib", ("diloco.report.*",), inside_functions=True),
    Library("wandb", ("diloco.metrics",), inside_functions=True),
)
# Records and decisions are tested by events alone, without tensors, processes or a clock.
PURE = (
    *sorted(TYPES),
    *("diloco.saved_view", "diloco.saves", "diloco.pushes", "diloco.watch", "diloco.schedule", "diloco.coordinator"),
    *("diloco.hearing", "diloco.norms", "diloco.plan"),
)
IMPURE = ("torch", "ray", "time", "datetime", "threading", "asyncio", "os", "secrets")


@dataclass(frozen=True)
class Import:
    """One imported name in full: `torch.nn.Module` for `from torch.nn import Module`."""

    name: str
    line: int
    in_function: bool
    for_types: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


class Finder(ast.NodeVisitor):
    """Collects the imports of one module, and `torch.distributed` used through `import torch`."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.found: list[Import] = []
        self._package = module.split(".") if is_package else module.split(".")[:-1]
        self._functions = 0
        self._type_checking = 0

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        self._type_checking += types
        for statement in node.body:
            self.visit(statement)
        self._type_checking -= types
        for rest in (node.test, *node.orelse):
            self.visit(rest)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self._package[: len(self._package) - node.level + 1] if node.level else []
        base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node.lineno)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "distributed"):
            self._add("torch.distributed", node.lineno)
        self.generic_visit(node)

    def _add(self, name: str, line: int) -> None:
        self.found.append(Import(name, line, self._functions > 0, self._type_checking > 0))


def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    finder = Finder(module, path.name == "__init__.py")
    finder.visit(ast.parse(path.read_text(encoding="utf-8")))
    return finder.found


def ours(name: str) -> str | None:
    """The module of ours that `name` is in, or None."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def row_of(module: str) -> set[str] | None:
    return next((row for pattern, row in MAY_IMPORT.items() if fnmatchcase(module, pattern)), None)


def allowed(target: str, row: set[str]) -> bool:
    denied = any(fnmatchcase(target, pattern[1:]) for pattern in row if pattern.startswith("!"))
    return not denied and any(fnmatchcase(target, pattern) for pattern in row)


def is_from(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_ours_point_the_right_way(module: str) -> None:
    row = row_of(module)
    assert row is not None, f"{module} has no row in MAY_IMPORT: add one"
    for imported in imports_of(module):
        target = ours(imported.name)
        if target is None or target == module:
            continue
        types = [ok for pattern, ok in ONLY_FOR_TYPES.items() if fnmatchcase(module, pattern)]
        fine = allowed(target, row) or (imported.for_types and any(target in ok for ok in types))
        assert fine, f"{module}:{imported.line} may not import {target}, only {sorted(row) or 'none of ours'}"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_libraries_are_imported_only_where_they_belong(library: Library) -> None:
    for module in MODULES:
        for imported in imports_of(module):
            if not is_from(imported.name, library.name) or imported.for_types:
                continue
            place = f"{module}:{imported.line} imports {imported.name}"
            assert any(fnmatchcase(module, pattern) for pattern in library.modules), (
                f"{place}: that belongs in {', '.join(library.modules)}"
            )
            assert imported.in_function or not library.inside_functions, f"{place}: do it inside a function"


@pytest.mark.parametrize("module", [module for module in PURE if module in MODULES])
def test_decisions_need_no_tensors_processes_or_clock(module: str) -> None:
    for imported in imports_of(module):
        bad = [library for library in IMPURE if is_from(imported.name, library) and not imported.for_types]
        assert not bad, f"{module}:{imported.line} imports {imported.name}"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {folder for path in MODULES.values() for folder in path.parents if folder.is_relative_to(ROOT)}
    lacking = [folder for folder in folders - {ROOT} if not (folder / "__init__.py").exists()]
    code = [folder for folder in lacking if "records" not in folder.parts]  # those are data and their scripts
    assert not code, f"without __init__.py the wheel leaves them out: {code}"


def test_the_finder_sees_every_spelling() -> None:
    source = (
        "import torch.distributed as dist\nfrom torch import distributed\nx = torch.distributed.ReduceOp\n"
        "from . import messages\nfrom .runtime import base\n"
        "if TYPE_CHECKING:\n    import ray\nelse:\n    import hydra\n"
        "async def f():\n    import transformers\n"
    )
    finder = Finder("diloco.island", is_package=False)
    finder.visit(ast.parse(source))
    assert [found.name for found in finder.found] == [
        *["torch.distributed"] * 3,
        "diloco.messages",
        "diloco.runtime.base",
        "ray",
        "hydra",
        "transformers",
    ]
    assert [found.for_types for found in finder.found] == [False] * 5 + [True, False, False]
    assert [found.in_function for found in finder.found] == [False] * 7 + [True]
