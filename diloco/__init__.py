"""Training language models on islands of workers that are far apart, unequal and unreliable."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diloco.config import RunConfig as RunConfig
    from diloco.train import Result as Result
    from diloco.train import train as train


class _Package(ModuleType):
    """Imports torch and Ray, which take seconds, only when one of these names is asked for."""

    @property
    def RunConfig(self) -> Any:
        """A run's configuration, one field a group."""
        from diloco.config import RunConfig

        return RunConfig

    @property
    def Result(self) -> Any:
        """What a run came to."""
        from diloco.train import Result

        return Result

    @property
    def train(self) -> Any:
        """Run a configuration to its end."""
        from diloco.train import train

        return train

    @train.setter
    def train(self, module: ModuleType) -> None:
        """`diloco.train` stays the function when the module of that name is imported."""


sys.modules[__name__].__class__ = _Package
