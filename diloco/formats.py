"""How figures read, in the display, in plans and in reports: counts, bytes, durations, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping


def format_bytes(nbytes: float) -> str:
    """Three digits and a decimal unit: 10.4 MB."""
    count = format_count(nbytes)
    return f"{count}B" if " " in count else f"{count} B"


def format_count(count: float) -> str:
    """Three digits and a decimal prefix, which the unit may follow: 999, 12.3 k, 1.20 M."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(count) >= 999.5 and len(prefixes) > 1:
        count /= 1000
        prefixes.pop(0)
    digits = 0 if not prefixes[0] or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {prefixes[0]}".rstrip()


def format_duration(seconds: float | None) -> str:
    """Hours where there are any, minutes and seconds: 0:43, 1:02:03; a question mark for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def format_loss(loss: float | None) -> str:
    """To three places."""
    return "-" if loss is None else f"{loss:.3f}"


def format_reasons(counts: object) -> str:
    """How many of each, as `rejected_by_reason` in summary.json has them: 3 not finite, 1 zombie. Empty without any."""
    found = counts if isinstance(counts, Mapping) else {}
    return ", ".join(f"{count} {str(reason).replace('_', ' ')}" for reason, count in found.items() if count)


def format_perplexity(loss: float | None) -> str:
    """Of a loss in nats a token."""
    return "-" if loss is None else f"{math.exp(min(loss, 700.0)):,.1f}"
