"""Several runs one after the other in one directory, with `sweep.csv` and a table of what came out.

They are the combinations of a sweep, or the named members of an experiment.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from diloco import rundir
from diloco.formats import format_bytes, format_count, format_duration
from experiments.composition import Member
from experiments.entry import FAILED, FINISHED, INTERRUPTED, attempt
from experiments.mistakes import Mistake, first_lines

if TYPE_CHECKING:
    from rich.table import Table

Row: TypeAlias = dict[str, object]  # a line of sweep.csv

FILE = "sweep.csv"
FIGURES = ("val loss", "", "perplexity", "tokens", "tokens/s", "sent", "time")  # columns of the table
MOST_CHARACTERS = 120  # of a member's folder, and of a reason in the table
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # in what Ray raises


def run_sweep(members: Sequence[Member]) -> int:
    """Run all members, also after one that fails; an interruption ends it all. Returns the exit status."""
    directory = rundir.new_directory(members[0].config.name)
    directory.mkdir(parents=True)
    rundir.point_latest(directory)
    rows: list[Row] = []
    folders: dict[str, Path] = {}  # of the named members that have finished
    try:
        for number, member in enumerate(members):
            print(f"\nrun {number + 1} of {len(members)}: {_label(member) or 'as given'}", flush=True)
            folder = directory / folder_name(number, member, len(members))
            status, reason = _run(member, folder, folders)
            if status == "finished":
                folders[member.name] = folder
            rows.append(_row(member, folder, status, reason))
            write_csv(directory / FILE, rows)
            if status == "interrupted":
                return INTERRUPTED
    finally:
        if rows:
            _show(directory, columns(members), rows)
    if members[0].name and any(
        row["status"] != "not run" and (directory / str(row["directory"])).is_dir() for row in rows
    ):
        _report(directory)
    return FINISHED if all(row["status"] == "finished" for row in rows) else FAILED


def folder_name(number: int, member: Member, count: int) -> str:
    """`<number>_<overrides>` of what the sweep is over, or the name; no characters that paths give a meaning."""
    digits = len(str(count - 1))
    overrides = "".join(c if c.isalnum() or c in "=,.+-_@" else "-" for c in _label(member, separator=","))
    return f"{number:0{digits}}_{overrides}"[:MOST_CHARACTERS].rstrip("_")


def columns(members: Sequence[Member]) -> tuple[str, ...]:
    """Columns of a row that tell the members apart."""
    return ("member",) if members[0].name else members[0].varying


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows under the columns that any of them has; whole or as it was before."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    temporary.rename(path)


def _label(member: Member, *, separator: str = " ") -> str:
    return member.name or separator.join(f"{key}={member.overrides[key]}" for key in member.varying)


def _run(member: Member, folder: Path, finished: Mapping[str, Path]) -> tuple[str, str]:
    """One member: its status and, where it did not finish, why. It does not run where it builds on one that did not."""
    lacking = [name for name in member.builds_on if name not in finished]
    if lacking:
        print(f"not run: it builds on {lacking[0]}, which did not finish", file=sys.stderr)
        return "not run", f"builds on member {lacking[0]}, which did not finish"
    try:
        summary = attempt(member.placed(finished), folder).summary
        return str(summary["status"]), str(summary["reason"])
    except Mistake as mistake:
        print(f"failed: {first_lines(mistake)}", file=sys.stderr)
        return "failed", str(mistake)
    except Exception as error:  # whatever befell this one, the others are wanted
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {COLOUR.sub('', first_lines(error))}"


def _row(member: Member, folder: Path, status: str, reason: str) -> Row:
    """The overrides, then what the summary has in single values; a key of both is as it was given."""
    summary: Mapping[str, object] = {}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text())
    scalars = {key: value for key, value in summary.items() if not isinstance(value, dict | list)}
    outcome = {"directory": folder.name, "status": status, "reason": " ".join(reason.split())}
    given = {**({"member": member.name} if member.name else {}), **member.overrides}
    return {**given, **outcome, **{k: v for k, v in scalars.items() if k not in {**given, **outcome}}}


def _show(directory: Path, varying: Sequence[str], rows: Sequence[Row]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 500  # no line is cut or folded where nobody looks at it on a screen
    console.print(table(varying, rows))
    print(f"{directory / FILE}", flush=True)


def _report(directory: Path) -> None:
    """The page and the plots of a comparison; a sweep's are made by `diloco report`."""
    from diloco.report import default_folder, write_report

    print(write_report([directory], default_folder([directory])), flush=True)


def table(varying: Sequence[str], rows: Sequence[Row]) -> Table:
    """What the sweep is over and how each run ended; the lowest validation loss has an asterisk."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    alike = len({row["data_sha256"] for row in rows if row.get("data_sha256")}) <= 1  # else losses say nothing
    losses = [loss for row in rows if (loss := _number(row, "val_loss")) is not None]
    best = min(losses, default=None) if alike else None
    shown = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("run", *varying, "status", *FIGURES, "reason"):
        shown.add_column(name, justify="left" if name in ("", "status", "reason") else "right")
    for number, row in enumerate(rows):
        is_best = best is not None and _number(row, "val_loss") == best
        cells = [str(number), *(str(row[key]) for key in varying), str(row["status"])]
        shown.add_row(
            *cells,
            *_figures(row, is_best),
            Text(str(row["reason"])[:MOST_CHARACTERS]),
            style="bold" if is_best else None,
        )
    return shown


def _figures(row: Row, is_best: bool) -> list[str]:
    """What stands under FIGURES."""
    loss, perplexity = _number(row, "val_loss"), _number(row, "perplexity")
    tokens, speed = _number(row, "tokens"), _number(row, "tokens_per_s")
    sent = _number(row, "bytes_sent")
    wall_s = _number(row, "wall_s")
    return [
        "-" if loss is None else f"{loss:.4f}",
        "* best" if is_best else "",
        "-" if perplexity is None else f"{perplexity:,.1f}",
        "-" if tokens is None else format_count(tokens),
        "-" if speed is None else format_count(speed),
        "-" if sent is None else format_bytes(sent),
        "-" if wall_s is None else format_duration(wall_s),
    ]


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None
