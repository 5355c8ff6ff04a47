"""What the kernel tells of a process."""

from __future__ import annotations

from pathlib import Path

STARTTIME = 19  # place of that field after the command's name in /proc/PID/stat: see proc(5)


def born(pid: int) -> int:
    """When it was started, in the kernel's ticks: another process with this number was started at another time.

    Raises OSError where there is none, or no /proc.
    """
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[STARTTIME])
