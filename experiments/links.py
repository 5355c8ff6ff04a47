"""What a far link asks of a machine: buffers of TCP that hold twice what is under way on it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

Buffers: TypeAlias = dict[str, list[int]]  # kernel setting -> its numbers, of which the last is the most

ASSUMED_GBITS = 1.0  # of a link that nothing is said of
OVERHEAD = 2  # the kernel keeps half of a buffer for its own records
LIMITS = ("net.core.rmem_max", "net.core.wmem_max", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem")


def seconds(text: str) -> float:
    """Seconds of `80ms` or `0.08s`, for argparse."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(ms|s)", text.strip().lower())
    if not found or not math.isfinite(float(found[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is no time with its unit; give one such as 80ms or 0.08s")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def read_buffers(root: Path = Path("/proc/sys")) -> Buffers:
    """The settings of this machine; none where the system has no such files."""
    found = {}
    for name in LIMITS:
        try:
            found[name] = [int(part) for part in (root / name.replace(".", "/")).read_text().split()]
        except (OSError, ValueError):
            continue
    return found


def wanted_bytes(gbits: float, rtt_s: float) -> int:
    """What a buffer must be allowed to hold for one stream to fill a link of this bandwidth and round trip."""
    return math.ceil(OVERHEAD * gbits * 1e9 / 8 * rtt_s)


def too_small(buffers: Mapping[str, list[int]], wanted: int) -> Buffers:
    """Those whose most is less."""
    return {name: numbers for name, numbers in buffers.items() if numbers and numbers[-1] < wanted}


def sysctl(small: Mapping[str, list[int]], wanted: int) -> str:
    """The command that makes them large enough: the next power of two."""
    size = 1 << (wanted - 1).bit_length()
    settings = [f"{name}={' '.join(map(str, [*numbers[:-1], size]))}" for name, numbers in small.items()]
    return "sysctl -w " + " ".join(f"'{setting}'" if " " in setting else setting for setting in settings)


def told(gbits: float, rtt_s: float) -> str:
    """The link in words."""
    bandwidth = f"{gbits:g} Gbit/s" if gbits >= 1 else f"{gbits * 1e3:g} Mbit/s"
    return f"{bandwidth} over a round trip of {rtt_s * 1e3:.3g} ms"
