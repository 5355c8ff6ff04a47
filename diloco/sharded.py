"""Sources whose tensors are spread over the workers of an island, in checkpoints: torch.distributed.checkpoint.

Each worker writes its own rows as safetensors, without pickle; they are read back for any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from diloco.checkpoint import SHARDED, Empty
from diloco.messages import State
from diloco.workers import World


def write(folder: str, state: State, world: World) -> dict[str, str]:
    """Write this worker's part of a state; all workers of the island call it. Returns file name -> SHA-256."""
    with _local(folder, upload=True) as local:
        storage = HuggingFaceStorageWriter(str(local), save_distributed=True)
        try:
            save(dict(state.tensors), storage_writer=storage, process_group=world.checkpoints)
        except CheckpointException as failed:
            first, _ = next(iter(failed.failures.values()))
            raise OSError(f"{type(first).__name__}: {first}") from failed
        if world.rank == 0:
            (local / SHARDED).write_text(json.dumps(state.meta))
        mine = [local / SHARDED] if world.rank == 0 else []
        mine += local.glob(f"shard-{world.rank + 1:05d}-*")
        return {path.name: _digest(path) for path in mine}


def read(folder: str, empty: Empty) -> State:
    """The state that `write` wrote, each tensor in what `empty` gives for it."""
    with _local(folder, upload=False) as local:
        found: Any = HuggingFaceStorageReader(str(local)).read_metadata()
        tensors = {
            name: empty(name, tuple(entry.size), entry.properties.dtype)
            for name, entry in found.state_dict_metadata.items()
        }
        reader = HuggingFaceStorageReader(str(local))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each reads for itself
            load(tensors, storage_reader=reader, no_dist=True)
        return State(tensors=tensors, meta=json.loads((local / SHARDED).read_text()))


@contextmanager
def _local(folder: str, *, upload: bool) -> Iterator[Path]:
    """The folder itself where it is a local one; else a temporary one, copied from or to it."""
    fs, plain = fsspec.core.url_to_fs(folder)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield Path(plain)  # made by the writer, whose errors all workers get
        return
    with tempfile.TemporaryDirectory() as temporary:
        if not upload:
            fs.get(f"{plain}/", temporary, recursive=True)
        yield Path(temporary)
        if upload:
            fs.makedirs(plain, exist_ok=True)
            for path in Path(temporary).iterdir():
                fs.put_file(str(path), f"{plain}/{path.name}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
