"""Ends what a Ray that was started by a driver leaves behind when the driver is killed. Runs as a process of its own.

Ray's processes see by themselves that their driver is gone, but some that were just starting only after a minute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "DILOCO_DRIVER"  # in the environment of all that a driver starts
GRACE_S = 5.0  # for Ray to end by itself
QUIET_S = 5.0  # processes that are still being started appear for some seconds


_running: list[subprocess.Popen[bytes]] = []  # none or one


def watch(ray_folder: str) -> None:
    """Mark this process and what it starts from now on, and start the reaper. `ray_folder`: where Ray is installed."""
    if not _running:
        os.environ[MARK] = mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        # It reads a pipe of which only this process has the other end, and hears no Ctrl-C of the terminal.
        command = [sys.executable, "-S", __file__, mark, ray_folder]
        _running.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


def release() -> None:
    """Ray was shut down: nothing is left to be ended."""
    while _running:
        _running.pop().communicate(b"done")


def marked(mark: str, ray_folder: str) -> list[int]:
    """Ray's processes with this mark, or that have logs of its driver's session open: its programs and its workers.

    Ray's agents write their title over the start of their environment, where the mark may be.
    """
    found = []
    session = f"_{mark.partition('-')[0]}/logs/"  # Ray ends a session's name with the driver's process number
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone, or somebody else's
            command = (folder / "cmdline").read_bytes()
            if command.startswith(b"ray::") or f"{ray_folder}/".encode() in command:
                environment = (folder / "environ").read_bytes().split(b"\0")
                if f"{MARK}={mark}".encode() in environment or any(session in path for path in _open_files(folder)):
                    found.append(int(folder.name))
    return found


def _open_files(folder: Path) -> Iterator[str]:
    """What a process has open; its output may be a pipe that leads to a log."""
    for link in (folder / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            yield os.readlink(link)


def main(mark: str, ray_folder: str) -> None:
    """Wait for the driver's end, and then for that of its Ray."""
    if sys.stdin.buffer.read():
        return
    time.sleep(GRACE_S)
    seen_s = time.monotonic()
    while time.monotonic() - seen_s < QUIET_S:
        for process in marked(mark, ray_folder):
            seen_s = time.monotonic()
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
