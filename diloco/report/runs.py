"""The runs that a report is about, read from their directories, those of sweeps and unfinished ones too."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from diloco import rundir
from diloco.report import history
from diloco.report.history import History

SWEEP = "sweep.csv"
MEMBER = re.compile(r"\d+(_|$)")  # how the folder of a sweep's member begins
UNFINISHED = "unfinished"
DATE = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_")  # of a run's directory
MOST_CHARACTERS = 60  # of a label


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as far as it came."""

    directory: Path
    label: str = ""  # tells it from the others of the report
    status: str = UNFINISHED  # or that of the summary
    reason: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)  # flat: `inner` for the choice, `inner.lr` for a setting
    summary: Mapping[str, Any] = field(default_factory=dict)  # summary.json, or as much as the metrics tell
    history: History = field(default_factory=History)
    modules: Sequence[Mapping[str, str]] = ()  # by path: the module of each slot; empty where there is one path

    @property
    def defaults(self) -> Mapping[str, Any] | None:
        """The defaults of those keys that differ from them; None where the run did not say."""
        found = self.history.start.get("defaults")
        return found if isinstance(found, dict) else None

    @property
    def val_loss(self) -> float | None:
        """The newest validation loss."""
        return history.number(self.summary, "val_loss")

    @property
    def has_perplexity(self) -> bool:
        """Whether the loss is one of which the summary tells the exponential."""
        return self.summary.get("perplexity", self.val_loss) is not None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs in these directories, each once, with labels that tell them apart. Raises ValueError."""
    if not paths:
        raise ValueError("no run was given; name the directory of a run or a sweep, such as runs/latest")
    found: dict[Path, Run] = {}
    for path in paths:
        for run in _read(path):
            found.setdefault(run.directory, run)
    return _labelled(list(found.values()))


def best_of(runs: Sequence[Run]) -> Run | None:
    """The run with the lowest validation loss, where there are several to choose from that read the same data."""
    known = [run for run in runs if run.val_loss is not None]
    if not same_data(known):
        return None
    return min(known, key=lambda run: run.val_loss or 0.0) if len(runs) > 1 and known else None


def same_data(runs: Sequence[Run]) -> bool:
    """Whether all that have a validation loss read the same, so that their losses can be compared."""
    return len({run.summary.get("data_sha256") for run in runs if run.val_loss is not None}) < 2


def default_folder(paths: Sequence[Path]) -> Path:
    """Where the report goes if nobody says: into the run or sweep, or beside the runs where there are several."""
    if len(paths) == 1:
        return paths[0] / "report"
    return rundir.new_directory("report")


def is_sweep(path: Path) -> bool:
    """Whether a directory is that of a sweep, also of one that has not finished its first member."""
    return (path / SWEEP).is_file() or (not _is_run(path) and bool(_members(path)))


def _read(path: Path) -> list[Run]:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give that of a run or a sweep, such as runs/latest")
    directory = path.resolve()
    if is_sweep(directory):
        return _read_sweep(directory, path)
    if not _is_run(directory):
        raise ValueError(
            f"{path} is not the directory of a run or a sweep: it has neither metrics.jsonl nor {SWEEP};"
            " give one such as runs/latest"
        )
    return [_read_run(directory)]


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("metrics.jsonl", "summary.json"))


def _members(directory: Path) -> dict[str, Path]:
    """The runs in a sweep's directory by name; not its link `latest`."""
    folders = (p for p in directory.iterdir() if MEMBER.match(p.name) and p.is_dir() and not p.is_symlink())
    return {path.name: path for path in sorted(folders, key=lambda p: int(p.name.partition("_")[0])) if _is_run(path)}


def _read_sweep(directory: Path, given: Path) -> list[Run]:
    """Its members in order: those of the table, and one that is being trained."""
    rows: dict[str, dict[str, str]] = {}
    if (directory / SWEEP).is_file():
        with (directory / SWEEP).open(newline="") as file:
            rows = {row["directory"]: row for row in csv.DictReader(file) if row.get("directory")}
    members = _members(directory)
    runs = [_read_member(directory / name, rows.get(name), name in members) for name in {**rows, **members}]
    if not runs:
        raise ValueError(f"{given} is a sweep without any run; give one that has trained something")
    return runs


def _read_member(directory: Path, row: Mapping[str, str] | None, trained: bool) -> Run:
    run = _read_run(directory) if trained else Run(directory=directory, status="failed")
    if not trained and row is not None:
        overrides = list(row)[: list(row).index("directory")]
        run = replace(run, config={key: _value(row[key]) for key in overrides})
    status = row["status"] if row is not None and row.get("status") else run.status
    reason = (row or {}).get("reason") or run.reason
    return replace(run, label=re.sub(r"^\d+_", "", directory.name), status=status, reason=reason)


def _value(text: str) -> object:
    """An override's value, as it was given: one like @first is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_run(directory: Path) -> Run:
    told = history.read(directory / "metrics.jsonl")
    config = _read_config(directory / "config.yaml")
    summary = _read_summary(directory, told) or _so_far(config, told)
    return Run(
        directory=directory,
        status=str(summary.get("status", UNFINISHED)),
        reason=str(summary.get("reason") or ""),
        config=config,
        summary=summary,
        history=told,
        modules=_read_modules(directory / "export" / "paths.json", told),
    )


def _read_modules(path: Path, told: History) -> list[dict[str, str]]:
    """As they were exported, or as the run said at its start; none where there are not several paths."""
    exported: Any = None
    with suppress(OSError, ValueError):  # not exported, or only half of it
        exported = json.loads(path.read_text(encoding="utf-8"))
    for found in (exported.get("paths") if isinstance(exported, dict) else None, told.start.get("paths")):
        if isinstance(found, list) and len(found) > 1 and all(isinstance(row, dict) for row in found):
            return found
    return []


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}; restore it, or leave this run out") from error
    if not isinstance(values, dict):
        return {}
    choices = values.pop("choices", {})
    return {**rundir.flat(choices), **rundir.flat(values)}


def _read_summary(directory: Path, told: History) -> dict[str, Any]:
    """summary.json; empty where there is none, or an older one since the run goes on."""
    path, metrics = directory / "summary.json", directory / "metrics.jsonl"
    if not path.is_file():
        return {}
    if not told.ended and metrics.is_file() and metrics.stat().st_mtime_ns > path.stat().st_mtime_ns:
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; delete it, and the metrics will do") from error
    return found


def _so_far(config: Mapping[str, Any], told: History) -> dict[str, Any]:
    """Of a run without a summary, what its metrics tell under the summary's keys."""
    losses = [e.loss for e in told.evaluations if e.loss is not None]
    found = {key: config[key] for key in ("name", "experiment", "islands", "workers", "inner_steps") if key in config}
    found |= {"runtime": config.get("runtime"), "wall_s": told.wall_s, "rounds": 0}
    found |= {key: told.start[key] for key in ("git_commit", "versions") if key in told.start}
    if losses:
        found |= {"initial_val_loss": losses[0], "val_loss": losses[-1]}
    if told.commits:
        last = told.commits[-1]
        found |= {
            "rounds": last.rounds_over,
            "tokens": last.tokens,
            "bytes_up": last.bytes_up,
            "bytes_down": last.bytes_down,
        }
        found |= {"bytes_inside": last.bytes_inside, "bytes_sent": last.bytes_sent}
    return found


def _labelled(runs: list[Run]) -> list[Run]:
    """With the shortest labels that tell them apart: the names, the settings that differ, the directories."""
    names = [str(run.summary.get("name") or DATE.sub("", run.directory.name)) for run in runs]
    settings = [_settings(run, differing(runs)) for run in runs]
    folders = [run.directory.name for run in runs]
    numbered = [f"{number}: {folder}" for number, folder in enumerate(folders)]
    for labels in ([run.label for run in runs], names, settings, folders, numbered):
        short = [shortened(" ".join(history.printable(label).split())) for label in labels]
        if all(short) and len(set(short)) == len(runs):
            break
    return [replace(run, label=label) for run, label in zip(runs, short, strict=True)]


def _settings(run: Run, keys: Sequence[str]) -> str:
    told = [key for key in keys if key in run.config and key != "name"]
    return ", ".join(f"{key}={run.config[key]}" for key in told)


def differing(runs: Sequence[Run]) -> list[str]:
    """The configuration keys that are not the same in all runs that have them."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if len({repr(run.config[key]) for run in runs if key in run.config}) > 1]


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Cut in the middle, where labels are most often alike."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
