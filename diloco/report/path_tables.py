"""The words and tables of a run's paths."""

from __future__ import annotations

from collections.abc import Sequence

from diloco.formats import format_loss, format_perplexity
from diloco.report.drawing import Key
from diloco.report.html import Cell, table
from diloco.report.path_charts import MOST_LINES, colour
from diloco.report.paths import Path, Paths, Share, spoken
from diloco.report.runs import Run, shortened

NONE = "-"
ARROW = " \N{RIGHTWARDS ARROW} "
MOST_OF_A_DOMAIN = 40  # characters
ROUTERS = {
    "kmeans": "k-means",
    "product": "product k-means",
    "file": "a saved router",
    "domains": "the true domains",
    "iid": "chance",
}


def introduction(paths: Paths) -> str:
    """What paths are, for who sees them for the first time."""
    counts = zip(paths.levels, paths.sizes, strict=True)
    levels = ", ".join(f"one of the {size} of {spoken(level)}" for level, size in counts)
    common = "; what lies outside of these is shared by all" if paths.shared else ""
    by = f" ({ROUTERS.get(paths.router, paths.router)})" if paths.router else ""
    return (
        f"{len(paths.paths)} models are trained, called paths. Each is put together from modules: {levels}{common}."
        f" Paths through the same module train it together. A router{by} sends each document to one path, which trains"
        " on it or, if it is held out, is evaluated on it: together they are one model, the bold line."
    )


def explanation(paths: Paths) -> str:
    """How to read the table."""
    domain = next((domain for path in paths.paths for domain in path.domains), None)
    text = (
        "Documents that each path trains on, and held-out ones that it is evaluated on; its validation loss and"
        " perplexity before training and now."
    )
    if _stops(paths):
        text += " Best round: after which the path did best on documents held out for early stopping, and counts."
    if paths.purity is None or domain is None:
        return text
    name, share, of_domain = domain.name, f"{100 * domain.share:.0f} %", f"{100 * domain.of_domain:.0f} %"
    return (
        f"{text} {shortened(name, MOST_OF_A_DOMAIN)} {share} ({of_domain} of it): {share} of the path's documents are"
        f" of this domain, and these are {of_domain} of all that it has."
    )


def tiles(run: Run, paths: Paths) -> list[tuple[str, str, str]]:
    """Name, value and explanation of each: the whole, the runs beside it, the router."""
    newest = paths.evaluations[-1] if paths.evaluations else None
    found = [("perplexity, routed", format_perplexity(run.val_loss), f"loss {format_loss(run.val_loss)}")]
    for label, loss in newest.beside.items() if newest is not None else ():
        found.append((f"beside: {label}", format_perplexity(loss), _against(loss, run.val_loss)))
    if paths.router:
        found.append(("router", ROUTERS.get(paths.router, paths.router), "sends documents to paths"))
    if paths.purity is not None:
        found.append(_measure("purity", paths.purity, "of a path's documents are of its commonest domain"))
    if paths.concentration is not None:
        text = "of a domain's documents go to its commonest path"
        found.append(_measure("concentration", paths.concentration, text))
    return found


def overview(paths: Paths) -> str:
    """A row for each path."""
    domains = paths.purity is not None
    head = ["path", *map(spoken, paths.levels), "documents", "share of tokens", "held out", "share of tokens"]
    head += ["loss", "perplexity"]
    head += [*(["best round"] if _stops(paths) else []), *(["specialises in"] if domains else [])]
    rows = []
    for path in paths.paths:
        texts = [*path.modules, *_share(path.training), *_share(path.validation)]
        texts += [f"{form(path.first)}{ARROW}{form(path.newest)}" for form in (format_loss, format_perplexity)]
        texts += [NONE if path.best_round is None else str(path.best_round)] if _stops(paths) else []
        row = [_name(paths, path), *(Cell(text=text, kind="number") for text in texts)]
        rows.append([*row, *([Cell(text=_domains(path), kind="wide")] if domains else [])])
    return table("Each path: modules, documents, loss", head, rows)


def documents(paths: Paths) -> str:
    """The most typical documents of each path; empty where none are known."""
    domains = paths.purity is not None
    rows = [
        [
            _name(paths, path),
            *([Cell(text=shortened(document.domain, MOST_OF_A_DOMAIN))] if domains else []),
            Cell(text=document.text, kind="wide"),
        ]
        for path in paths.paths
        for document in path.typical
    ]
    why = "the largest lead over the second best path, by the router's scores"
    why = "of its largest domain" if paths.router in ("domains", "iid") else why
    head = ["path", *(["domain"] if domains else []), "begins with"]
    return table(f"Typical documents of each path: {why}", head, rows) if rows else ""


def _stops(paths: Paths) -> bool:
    return any(path.best_round is not None for path in paths.paths)


def _name(paths: Paths, path: Path) -> Cell:
    drawn = Key(label="", colour=colour(paths, path.number), box=True)
    return Cell(text=f"path {path.number}", key=drawn if len(paths.paths) <= MOST_LINES else None)


def _share(share: Share) -> Sequence[str]:
    documents = NONE if share.documents is None else f"{share.documents:,}"
    return documents, NONE if share.load is None else f"{100 * share.load:.1f} %"


def _domains(path: Path) -> str:
    """Lines break between domains only."""
    told = [
        f"{shortened(domain.name, MOST_OF_A_DOMAIN)} {100 * domain.share:.0f} % ({100 * domain.of_domain:.0f} % of it)"
        for domain in path.domains
    ]
    return "; ".join(text.replace(" ", "\N{NO-BREAK SPACE}") for text in told)


def _against(loss: float, routed: float | None) -> str:
    than = ""
    if routed is not None and f"{loss - routed:.3f}" not in ("0.000", "-0.000"):
        than = f", {abs(loss - routed):.3f} {'above' if loss > routed else 'below'} the routed"
    return f"loss {format_loss(loss)} after as many steps{than}"


def _measure(name: str, values: tuple[float, float], what: str) -> tuple[str, str, str]:
    training, validation = values
    return name, f"{100 * training:.0f} %", f"{what}; held out {100 * validation:.0f} %"
