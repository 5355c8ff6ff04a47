"""A run's directory: its name, the link to the newest one, its configuration with flat keys, and the environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RUNS = Path("runs")
TAIL_BYTES = 1 << 20  # of metrics.jsonl that tell what was done last


def new_directory(name: str) -> Path:
    """`runs/<date>_<time>_<name>`, not made yet; waits for the next second where it is taken."""
    while (path := RUNS / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}").exists():
        time.sleep(0.1)
    return path.absolute()


def point_latest(directory: Path) -> None:
    """Make `latest` beside the run point at it; nothing where the file system has no links."""
    link = directory.parent / "latest"
    temporary = directory.parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(directory.name)
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)


def candidates(name: str) -> list[Path]:
    """The directories of runs of this name, the newest first."""
    return sorted((path.absolute() for path in RUNS.glob(f"*_{name}") if path.is_dir()), reverse=True)


def last_records(directory: Path, *, tail_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The whole lines at the end of a run's metrics.jsonl; none where there is no such file."""
    found = []
    with suppress(OSError), (directory / "metrics.jsonl").open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - tail_bytes, 0))
        for line in file:
            with suppress(ValueError):  # the first and the last may be cut
                found.append(json.loads(line))
    return found


def last_start(directory: Path) -> dict[str, Any]:
    """What the last process of a run told when it began, wherever in metrics.jsonl that is; empty where none did."""
    found: dict[str, Any] = {}
    with suppress(OSError), (directory / "metrics.jsonl").open("rb") as file:
        for line in file:
            if b'"event": "start"' in line:
                with suppress(ValueError):  # cut
                    found = json.loads(line)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def environment() -> dict[str, object]:
    """Versions of what the result depends on, and the commit of the code."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "ray", "transformers")}
    return {"git_commit": _git_commit(), "versions": {"python": platform.python_version(), **packages}}


def _git_commit() -> str | None:
    """The commit of the checkout that this code lies in; None where it is installed without one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
