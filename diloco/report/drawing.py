"""Figures as PNG, and as SVG whose colours are the page's: they follow its light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw: TypeAlias = Callable[[Axes], None]

# Told apart also by those who do not see red or green, and in grey; the page has brighter ones for dark.
SERIES = ("#0068a8", "#d55e00", "#00865f", "#a63d8f", "#9a7200", "#2a9cc4", "#8a1f4b", "#5f6b76")
DARK_SERIES = ("#58aef0", "#ff9350", "#3ecfa0", "#e594d3", "#e0b840", "#8fdcf5", "#f07f9f", "#b3bcc5")
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = ((0, ()), (0, (5, 2)), (0, (1.2, 1.6)))
INK, MUTED, GRID, PAPER = "#1c2127", "#59636d", "#dfe3e8", "#fefefe"
DARK_INK, DARK_MUTED, DARK_GRID, DARK_PAPER = "#e8ebee", "#a3adb8", "#343b43", "#15181c"
WAITING, DARK_WAITING = "#cc9c3d", "#8f6f2c"
COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": (INK, DARK_INK),
    "muted": (MUTED, DARK_MUTED),
    "grid": (GRID, DARK_GRID),
    "paper": (PAPER, DARK_PAPER),
    "waiting": (WAITING, DARK_WAITING),
    **{f"series-{i}": pair for i, pair in enumerate(zip(SERIES, DARK_SERIES, strict=True))},
}  # name of the page's variable -> in light and in dark

PANEL_INCHES = (4.9, 3.3)
PNG_DPI = 160


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart, described in words for those who do not see it."""

    title: str
    description: str
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Key:
    """A line of a legend."""

    label: str
    colour: str
    dash: int = 0
    box: bool = False  # a filled box instead of a line


def png(
    panels: Sequence[Panel], keys: Sequence[Key], path: Path, *, inches: tuple[float, float] = PANEL_INCHES
) -> None:
    """Draw the panels side by side, with a legend below them."""
    with _style():
        figure = _figure((inches[0] * len(panels), inches[1]))
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_title(panel.title)
            panel.draw(axes)
        if len(keys) > 1:
            handles = [_handle(key) for key in keys]
            columns = max(1, min(len(keys), round(150 * len(panels) / 3) // max(8 + len(key.label) for key in keys)))
            figure.legend(handles, [key.label for key in keys], loc="outside lower center", ncols=columns)
        figure.savefig(path, dpi=PNG_DPI, facecolor=PAPER)


def svg(panel: Panel, name: str, *, inches: tuple[float, float] = PANEL_INCHES) -> str:
    """The panel as an element for an HTML page; `name` tells it from the others of the page."""
    with _style():
        figure = _figure(inches)
        panel.draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(file.getvalue(), name)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
        "svg.hashsalt": "diloco",
        "text.parse_math": False,  # labels come from runs and may hold a $
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "axes.titlecolor": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.minor.size": 0,
        "lines.markersize": 4,
        "legend.frameon": False,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of labels; in the page the browser has them
        yield


def _figure(inches: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=inches, layout=ConstrainedLayoutEngine(w_pad=0.12))  # inches between panels


def _handle(key: Key) -> Artist:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.box:
        return Patch(color=key.colour)
    return Line2D([], [], color=key.colour, linestyle=DASHES[key.dash])


def _inlined(text: str, name: str) -> str:
    """Without what only a file of its own needs, names made unique, and colours as the page's variables."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w.-]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return text.strip()
