"""`--restarts N`: the command that trains runs in a process of its own, and goes on with its run when that is killed.

Another process, because what kills a run (no memory, an operator, the node's Ray) leaves nothing of it to go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from experiments.entry import DIRECTORY_TOLD, INTERRUPTED, STARTED_AGAIN, concluded_ns

SAID = (0, 2, 3, INTERRUPTED)  # exit statuses by which a run says how it ended


def watch(command: Sequence[str], restarts: int) -> int:
    """Run `python -m experiments.train COMMAND`, and again up to `restarts` times when it is killed."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "directory"
        arguments = list(command)
        for left in reversed(range(restarts + 1)):
            known = {STARTED_AGAIN: "1"} if left < restarts else {}
            status, asked = _run(arguments, {DIRECTORY_TOLD: str(told), **known})
            killed = _killed(status, told)
            arguments = _going_on(arguments, told) if killed else arguments
            if killed and not asked:
                again = f"starting it again, {left - 1} more time(s)" if left else _given_up(arguments)
                text = f"warning: the run's process was killed (exit status {status}); {again}"
                print(text, file=sys.stderr, flush=True)
            if asked or left == 0 or not killed:
                return status if status >= 0 else 128 - status
    raise AssertionError("the last time returns")


def _run(arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[int, bool]:
    """Its exit status, and whether somebody asked for the end."""
    command = [sys.executable, "-m", "experiments.train", *arguments]
    with subprocess.Popen(command, env={**os.environ, **variables}) as child, _passed_on(child) as asked:
        return child.wait(), bool(asked)


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """A signal that asks for the end is for the child. Ctrl-C reaches it by itself, since it has the same terminal."""
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _killed(status: int, told: Path) -> bool:
    """By a signal; or without a word, as when the node's Ray ends and takes its processes along."""
    if status < 0:
        return True
    return status not in SAID and told.is_file() and concluded_ns(Path(told.read_text())) < told.stat().st_mtime_ns


def _given_up(arguments: Sequence[str]) -> str:
    resume = [each for each in arguments if each.startswith("resume=")]
    return f"no more restarts; go on with: diloco train {resume[0]}" if resume else "no more restarts"


def _going_on(arguments: Sequence[str], told: Path) -> list[str]:
    """The same command for the same run, where that has a checkpoint; else for a new one."""
    if not told.is_file():
        return list(arguments)
    from diloco.checkpoint import CheckpointFolder
    from diloco.config import load
    from diloco.resume import checkpoint_root

    directory = Path(told.read_text())
    with suppress(ValueError):  # killed before its configuration was written
        if CheckpointFolder(checkpoint_root(load(directory / "config.yaml"), directory)).names():
            return [*(each for each in arguments if not each.startswith("resume=")), f"resume={directory}"]
    return list(arguments)
