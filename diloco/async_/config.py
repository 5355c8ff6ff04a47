"""The names by which Hydra and a run's `config.yaml` know the asynchronous parts."""

from __future__ import annotations

from diloco.async_.outer import DelayedNesterov, HeLoCo
from diloco.async_.quorum import Quorum
from diloco.async_.schedule import FirstCome
from diloco.config import register

register(group="outer", name="delayed_nesterov", node=DelayedNesterov)
register(group="outer", name="heloco", node=HeLoCo)
register(group="schedule", name="first_come", node=FirstCome)
register(group="schedule", name="quorum", node=Quorum)
