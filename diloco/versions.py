"""Which version of the project this process runs: nodes of a cluster have to have the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

PACKAGES = ("diloco", "dipaco")
SHOWN = 8  # hexadecimal digits


def own() -> str:
    """The version and a digest of the sources, such as `0.1.0 (sources 3f2a91bc)`."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{importlib.metadata.version('diloco')} (sources {digest.hexdigest()[:SHOWN]})"


def check(driver: str, host: str) -> None:
    """Raise ValueError, naming both, where the driver of a run has another version than this process."""
    if driver != (here := own()):
        raise ValueError(
            f"node {host} has diloco {here}, and the driver {driver}; install the same version on all nodes"
        )
