"""The processes of a run that live now: whom `diloco chaos` may act on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diloco.processes import born
from experiments import aftermath

RAY = "ray::"  # how Ray's worker processes call themselves


class Process(NamedTuple):
    """A process of the run, as its metrics tell it."""

    kind: str
    number: int
    rank: int
    pid: int
    raylet: int
    born: int  # see diloco/processes.py


class Cast:
    """The processes of a run that live now."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def living(self, kind_wanted: str) -> list[Process]:
        """Those of a kind: island, shard, evaluator or driver. In order."""
        told = sorted(aftermath.processes(self._run).items())
        there = [
            Process(kind=kind, number=number, rank=rank, pid=each["pid"], raylet=each["raylet"], born=each["born"])
            for (kind, number, rank), each in told
        ]
        return [process for process in there if process.kind == kind_wanted and _is_it(process)]


def _is_it(process: Process) -> bool:
    """Whether that number still belongs to the process of the run, on this machine."""
    with suppress(OSError):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        own = command.startswith(RAY.encode()) if process.kind != "driver" else bool(command)
        return own and born(process.pid) == process.born
    return False
