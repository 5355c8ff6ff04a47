"""Lighter workers: an optimizer loads torch's compiler, a third of a process's start, though no toy is compiled."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


class Later(ModuleType):
    """In the compiler's place, with what an optimizer asks of it; what else is asked for is the compiler's own."""

    @staticmethod
    def graph_break() -> None:
        """Nothing is being compiled."""

    @staticmethod
    def disable(function: Callable[..., Any], recursive: bool, *, wrapping: bool) -> Callable[..., Any]:
        """Nor is this."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # who looks through all modules wants none to load
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def lighten() -> None:
    """In a worker, but not where the tests themselves run."""
    if "pytest" not in sys.modules:
        sys.modules.setdefault(COMPILER, Later(COMPILER))
