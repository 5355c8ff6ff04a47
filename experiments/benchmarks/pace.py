"""Two sides that take turns, each in processes of its own, and the times at which their steps began.

A member of a side (an island, a replica, a plain loop) calls `Pace.step` before every step. That notes the time in
the member's file; at the first step of a block it also waits until the side has its turn. All see one clock:
CLOCK_MONOTONIC is the same for all processes of a machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import common

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300.0  # from the start of a process to its first step
BLOCK_LIMIT_S = 600.0
POLL_S = 0.005


def search_path() -> str:
    """PYTHONPATH of processes that are to find this repository before anything else."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def environment_alone() -> dict[str, str]:
    """That of processes which find this repository, and no Ray cluster that is running already."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**own, "PYTHONPATH": search_path()}


@dataclass(kw_only=True)
class Pace:
    """What a member keeps; made in its process."""

    folder: str
    side: str
    block_steps: int

    def __post_init__(self) -> None:
        self._files: dict[int, int] = {}  # member -> file descriptor

    def step(self, member: int, step: int) -> None:
        """The member's step `step` (0-based) is about to begin.

        On a GPU, what came before is waited for at a block's first and last step, between which times are taken.
        """
        edge = step % self.block_steps in (0, self.block_steps - 1)
        self._note(member, "asked", step, gpu_bytes=_gpu_bytes() if edge and _on_gpu() else 0)
        if step % self.block_steps == 0:
            turn = _turn(self.folder, self.side, step // self.block_steps)
            while not turn.exists():
                time.sleep(POLL_S)
            self._note(member, "began", step)

    def _note(self, member: int, what: str, step: int, *, gpu_bytes: int = 0) -> None:
        if member not in self._files:
            path = Path(self.folder) / f"{self.side}-{member}-{os.getpid()}.txt"
            self._files[member] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        line = f"{what} {step} {time.monotonic()} {time.process_time()} {gpu_bytes}\n"
        os.write(self._files[member], line.encode())


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """When a step was asked for, or when it began after the wait for its turn."""

    monotonic_s: float
    cpu_s: float  # of the member's process since its start
    gpu_bytes: int  # at a block's first and last step: the most that tensors took since the one before


@dataclass(kw_only=True)
class Steps:
    """What one member noted."""

    pid: int
    asked: dict[int, Stamp] = field(default_factory=dict)
    began: dict[int, Stamp] = field(default_factory=dict)  # first steps of blocks only

    def start(self, step: int) -> Stamp:
        """When the step began."""
        return self.began.get(step, self.asked[step])


class Side:
    """A program whose members take part; its output goes to a file. Made once all wait for their first turn."""

    def __init__(
        self, command: Sequence[str], *, folder: Path, side: str, members: int, environment: Mapping[str, str]
    ) -> None:
        self.folder, self.side, self.members = folder, side, members
        self._log = folder / f"{side}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=folder,  # where a run leaves its directory
                env={**os.environ, "PYTHONPATH": search_path(), **environment},
                start_new_session=True,
            )
        try:  # one side after the other, or Ray may find the machine too busy to start on
            self.wait_for(0, limit_s=START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def give_turn(self, block: int) -> None:
        """Let the members begin this block."""
        _turn(str(self.folder), self.side, block).touch()

    def wait_for(self, step: int, *, limit_s: float) -> None:
        """Until all members ask for this step. Raises RuntimeError where the program ends before."""

        def there() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.side} ended early: {self._last_words()}")
            found = self.steps()
            return len(found) == self.members and all(step in member.asked for member in found.values())

        common.wait_until(there, limit_s=limit_s, what=f"{self.side}: step {step}")

    def steps(self) -> dict[int, Steps]:
        """What the members have noted so far."""
        found: dict[int, Steps] = {}
        for path in sorted(self.folder.glob(f"{self.side}-*.txt")):
            _, member, pid = path.stem.rsplit("-", 2)
            steps = found.setdefault(int(member), Steps(pid=int(pid)))
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    what, step, monotonic_s, cpu_s, gpu_bytes = line.split()
                    noted = steps.asked if what == "asked" else steps.began
                    stamp = Stamp(monotonic_s=float(monotonic_s), cpu_s=float(cpu_s), gpu_bytes=int(gpu_bytes))
                    noted[int(step)] = stamp
        return found

    def block_s(self, block: int, block_steps: int) -> float:
        """From the beginning of a block's first step to that of its last, for the slowest member."""
        first, last = block * block_steps, (block + 1) * block_steps - 1
        return max(found.start(last).monotonic_s - found.start(first).monotonic_s for found in self.steps().values())

    def join(self, limit_s: float = 120.0) -> None:
        """Wait for the program's end. Raises RuntimeError where it failed."""
        if self._process.wait(limit_s) != 0:
            raise RuntimeError(f"{self.side} failed: {self._last_words()}")

    def close(self) -> None:
        """End what is left of it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # a group of its own, made in __init__
            self._process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or f"exit status {self._process.returncode}"


def alternate(sides: Sequence[Side], *, blocks: int, block_steps: int) -> None:
    """Give each side its turn for block 0, then for block 1 and so on; at last let all of them run to their ends."""
    for block in range(blocks):
        for side in sides:
            side.give_turn(block)
            side.wait_for((block + 1) * block_steps, limit_s=BLOCK_LIMIT_S)
        took = ", ".join(f"{side.side} {side.block_s(block, block_steps):.3g} s" for side in sides)
        common.show(f"block {block + 1} of {blocks} is done: {took}")
    for side in sides:
        side.give_turn(blocks)


def training(overrides: Mapping[str, Any], *, workload: str) -> list[str]:
    """The command of a run of the real system, with one of the workloads of `paced`."""
    from sys import executable

    command = [executable, "-m", "experiments.train", "--import", "experiments.benchmarks.paced"]
    fixed = {"workload": workload, "metrics.live": "false", "eval_every": 0, "checkpoint.every": 0}
    return [*command, *(f"{key}={value}" for key, value in {**fixed, **overrides}.items())]


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _gpu_bytes() -> int:
    """Wait for the GPU; the most that its tensors took since the last call."""
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def _turn(folder: str, side: str, block: int) -> Path:
    return Path(folder) / f"{side}.turn{block}"
