"""What the benchmarks share: options, progress, the line with the figures, and how a process is measured.

Everything is told on stdout: lines of progress first, then one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diloco import rundir
from experiments.entry import MISTAKE, Parser

PARTS_OF_USS = ("Private_Clean:", "Private_Dirty:")


def parser(name: str, description: str) -> Parser:
    """Options of one benchmark; all have `--quick`."""
    found = Parser(prog=f"python -m experiments.benchmarks.{name}", description=description, allow_abbrev=False)
    found.add_argument("--quick", action="store_true", help="the smallest sizes: does it work? Its figures say nothing")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1, as an option's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def several(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas, as an option's type."""
    return [positive(part) for part in text.split(",")]


def run(measure: Callable[[], dict[str, Any]]) -> int:
    """Measure, print the figures as the last line, and return the exit status: 2 for a ValueError, in one line."""
    try:
        figures = measure()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    sys.stdout.flush()
    print(json.dumps(figures), flush=True)
    return 0


def show(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def median(values: Sequence[float], *, digits: int = 6) -> float:
    """The median to so many significant digits."""
    return rounded(statistics.median(values), digits=digits)


def rounded(value: float, *, digits: int = 6) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used in all its threads, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def uss_bytes(pid: int) -> int:
    """Memory that a process shares with nobody, Ray's object store and libraries' code left out."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(PARTS_OF_USS))


def wait_until(condition: Callable[[], bool], *, limit_s: float, what: str) -> None:
    """Look again and again. Raises RuntimeError where it takes too long."""
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise RuntimeError(f"{what} did not happen within {limit_s:.0f} s")
        time.sleep(0.01)


def environment() -> dict[str, object]:
    """Versions and the machine, for a record."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        **rundir.environment(),
        "platform": platform.platform(),
        "cpu": cpu[0].partition(": ")[2],
        "cores": len(cpu),
    }
