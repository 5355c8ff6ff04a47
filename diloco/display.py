"""What a run shows: a drawing on a terminal, plain lines elsewhere, `log.txt`, and the table at its end."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diloco.fleet import Fleet, Record, amount, number, plain_table
from diloco.formats import format_bytes, format_count, format_duration, format_loss
from diloco.outcome import summary_rows, summary_table
from diloco.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

PACE_ROUNDS = 20  # speed and time left are measured over this many of the newest rounds
REFRESHES_PER_S = 4
OTHER_LINES = 10  # of the drawing: all but the islands' rows


class Display:
    """Progress on standard output: drawn on a terminal, else a line for each commit, evaluation and warning.

    The lines go to `log.txt` in `folder` in both cases, each after the time, the round and the newest version.
    """

    def __init__(self, folder: Path, *, rounds: int, live: bool = True, console: Console | None = None) -> None:
        """`console` replaces standard output for the drawing, and is drawn on even if it is no terminal."""
        if console is None and live and sys.stdout.isatty():
            from rich.console import Console

            terminal = Console()
            console = None if terminal.is_dumb_terminal else terminal
        self._console = console if live else None
        self._live: Live | None = None
        self._log = (folder / "log.txt").open("a", encoding="utf-8", errors="replace")
        self._rounds = rounds
        self._round, self._version = 0, 0
        self._now = (0.0, time.monotonic())  # the newest record's time_s, and when it came
        self._start = (0, 0.0)  # round, time_s
        self._commits: deque[tuple[int, float, float]] = deque(maxlen=PACE_ROUNDS)  # round, time_s, tokens
        self._sent_bytes = 0.0
        self._validation: float | None = None
        self._best: float | None = None
        self._beside = ""  # what runs beside this one had after as many steps
        self._paths = ""  # losses of the paths, where there are several
        self._fleet = Fleet()
        self._metrics = folder / "metrics.jsonl"

    def write(self, record: Record) -> None:
        """Take one record: update the drawing, or print a line."""
        self._now = (amount(record, "time_s"), time.monotonic())
        self._fleet.take(record)
        match record["event"]:
            case "start":
                self._begin(int(amount(record, "round")))
            case "commit":
                self._committed(record)
            case "evaluation":
                self._evaluated(record)
            case "lost" | "joined" as event:
                reason = f": {record['message']}" if record.get("message") else ""
                self._say(f"island {record.get('island')} {event}{reason}")
            case "warning" | "late" as event:
                self._say(f"{event}: {record.get('message')}")
            case "stale":
                self._say(f"stale: {record.get('message')}", show=False)  # the drawing has it; there may be very many
            case "end":
                self._stop()

    def watch(self, busy: Callable[[], Mapping[int, bool]]) -> None:
        """Show who waits: `busy` tells of each living island whether it has a task now, from any thread."""
        self._fleet.watch(busy)

    def message(self, text: str) -> None:
        """Print `text`, above the drawing if there is one."""
        self._say(text)

    def summary(self, summary: Mapping[str, object]) -> None:
        """End the drawing and print `summary_table(summary)`, or its rows as plain lines."""
        self._stop()
        rows = summary_rows(summary)
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            self._say(f"{name:{width}}  {text}", show=self._console is None)
        if self._console is not None:
            self._console.print(summary_table(summary))

    def table(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print texts side by side, or as plain lines one below the other; all rows have the same columns."""
        for row in rows:
            for name, text in row.items():
                self._say(f"{name}: {text}", show=self._console is None)
        if self._console is not None and rows:
            from rich.table import Table
            from rich.text import Text

            table = Table(*rows[0], show_lines=True)
            for row in rows:
                table.add_row(*(Text(text) for text in row.values()))
            self._console.print(table)

    def close(self) -> None:
        """End the drawing and close log.txt."""
        self._stop()
        self._log.close()

    def _begin(self, done: int) -> None:
        self._round, self._start = done, (done, self._now[0])
        self._recall()
        if self._console is not None and self._live is None:
            from rich.live import Live

            self._live = Live(self, console=self._console, refresh_per_second=REFRESHES_PER_S)
            self._live.start(refresh=True)

    def _recall(self) -> None:
        """What a resumed run's metrics.jsonl tells already."""
        with suppress(OSError, ValueError), self._metrics.open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                self._fleet.recall(record)
                if record["event"] == "evaluation":
                    self._best = _least(self._best, number(record, "eval/loss"))
                elif record["event"] == "commit":
                    self._version = int(amount(record, "outer/version"))

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):
                live.stop()

    def _say(self, text: str, *, show: bool = True) -> None:
        text = redacted(text)
        # Not even a full disk, a reader that went away, or a signal's handler that says something while
        # something is being said (a RuntimeError) may stop a run.
        with suppress(OSError, RuntimeError):
            clock = time.strftime("%Y-%m-%d %H:%M:%S")
            self._log.write(f"{clock} round {self._round} version {self._version}: {text}\n")
            self._log.flush()
        with suppress(OSError, RuntimeError):
            if show and self._console is not None:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif show:
                encoding = sys.stdout.encoding or "utf-8"
                print(text.encode(encoding, "replace").decode(encoding), flush=True)

    def _committed(self, record: Record) -> None:
        self._sent_bytes = amount(record, "total/bytes_sent")
        done, self._version = int(amount(record, "round")), int(amount(record, "outer/version"))
        # Without a barrier a commit names the round that is being made, and `total/rounds` those that are over.
        done = min(done, int(amount(record, "total/rounds"))) if "total/rounds" in record else done
        if amount(record, "fragment") + 1 < amount(record, "fragments") or done == self._round:
            return  # only the last fragment's step ends a round, and without a barrier only one of many
        self._round = done
        self._commits.append((done, self._now[0], amount(record, "total/tokens")))
        self._say(self._commit_line(), show=self._live is None)

    def _evaluated(self, record: Record) -> None:
        self._validation = number(record, "eval/loss")
        self._best = _least(self._validation, self._best)
        told = {key.removeprefix("beside/"): number(record, key) for key in record if key.startswith("beside/")}
        self._beside = ", ".join(f"{label} {format_loss(loss)}" for label, loss in told.items())
        paths = [number(record, key) for key in record if key.startswith("eval/loss/")]
        self._paths = _range([loss for loss in paths if loss is not None])
        beside = f" ({self._beside})" if self._beside else ""
        losses = f"validation loss {format_loss(self._validation)}{beside}  best {format_loss(self._best)}"
        self._say(f"{self._where(int(amount(record, 'round')))}  {losses}", show=self._live is None)

    def _where(self, done: int) -> str:
        return f"round {done:{len(str(self._rounds))}}/{self._rounds}"

    def _commit_line(self) -> str:
        parts = [self._where(self._round), f"loss {format_loss(self._fleet.mean_loss)}"]
        parts += [] if self._validation is None else [f"val {format_loss(self._validation)}"]
        parts += [f"{format_count(self._tokens_per_s())} tokens/s", f"sent {format_bytes(self._sent_bytes)}"]
        return "  ".join([*parts, f"left {format_duration(self._left_s())}"])

    def _tokens_per_s(self) -> float:
        """Over the newest rounds, waiting included; before there are two, the islands' own speeds in sum."""
        if len(self._commits) >= 2 and self._commits[-1][1] > self._commits[0][1]:
            (_, first_s, first), (_, last_s, last) = self._commits[0], self._commits[-1]
            return (last - first) / (last_s - first_s)
        return self._fleet.tokens_per_s

    def _left_s(self) -> float | None:
        if not self._commits:
            return None
        first, first_s = self._commits[0][:2] if len(self._commits) >= 2 else self._start
        last, last_s, _ = self._commits[-1]
        if last <= first:
            return None
        return (self._rounds - last) * (last_s - first_s) / (last - first) - (self._elapsed_s() - last_s)

    def _elapsed_s(self) -> float:
        return self._now[0] + (time.monotonic() - self._now[1] if self._live is not None else 0.0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The drawing; Live asks for it from a thread of its own."""
        try:
            return list(console.render(self._drawing(options.size.height), options))
        except Exception:  # whatever the terminal is like, drawing must not stop a run
            return []

    def _drawing(self, height: int) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, style="bold")
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        progress = ProgressBar(total=max(1, self._rounds), completed=self._round)
        left = f"{format_duration(self._elapsed_s())} [dim]left[/] {format_duration(self._left_s())}"
        bar.add_row(self._where(self._round), progress, left)
        figures = {
            "inner loss": format_loss(self._fleet.mean_loss),
            "validation": format_loss(self._validation),
            "best": format_loss(self._best),
            "tokens/s": format_count(self._tokens_per_s()),
            "sent": format_bytes(self._sent_bytes),
        }
        table = plain_table(*figures)
        table.add_row(*figures.values(), style="bold")
        more = {"paths": self._paths, "beside, after as many steps": self._beside}
        lines = [Text.assemble((f"{name}  ", "dim"), text, no_wrap=True) for name, text in more.items() if text]
        return Group(bar, "", table, *lines, "", self._fleet.table(max(1, height - OTHER_LINES - len(lines))))


def _least(*losses: float | None) -> float | None:
    return min((loss for loss in losses if loss is not None), default=None)


def _range(losses: list[float]) -> str:
    return f"{format_loss(min(losses))} to {format_loss(max(losses))}" if len(losses) > 1 else ""
