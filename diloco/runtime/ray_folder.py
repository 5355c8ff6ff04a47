"""Whether the folder of checkpoints is the same on all nodes of a cluster."""

from __future__ import annotations

from collections.abc import Mapping

from diloco import checkpoint as ckpt
from diloco.runtime.ray_island import RayIsland
from diloco.runtime.ray_refs import get


def check(folder: str, there: Mapping[str, RayIsland]) -> None:
    """Raise ValueError where `folder` cannot be written to, or is another one to an island of `there`, by host."""
    try:
        with ckpt.probe(folder) as file:
            asked = {host: island.sees(file) for host, island in there.items()}
            blind = [host for host, ref in asked.items() if not get(ref)]
    except OSError as error:
        raise ValueError(f"checkpoints cannot be written to {folder}: {error}; give checkpoint.path another") from error
    if blind:
        raise ValueError(
            f"{folder} is another folder on {', '.join(sorted(blind))}: checkpoints need one that all nodes see; start"
            " in one, or give checkpoint.path= (a folder or an fsspec URL)"
        )
