"""The islands of a run as the display shows them: how fast each is, how far, how stale, and what it does now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from diloco.formats import format_count, format_loss

if TYPE_CHECKING:
    from rich.table import Table

Record: TypeAlias = Mapping[str, object]  # of metrics.jsonl: see diloco/metrics.py

STATES = {"lost": "[red]lost[/]", "joined": "[yellow]starting[/]", "end": "[dim]done[/]"}
TRAINING, WAITING = "[green]training[/]", "[yellow]waiting[/]"


class Fleet:
    """What was said of each island."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, object]] = {}  # island -> its newest segment, and what befell it
        self._steps: Counter[int] = Counter()  # finished, by island
        self._busy: Callable[[], Mapping[int, bool]] = dict
        self._stale = False  # whether there is staleness to be told

    def watch(self, busy: Callable[[], Mapping[int, bool]]) -> None:
        """`busy` tells of each living island whether it has a task now."""
        self._busy = busy

    def take(self, record: Record) -> None:
        """One record of metrics.jsonl."""
        match record["event"]:
            case "segment":
                self._row(record).update(record)
                self._count(record)
            case "commit":
                self._committed(record)
            case "stale":
                self._row(record)["stale"] = f"[red]{amount(record, 'staleness'):.0f}, refused[/]"
                self._stale = True
            case "lost" | "joined" as event:
                self._row(record)["event"] = event
            case "end":
                for row in self._rows.values():
                    row["event"] = "lost" if row.get("event") == "lost" else "end"

    def recall(self, record: Record) -> None:
        """Count the steps of what a resumed run's metrics.jsonl tells already."""
        if record["event"] == "segment":
            self._count(record)

    @property
    def mean_loss(self) -> float | None:
        """Of the islands that are not lost."""
        rows = [row for row in self._rows.values() if row.get("event") != "lost"]
        known = [loss for loss in (number(row, "inner/loss") for row in rows) if loss is not None]
        return sum(known) / len(known) if known else None

    @property
    def tokens_per_s(self) -> float:
        """In sum, while they train."""
        return sum(amount(row, "inner/tokens_per_s") for row in self._rows.values())

    def table(self, most: int) -> Table:
        """A row for each island, of at most so many."""
        columns = ["island", "round", "steps", "loss", "tokens/s", "waited", *(["staleness"] if self._stale else [])]
        table = plain_table(*columns, "state")
        busy = self._busy()
        islands = sorted({*self._rows, *busy})
        for island in islands[:most]:
            row = self._rows.get(island, {})
            speed, waited = number(row, "inner/tokens_per_s"), number(row, "comm/seconds_waiting")
            table.add_row(
                str(island),
                f"{amount(row, 'round') + 1:.0f}",
                str(self._steps[island]),
                format_loss(number(row, "inner/loss")),
                "-" if speed is None else format_count(speed),
                "-" if waited is None else f"{waited:.1f} s",
                *([str(row.get("stale", "-"))] if self._stale else []),
                STATES.get(str(row.get("event")), TRAINING if busy.get(island, True) else WAITING),
            )
        if len(islands) > most:
            table.add_row(*[""] * len(columns), f"and {len(islands) - most} more")
        return table

    def _row(self, record: Record) -> dict[str, object]:
        return self._rows.setdefault(int(amount(record, "island")), {})

    def _count(self, record: Record) -> None:
        self._steps[int(amount(record, "island"))] += int(amount(record, "steps"))

    def _committed(self, record: Record) -> None:
        sources, staleness = record.get("outer/contributors"), record.get("outer/stalenesses")
        if isinstance(sources, list) and isinstance(staleness, list):  # source i is island i
            for island, versions in zip(sources, staleness, strict=True):
                if island in self._rows:  # of paths there may be more than islands
                    self._rows[island]["stale"] = versions
                self._stale = self._stale or versions > 0


def number(record: Record, key: str) -> float | None:
    """A record's number, if it has one there."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else None


def amount(record: Record, key: str) -> float:
    """A record's number, or 0."""
    return number(record, key) or 0.0


def plain_table(*names: str) -> Table:
    """An empty one, without edges; numbers to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 2, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    return table
