"""HTML from what runs wrote: everything escaped, tables that scroll on a narrow screen."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from diloco.report.drawing import COLOURS, DASHES, Key
from diloco.report.history import printable


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Text in a table."""

    text: str
    kind: str = ""  # a class of page.css: number, good, bad, best
    key: Key | None = None  # drawn before the text


def escape(text: str) -> str:
    """Text as HTML has it, also within quotes."""
    return html.escape(printable(text))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], *, kind: str = "") -> str:
    """A table whose first column names the rows, in a box of its own that scrolls sideways."""
    numbers = [bool(rows) and cell.kind.startswith("number") for cell in rows[0]]
    columns = [
        f'<th scope="col"{" class=number" * right}>{escape(name)}</th>'
        for name, right in zip(head, numbers, strict=True)
    ]
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">']
    lines += [f'<table class="{kind}">' if kind else "<table>", f"<caption>{escape(caption)}</caption>"]
    lines += ["<thead><tr>", *columns, "</tr></thead>", "<tbody>"]
    for row in rows:
        cells = [_cell(cell, "td") for cell in row[1:]]
        lines.append(f"<tr>{_cell(row[0], 'th')}{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>", "</div>"])


def section(heading: str, *parts: str) -> str:
    """A part of the page with a heading."""
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", *parts, "</section>"])


def folded(heading: str, content: str, *, unfolded: bool) -> str:
    """What is seen once its heading is clicked, or at once."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(heading)}</summary>\n{content}\n</details>"


def tiles(told: Sequence[tuple[str, str, str]]) -> str:
    """Figures at a glance: name, value and explanation of each."""
    items = [
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="muted">{escape(more)}</dd></div>'
        for name, value, more in told
    ]
    return "\n".join(['<dl class="tiles">', *items, "</dl>"])


def legend(keys: Sequence[Key]) -> str:
    """What each colour stands for."""
    items = "".join(f"<li>{swatch(key)}{escape(key.label)}</li>" for key in keys)
    return f'<ul class="legend">{items}</ul>'


def swatch(key: Key) -> str:
    """A piece of the line, or a box."""
    colour = f"var(--{VARIABLES[key.colour]})"
    if key.box:
        drawn = f'<rect x="2" y="1" width="20" height="8" style="fill: {colour}"/>'
    else:
        dashes = " ".join(f"{2 * length:g}" for length in DASHES[key.dash][1])
        dashed = f"; stroke-dasharray: {dashes}" if dashes else ""
        drawn = f'<path d="M1 5H23" style="stroke: {colour}; stroke-width: 2.5{dashed}"/>'
    return f'<svg class="swatch" viewBox="0 0 24 10" aria-hidden="true">{drawn}</svg>'


VARIABLES = {light: name for name, (light, _) in COLOURS.items()}


def _cell(cell: Cell, tag: str) -> str:
    scope = ' scope="row"' if tag == "th" else ""
    kind = f' class="{cell.kind}"' if cell.kind else ""
    drawn = "" if cell.key is None else swatch(cell.key)
    text = escape(cell.text).replace(",", ",<wbr>") if tag == "th" else escape(cell.text)  # labels have no spaces
    return f"<{tag}{scope}{kind}>{drawn}{text}</{tag}>"
