"""Fitted parts on disk: arrays in one .npz and plain values in one .json beside it. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Doubles: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Integers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


def write(folder: Path, name: str, arrays: Mapping[str, Floats], meta: Mapping[str, object]) -> None:
    """Write `name`.npz and `name`.json into `folder`, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    (folder / f"{name}.json").write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")


def read(folder: Path, name: str) -> tuple[dict[str, Floats], dict[str, Any]]:
    """What `write` wrote. Raises ValueError where it is not there or damaged."""
    try:
        meta = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key], dtype=np.float32) for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{folder} holds no {name} that can be read ({error}): give a folder that a router was saved to"
        ) from error
    return arrays, dict(meta)
