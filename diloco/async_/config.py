"""Registration of this package's parts."""

from __future__ import annotations

from diloco import config as configuration
from diloco.async_.schedule import FirstCome

configuration.register(group="schedule", name="first_come", node=FirstCome)
