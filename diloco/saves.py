"""Which checkpoint is being written, and which waits for it: one at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from diloco import saved_view
from diloco.counters import Counters
from diloco.events import Save
from diloco.views import RunView


class Drain(Enum):
    """How far an interruption has come."""

    no = "no"
    tasks = "tasks"  # no new work; what was given out is finished
    export = "export"  # islands copy what belongs to their sources
    save = "save"  # the checkpoint is written


class Saves:
    """Checkpoints of one run. One that waits holds up all commits and new work, so that the store stays what it was."""

    def __init__(self) -> None:
        self.writing = False
        self.round = 0  # rounds in the checkpoint being written
        self.held: Save | None = None
        self.pausing = False  # sources that run free stop for a checkpoint, and go on after it

    def __bool__(self) -> bool:
        return self.writing or self.held is not None

    def at_round_end(self, run: RunView) -> list[Save]:
        """A checkpoint of this moment, if one is due; asked before work is given out that is not in it."""
        due = run.save_due(run.round)
        view = saved_view.at_round_end(run) if due else {}
        run.ahead = Counters()
        if not due:
            return []
        name = f"round-{run.round:06d}"
        if self.writing:
            self.held = Save(name=name, view=view)
            return []
        return [self.begin(run, name, view)]

    def begin(self, run: RunView, name: str, view: Mapping[str, Any]) -> Save:
        """Write one now."""
        self.writing, self.round = True, run.round
        return Save(name=name, view=view)

    def written(self, run: RunView) -> Save | None:
        """The last one is complete, or was given up. Returns the one that waited."""
        self.writing = False
        held, self.held = self.held, None
        return None if held is None else self.begin(run, held.name, held.view)
