"""`diloco route`: a run of several paths, routed once a document and every so many tokens."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dipaco.evaluate import Figures, check_every, evaluate
from dipaco.finished import Finished, token_router
from experiments.entry import FINISHED
from experiments.trained import run_config

FILE = "evaluation.json"


def route(arguments: argparse.Namespace) -> int:
    """Fit the token router where that is needed, measure, print a table and write it; the exit status.

    Raises ValueError for what cannot be: one path, no export, windows without tokens, no documents for the router.
    """
    check_every(arguments.every)
    run_config(arguments.run)  # which finds the user's own parts
    run = Finished(arguments.run, say=lambda text: print(text, file=sys.stderr, flush=True))
    router = token_router(
        run,
        look_ahead=arguments.look_ahead,
        steps=arguments.steps,
        documents=arguments.documents,
        refit=arguments.refit,
    )
    found = evaluate(run, arguments.every, router)
    rows = {name: {**asdict(figures), "perplexity": figures.perplexity} for name, figures in found.items()}
    answer = {"run": str(arguments.run), "figures": rows, "router": {**asdict(router.fitting), **run.fitted_on()}}
    print("\n".join(_table(found)))
    print(_write(arguments.to or run.directory / "routing", answer))
    print(json.dumps(answer))
    return FINISHED


def _table(found: Mapping[str, Figures]) -> list[str]:
    """A row for each way to route; the loads are the shares of the tokens that path 0, 1, ... predicts."""
    lines = [f"{'routed':<12}{'loss':>9}{'perplexity':>12}{'best path':>11}  loads"]
    for name, figures in found.items():
        words = name if name == "once" else f"every {name}"
        shares = " ".join(f"{share:.2f}" for share in figures.loads)
        lines.append(f"{words:<12}{figures.loss:>9.4f}{figures.perplexity:>12.2f}{figures.oracle:>11.4f}  {shares}")
    return [*lines, "best path: the loss, had each window gone through the path that turned out best for it"]


def _write(folder: Path, answer: Mapping[str, object]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error}): choose another with --to") from error
    return folder / FILE
