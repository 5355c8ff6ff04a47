"""The names by which Hydra and a run's `config.yaml` know DiPaCo's parts."""

from __future__ import annotations

from diloco.config import register
from dipaco.paths import Paths
from dipaco.schedule import PathFirstCome, PathRounds
from dipaco.workload import RoutedLM

register(group="layout", name="paths", node=Paths)
register(group="schedule", name="path_rounds", node=PathRounds)
register(group="schedule", name="path_first_come", node=PathFirstCome)
register(group="workload", name="routed_lm", node=RoutedLM)
