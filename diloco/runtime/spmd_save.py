"""A checkpoint of runtime `spmd`, to which each process adds its share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from diloco.checkpoint import CheckpointFolder
from diloco.events import Saved


class Saving:
    """On rank 0: which files are there, and what went wrong."""

    def __init__(self, root: str, name: str, manifest: Mapping[str, Any], *, keep: int, shares: int) -> None:
        """`shares`: from how many processes."""
        self._all, self._name, self._manifest, self._keep = CheckpointFolder(root), name, manifest, keep
        self._missing, self._start_s = shares, time.monotonic()
        self._files: dict[str, str] = {}
        self._error = ""
        self.folder = self._all.temporary(name)  # where the shares go

    def begin(self) -> bool:
        """Make room; whether that went well."""
        try:
            self._all.begin(self._name)
        except OSError as failure:
            self._error = str(failure)
        return not self._error

    def add(self, files: Mapping[str, str], error: str) -> bool:
        """One process has written its share; whether it was the last one."""
        self._files |= files
        self._error = self._error or error
        self._missing -= 1
        return self._missing == 0

    def end(self, now_s: float) -> Saved:
        """Complete the checkpoint, or give it up."""
        error = self._all.conclude(self._name, self._manifest, self._files, keep=self._keep, error=self._error)
        path, seconds = f"{self._all.root}/{self._name}", time.monotonic() - self._start_s
        return Saved(now_s=now_s, path=path, seconds=seconds, error=error)
