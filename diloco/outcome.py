"""What a run came to, as people see it at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diloco.fleet import amount, number
from diloco.formats import format_bytes, format_count, format_duration, format_loss, format_perplexity, format_reasons

if TYPE_CHECKING:
    from rich.table import Table

MOST_PATHS = 8  # that are named in a line


def summary_table(summary: Mapping[str, object]) -> Table:
    """What a run came to: keys of summary.json, and the paths `run_directory`, `checkpoint` and `export`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in summary_rows(summary):
        table.add_row(name, Text(text))  # Text: a path may hold what rich would take for markup
    return table


def summary_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """The same as pairs of plain texts: what it is, what it came to."""
    status = [str(summary[key]) for key in ("status", "reason") if summary.get(key)]
    rows = [(str(summary.get("name", "run")), ": ".join(status))]
    before, after = number(summary, "initial_val_loss"), number(summary, "val_loss")
    if after is not None:
        rows.append(("validation loss", f"{format_loss(before)} before, {format_loss(after)} after"))
    if after is not None and summary.get("perplexity", after) is not None:
        rows.append(("perplexity", f"{format_perplexity(before)} before, {format_perplexity(after)} after"))
    if number(summary, "reward_after") is not None:
        first, newest, moved = (format_loss(number(summary, key)) for key in ("reward_before", "reward_after", "kl"))
        rows.append(("reward", f"{first} before, {newest} after; {moved} nats from the reference"))
    if number(summary, "paths"):
        routed, dense = (format_loss(number(summary, f"{kind}_val_loss")) for kind in ("routed", "dense"))
        rows.append((f"{summary['paths']} paths", f"{routed} routed" + (f", {dense} dense" if dense != "-" else "")))
        rows += _early_stopping(summary)
    wall = format_duration(amount(summary, "wall_s"))
    speed = f"{format_count(amount(summary, 'tokens_per_s'))} a second"
    rows += [("tokens", f"{format_count(amount(summary, 'tokens'))}, {speed}"), ("wall time", wall)]
    sent, inside = amount(summary, "bytes_sent"), amount(summary, "bytes_inside")
    told, within = format_bytes(sent), format_bytes(inside)
    if inside > 0:
        lone = summary.get("islands") == 1
        told = f"{told}, of which {within} between workers" if lone else f"{told} between islands; {within} within them"
    rows.append(("bytes sent", told))
    parallel = amount(summary, "bytes_data_parallel")
    if sent > 0 and parallel > 0:
        more = f"{sent / parallel:.3g} times more than" if sent > parallel else f"{parallel / sent:.3g} times less than"
        more = "as much as" if sent == parallel else more
        rows.append(("", f"{more} data parallel would have sent ({format_bytes(parallel)})"))
    if rejected := format_reasons(summary.get("rejected_by_reason")):
        rows.append(("rejected contributions", rejected))
    paths = {"run directory": "run_directory", "checkpoint": "checkpoint", "exported model": "export"}
    return rows + [(name, str(summary[key])) for name, key in paths.items() if summary.get(key)]


def _early_stopping(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    """Which paths count as they were before the last round; nothing without early stopping."""
    best = summary.get("best_rounds")
    if not isinstance(best, Mapping):
        return []
    early = [f"path {path} after round {round_}" for path, round_ in best.items() if round_ != summary["rounds"]]
    more = f", and {len(early) - MOST_PATHS} more" if len(early) > MOST_PATHS else ""
    return [("stopped early", ", ".join(early[:MOST_PATHS]) + more or "no path")]
