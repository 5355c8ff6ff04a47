"""The names by which Hydra and a run's `config.yaml` know the parts of DiPaCo."""

from __future__ import annotations

from diloco.config import register
from dipaco.workload import RoutedLM

register(group="workload", name="routed_lm", node=RoutedLM)
