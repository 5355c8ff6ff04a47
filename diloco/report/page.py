"""write_report: one HTML page that needs nothing else, and the figures as PNG beside it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diloco.formats import format_bytes, format_count, format_duration, format_loss, format_perplexity
from diloco.report import arrivals, measures, path_charts, path_tables, tables
from diloco.report.drawing import COLOURS, png, svg
from diloco.report.figures import Figure, figures, keys
from diloco.report.history import amount, number
from diloco.report.html import escape, folded, legend, section, tiles
from diloco.report.islands import timeline
from diloco.report.paths import Paths, paths_of
from diloco.report.runs import Run, best_of, is_sweep, read_runs, same_data

CSS = Path(__file__).with_name("page.css")
MOST_TIMELINES = 8
MOST_SAMPLES = 3  # of a run
MOST_WARNINGS = 50  # of a run
FEW_PATHS = 8  # up to so many have their documents unfolded
MOST_PATHS = 32  # more are folded
MOST_CHARACTERS = 4000  # of a sample or a warning
FEW_RUNS = 3  # up to so many have their texts unfolded
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # browsers then load nothing, whatever it says


def write_report(runs: Sequence[Path], to: Path) -> Path:
    """Report on these directories of runs and sweeps in the folder `to`, made if need be. Returns the page's path.

    An earlier report there is overwritten. Raises ValueError where a directory holds no run, or `to` is not
    writable.
    """
    found = read_runs(runs)
    title = _title(runs, found)
    begun = [run for run in found if run.history.evaluations or run.history.segments]
    drawn = [*measures.figures(begun), *figures(begun), *arrivals.figures(begun)] if begun else []
    routed = paths_of(begun[0]) if len(begun) == 1 else None
    by_path = [path_charts.figure(begun[0].history, routed)] if routed is not None else []
    times = [
        figure for n, run in enumerate(begun[:MOST_TIMELINES]) if (figure := timeline(run, _timeline_name(n, begun)))
    ]
    own = [_paths(begun[0], routed, figure) for figure in by_path] if routed is not None else []
    sections = [*own, *map(_figure_section, drawn), _timelines(times, begun), _islands(begun)]
    files = [f"{figure.name}.png" for figure in [*by_path, *drawn, *times]]
    page = _page(title, found, begun, sections, files)
    try:
        to.mkdir(parents=True, exist_ok=True)
        for figure in [*by_path, *drawn, *times]:
            png(figure.panels, figure.keys, to / f"{figure.name}.png", inches=figure.inches)
        temporary = to / "index.tmp"
        temporary.write_text(page, encoding="utf-8")
        temporary.rename(to / "index.html")
    except OSError as error:
        raise ValueError(f"{to} cannot be written to: {error}; give another folder with --to") from error
    return to / "index.html"


def _title(paths: Sequence[Path], runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].label
    if len(paths) == 1 and is_sweep(paths[0]):
        return f"Sweep {paths[0].resolve().name}"
    return f"{len(runs)} runs"


def _timeline_name(number: int, runs: Sequence[Run]) -> str:
    return "timeline" if len(runs) == 1 else f"timeline-{number}"


def _page(title: str, runs: Sequence[Run], begun: Sequence[Run], found: Sequence[str], files: Sequence[str]) -> str:
    sections = [_summary(runs, begun), *found]
    sections += [_configuration(runs), _samples(runs), _warnings(runs), _environment(runs)]
    beside = f"The figures are beside this page as {', '.join(files)}. " if files else ""
    body = "\n".join(filter(None, sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="diloco report">
<title>{escape(title)}</title>
<style>
{_variables()}
{CSS.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_subtitle(runs)}
</header>
<main>
{body}
</main>
<footer><p>{escape(beside)}Made by <code>diloco report</code> on {time.strftime("%Y-%m-%d at %H:%M")}.</p></footer>
</body>
</html>
"""


def _variables() -> str:
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root {{ {light}; }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}; }} }}"


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        run = runs[0]
        kind = "good" if run.status == "finished" else "bad"
        reason = f" {escape(run.reason)}" if run.reason else ""
        if run.status == "unfinished":
            reason = " no summary: it is being trained, or was killed"
        status = f'<p><span class="status {kind}">{escape(run.status)}</span>{reason}</p>'
        experiment = f"experiment {run.summary['experiment']}, " if run.summary.get("experiment") else ""
        return f'{status}\n<p class="muted">{escape(experiment + run.directory.name)}</p>'
    counts = Counter(run.status for run in runs)
    best = best_of(runs)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    lowest = f"; lowest validation loss {tables.loss_text(best.val_loss)}: {best.label}" if best else ""
    if not same_data(runs):
        lowest = "; they read different data, so that their losses say nothing of each other"
    return f'<p class="muted">{escape(told + lowest)}</p>'


def _summary(runs: Sequence[Run], begun: Sequence[Run]) -> str:
    if len(runs) == 1:
        return section("Result", _tiles(runs[0]), folded("All figures", tables.results(runs[0]), unfolded=False))
    parts = [tables.comparison(runs, {key.label: key for key in keys(begun)})]
    items = [f"<li>{escape(f'{run.label}: {run.status}, {run.reason}')}</li>" for run in runs if run.reason]
    parts += ["<h3>Did not finish</h3>", "<ul>", *items, "</ul>"] if items else []
    return section("Results", *parts)


def _tiles(run: Run) -> str:
    summary = run.summary
    before, after = number(summary, "initial_val_loss"), run.val_loss
    sent, parallel = number(summary, "bytes_sent"), amount(summary, "bytes_data_parallel")
    ratio = tables.against_data_parallel(run)
    use = number(summary, "compute_utilization")
    speed = number(summary, "tokens_per_s")
    arrow = " \N{RIGHTWARDS ARROW} "
    shown = [
        ("validation loss", f"{format_loss(before)}{arrow}{format_loss(after)}",
         f"perplexity {format_perplexity(before)}{arrow}{format_perplexity(after)}" if run.has_perplexity else ""),
        *measures.tiles(run),
        ("bytes sent", "-" if sent is None else format_bytes(sent),
         f"{ratio} than data parallel ({format_bytes(parallel)})" if ratio != "-" else ""),
        ("tokens", format_count(amount(summary, "tokens")), "" if speed is None else f"{format_count(speed)} a second"),
        ("wall time", format_duration(number(summary, "wall_s")),
         "" if use is None else f"utilization {100 * use:.0f} %"),
        ("islands", str(summary.get("islands", "-")),
         f"{summary.get('rounds', '-')} rounds of {summary.get('inner_steps', '-')} inner steps"),
    ]  # fmt: skip
    return tiles(shown)


def _figure_section(figure: Figure) -> str:
    shown = [f'<p class="note">{escape(figure.note)}</p>']
    shown += [legend(figure.keys)] if len(figure.keys) > 1 else []
    return section(figure.heading, *shown, '<div class="panels">', *_drawings(figure), "</div>")


def _paths(run: Run, paths: Paths, figure: Figure) -> str:
    """What a run of several paths came to, path by path."""
    documents, rows = path_tables.documents(paths), path_tables.overview(paths)
    few = len(paths.paths) <= FEW_PATHS
    return section(
        figure.heading,
        f'<p class="note">{escape(path_tables.introduction(paths))}</p>',
        tiles(path_tables.tiles(run, paths)),
        legend(figure.keys),
        '<div class="panels">',
        *_drawings(figure),
        "</div>",
        f'<p class="note">{escape(path_tables.explanation(paths))}</p>',
        rows if len(paths.paths) <= MOST_PATHS else folded(f"All {len(paths.paths)} paths", rows, unfolded=False),
        folded("Typical documents", documents, unfolded=few) if documents else "",
    )


def _drawings(figure: Figure) -> list[str]:
    found = []
    for number_, panel in enumerate(figure.panels):
        caption = f"<figcaption>{escape(panel.title)}</figcaption>" if panel.title else ""
        drawing = svg(panel, f"{figure.name}-{number_}", inches=figure.inches)
        drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(panel.description)}"', 1)
        found.append(f"<figure>{caption}\n{drawing}\n</figure>")
    return found


def _timelines(times: Sequence[Figure], begun: Sequence[Run]) -> str:
    if not times:
        return ""
    marks = "Below the islands: evaluations and checkpoints. X: an island was lost; triangle: one joined; dashed: the"
    parts = [f'<p class="note">{marks} run was resumed.</p>', legend(times[0].keys)]
    for figure in times:
        parts += [f"<h3>{escape(figure.heading)}</h3>"] if len(begun) > 1 else []
        parts += [f'<div class="scroll" tabindex="0" role="region" aria-label="Timeline of {escape(figure.heading)}">']
        parts += ['<div class="timeline">', *_drawings(figure), "</div>", "</div>"]
        parts += [f'<p class="note">{escape(figure.note)}</p>'] if figure.note else []
    if len(begun) > MOST_TIMELINES:
        parts.append(
            f'<p class="note">Those of the other {len(begun) - MOST_TIMELINES} runs: report on them alone.</p>'
        )
    return section("Timeline", *parts)


def _islands(begun: Sequence[Run]) -> str:
    found = arrivals.by_island(begun[0]) if len(begun) == 1 else ""
    return section("Islands", found) if found else ""


def _configuration(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return section("Configuration", tables.differences(runs) or "<p>The same in all runs.</p>")
    path = runs[0].directory / "config.yaml"
    parts = [tables.settings(runs[0])]
    if path.is_file():
        text = escape(path.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"<details><summary>All of config.yaml</summary>\n<pre>{text}</pre>\n</details>")
    return section("Configuration", *filter(None, parts)) if any(parts) else ""


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        for note in run.history.samples[-MOST_SAMPLES:]:
            after = "" if note.round is None else f" after {note.round} rounds"
            text = f'<pre class="text">{escape(note.text[:MOST_CHARACTERS])}</pre>'
            written = measures.samples(note.table) if note.table else text
            parts.append(folded(f"{run.label}{after}", written, unfolded=len(runs) <= FEW_RUNS))
    return section("Samples", '<p class="note">What the trained model writes.</p>', *parts) if parts else ""


def _warnings(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        counts = Counter(note.text for note in run.history.warnings)
        first = {note.text: note for note in reversed(run.history.warnings)}
        items = []
        for text, count in list(counts.items())[:MOST_WARNINGS]:
            when = format_duration(first[text].time_s) + (f", {count} times" if count > 1 else "")
            items.append(f'<li><span class="muted">{when}</span> {escape(text[:MOST_CHARACTERS])}</li>')
        if len(counts) > MOST_WARNINGS:
            items.append(f"<li>and {len(counts) - MOST_WARNINGS} more in metrics.jsonl</li>")
        if items:
            text = "\n".join(["<ul>", *items, "</ul>"])
            parts.append(folded(f"{run.label}: {len(run.history.warnings)}", text, unfolded=len(runs) <= FEW_RUNS))
    return section("Warnings", *parts) if parts else ""


def _environment(runs: Sequence[Run]) -> str:
    return section("Environment", tables.environment(runs))
