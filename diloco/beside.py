"""Runs beside the one that is trained: what their validation loss was after as many inner steps of each source."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from diloco import rundir

PREFIX = "beside/"  # of keys in the record of an evaluation
# Of what a validation loss depends on, all that a configuration tells: of `data`, what is not for training alone.
SAME = ("choices.workload", "workload.prefix_tokens")
TRAINING_ONLY = ("data.batch", "data.accumulation", "data.split", "data.cache")


def check(folders: Sequence[str]) -> None:
    """Raise ValueError for one that is no run's directory."""
    for folder in folders:
        _config(Path(folder))


def dense_val_loss(folders: Sequence[str]) -> float | None:
    """At its end, of the first run with one island and one path; None where there is none, or it has no end yet."""
    for folder in folders:
        with suppress(OSError, ValueError):  # not there yet, or no more
            found = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
            if found.get("islands") == 1 and found.get("paths", 1) == 1 and found.get("val_loss") is not None:
                return float(found["val_loss"])
    return None


class Beside:
    """Their validation losses, read again where they are still trained themselves."""

    def __init__(self, folders: Sequence[str], own: Mapping[str, Any]) -> None:
        """`own`: this run's configuration as plain values. Raises ValueError where a folder is no run's directory."""
        paths = [Path(folder) for folder in dict.fromkeys(folders)]
        configs = [_config(path) for path in paths]
        labels = _labels(paths, [str(config["name"]) for config in configs], own=str(own["name"]) if paths else "")
        self._inner_steps = int(own["inner_steps"]) if paths else 0
        self._runs = [
            (label, _Losses(path / "metrics.jsonl", inner_steps=int(config["inner_steps"])))
            for label, path, config in zip(labels, paths, configs, strict=True)
        ]
        self.doubts = [  # why a loss may not be comparable
            f"metrics.beside: {label} is evaluated differently: {', '.join(differing)}"
            for label, config in zip(labels, configs, strict=True)
            if (differing := _differences(rundir.flat(own), rundir.flat(config)))
        ]

    def losses(self, record: Mapping[str, Any]) -> dict[str, float | None]:
        """`beside/LABEL` -> loss, for the record of an evaluation; None where there was none yet."""
        steps = record["round"] * self._inner_steps
        return {f"{PREFIX}{label}": run.after(steps) for label, run in self._runs}


class _Losses:
    """Those of one run, by inner steps of a source."""

    def __init__(self, path: Path, *, inner_steps: int) -> None:
        self._path, self._inner_steps = path, inner_steps
        self._nbytes = -1  # of the file when it was read
        self._found: list[tuple[int, float | None]] = []

    def after(self, steps: int) -> float | None:
        """Of the newest evaluation at or before so many steps."""
        with suppress(OSError, ValueError):  # a directory that is gone must not stop a run
            if (nbytes := self._path.stat().st_size) != self._nbytes:
                self._found, self._nbytes = self._read(), nbytes
        place = bisect_right(self._found, steps, key=lambda found: found[0])
        return self._found[place - 1][1] if place else None

    def _read(self) -> list[tuple[int, float | None]]:
        found: dict[int, float | None] = {}
        with self._path.open("rb") as file:
            for line in file:
                if b'"evaluation"' in line and line.endswith(b"\n"):
                    record = json.loads(line)
                    if record["event"] == "evaluation":  # of a round that was told twice the last counts
                        found[record["round"] * self._inner_steps] = record.get("eval/loss")
        return sorted(found.items())


def _config(folder: Path) -> dict[str, Any]:
    advice = "give directories of runs, such as runs/latest, or leave metrics.beside out"
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"metrics.beside: {folder} is no run's directory, for it has no {name}: {advice}")
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"metrics.beside: {folder}/config.yaml is not YAML ({error}): {advice}") from error
    if not isinstance(found, dict) or not {"name", "inner_steps"} <= found.keys():
        raise ValueError(f"metrics.beside: {folder}/config.yaml lacks name or inner_steps: {advice}")
    return found


def _labels(paths: Sequence[Path], names: Sequence[str], *, own: str) -> list[str]:
    """The runs' names; where some have the same, or this run's, those of their directories, or else where they are."""
    for labels in (list(names), [path.name for path in paths]):
        if max(Counter([own, *labels]).values()) == 1:
            return labels
    return [str(path) for path in paths]


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    keys = [*SAME, *(key for key in own if key.startswith("data.") and key not in TRAINING_ONLY)]
    return [f"{key}={other.get(key)}, here {own.get(key)}" for key in keys if own.get(key) != other.get(key)]
