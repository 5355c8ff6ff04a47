"""Checkpoints: safetensors a module and a source, one JSON manifest with a checksum of every file.

A checkpoint is written under a temporary name and renamed when its manifest is there, so that it is complete
or absent. Paths may be fsspec URLs. Nothing is pickled (pitfall L34).
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import fsspec
import safetensors.torch
import torch

from diloco.messages import ModuleKey, Modules, Shape, SourceId, State
from diloco.workers import World

Empty = Callable[[str, Shape, torch.dtype], torch.Tensor]  # name, shape, dtype -> what to read a tensor into

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a disk without room says
SEEN_TRIES, SEEN_PAUSE_S = 4, 0.5  # file systems of several nodes may lag
SHARDED = "state.json"  # of a source that is spread over the workers of an island; see diloco/sharded.py


@dataclass(kw_only=True)
class Checkpoint:
    """When and where checkpoints are written; the Hydra group `checkpoint`."""

    every: int = 10  # rounds; 0 = only at the end. One is written at the end and on an interruption in any case
    keep: int = 2  # the newest so many stay
    path: str = ""  # folder or fsspec URL that all nodes see; empty = in the run's directory

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must not be negative (0 = only at the end)")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1")


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._fs, self._path = fsspec.core.url_to_fs(self.root)
        self.problems: list[str] = []  # what `newest` found wrong with those that it passed over

    def temporary(self, name: str) -> str:
        """Where the files of checkpoint `name` are written before it is complete."""
        return f"{self.root}/{name}.tmp"

    def begin(self, name: str) -> None:
        """Make room for checkpoint `name`; leftovers of an earlier try go."""
        self._remove(f"{self._path}/{name}.tmp")
        self._fs.makedirs(f"{self._path}/{name}.tmp", exist_ok=True)

    def complete(self, name: str, manifest: Mapping[str, Any], files: Mapping[str, str], keep: int) -> str:
        """Write the manifest, rename, and drop all but the `keep` newest. Returns the checkpoint's path."""
        self._fs.invalidate_cache()  # others have written, too
        for path in files:
            if not self._fs.exists(f"{self._path}/{name}.tmp/{path}"):
                raise FileNotFoundError(f"{path} was written, and is not there: {self.root} must be seen by all nodes")
        whole = {**manifest, "files": dict(files)}
        with self._fs.open(f"{self._path}/{name}.tmp/{MANIFEST}", "w") as out:
            out.write(json.dumps({**whole, "sha256": _json_digest(whole)}, indent=1))
        replaced = self._fs.exists(f"{self._path}/{name}")
        if replaced:  # kept until the new one stands
            self._fs.mv(f"{self._path}/{name}", f"{self._path}/{name}.old.tmp", recursive=True)
        self._fs.mv(f"{self._path}/{name}.tmp", f"{self._path}/{name}", recursive=True)
        self._remove(f"{self._path}/{name}.old.tmp")
        # Later ones, which a run taken up before them has passed over, do not count and are not touched.
        for old in [other for other in self.names() if other <= name][:-keep]:
            self._remove(f"{self._path}/{old}")
        return f"{self.root}/{name}"

    def conclude(
        self, name: str, manifest: Mapping[str, Any], files: Mapping[str, str], *, keep: int, error: str
    ) -> str:
        """`complete` where there is no `error` so far, else remove what there is. Returns what went wrong, or ""."""
        try:
            if not error:
                self.complete(name, manifest, files, keep)
                return ""
        except OSError as failure:
            error = str(failure)
        self.abandon(name)
        return error

    def abandon(self, name: str) -> None:
        """Remove what there is of an incomplete checkpoint."""
        self._remove(f"{self._path}/{name}.tmp")

    def clean(self) -> None:
        """Remove what runs that were killed left half-written; one that was being replaced is put back."""
        if not self._fs.isdir(self._path):
            return
        for entry in self._fs.ls(self._path, detail=False):
            path = str(entry).rstrip("/")
            final = path.removesuffix(".old.tmp")
            if final != path and not self._fs.exists(final):
                self._fs.mv(path, final, recursive=True)
            elif path.endswith(".tmp"):
                self._remove(path)

    def names(self) -> list[str]:
        """Complete checkpoints, the oldest first."""
        if not self._fs.isdir(self._path):
            return []
        found = (str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._path, detail=False))
        complete = (n for n in found if n.startswith("round-") and not n.endswith(".tmp"))
        return sorted(n for n in complete if self._fs.exists(f"{self._path}/{n}/{MANIFEST}"))

    def newest(self) -> tuple[str, dict[str, Any]]:
        """Path and manifest of the newest checkpoint whose files are all there with their checksums.

        Raises ValueError, naming what is wrong with each, when there is none.
        """
        problems = self.problems = []
        for name in reversed(self.names()):
            manifest = self._sound(name, problems)
            if manifest is not None:
                return f"{self.root}/{name}", manifest
        raise ValueError(f"{self.root} holds no complete checkpoint" + (f": {'; '.join(problems)}" if problems else ""))

    def _sound(self, name: str, problems: list[str]) -> dict[str, Any] | None:
        try:
            with self._fs.open(f"{self._path}/{name}/{MANIFEST}", "r") as file:
                manifest: dict[str, Any] = json.load(file)
            if manifest.pop("sha256") != _json_digest(manifest):
                problems.append(f"{name}/{MANIFEST} has another checksum than it says")
                return None
            for relative, sha256 in manifest["files"].items():
                if _digest(f"{self.root}/{name}/{relative}") != sha256:
                    problems.append(f"{name}/{relative} has another checksum than its manifest says")
                    return None
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{name} cannot be read: {error}")
            return None
        return manifest

    def _remove(self, path: str) -> None:
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)


@contextmanager
def probe(folder: str) -> Iterator[str]:
    """Meanwhile there is a file in `folder` that was not there before: its path. Raises OSError."""
    fs, path = fsspec.core.url_to_fs(folder)
    above = [path, *(str(parent) for parent in PurePath(path).parents)]
    made = [part for part in above if not fs.exists(part)]
    fs.makedirs(path, exist_ok=True)
    name = f".probe-{uuid.uuid4().hex}"
    try:
        fs.pipe_file(f"{path}/{name}", b"here")
        yield f"{folder.rstrip('/')}/{name}"
    finally:
        with suppress(OSError):
            fs.rm_file(f"{path}/{name}")
        for part in made:  # the deepest first
            with suppress(OSError):
                fs.rmdir(part)


def check_writable(root: str) -> None:
    """Raise ValueError where checkpoints cannot be written below `root`."""
    try:
        with probe(root):
            pass
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            return  # which may be mended while the run goes on
        raise ValueError(f"checkpoint.path: nothing can be written to {root}: {error}; give another") from error


def sees(file: str) -> bool:
    """Whether this process sees it, perhaps a little later."""
    fs, path = fsspec.core.url_to_fs(file)
    for _ in range(SEEN_TRIES):
        if fs.exists(path):
            return True
        time.sleep(SEEN_PAUSE_S)
        fs.invalidate_cache()
    return False


def write_modules(folder: str, states: Mapping[ModuleKey, State]) -> dict[str, str]:
    """Write each module's state below `folder`. Returns relative path -> SHA-256. Raises OSError (disk full, ...)."""
    return {path: _write(f"{folder}/{path}", state) for path, state in _named(states).items()}


def write_source(folder: str, source: SourceId, state: State, world: World | None = None) -> dict[str, str]:
    """Write one source's state below `folder`. Returns relative path -> SHA-256.

    Where its tensors are spread over the workers of an island, all of them call this, each with its `world`.
    """
    if any(type(value) is not torch.Tensor for value in state.tensors.values()):  # but a DTensor
        from diloco import sharded

        assert world is not None
        files = sharded.write(f"{folder}/sources/{source}", state, world)
        return {f"sources/{source}/{name}": digest for name, digest in files.items()}
    path = f"sources/{source}/state.safetensors"
    return {path: _write(f"{folder}/{path}", state)}


def read_modules(folder: str, keys: list[ModuleKey]) -> dict[ModuleKey, State]:
    """The states that `write_modules` wrote."""
    return {key: _read(f"{folder}/{module_path(key)}") for key in keys}


def read_source(folder: str, source: SourceId, empty: Empty | None = None) -> State | None:
    """The state that `write_source` wrote, or None where that source has none.

    `empty` gives what to read a tensor of an island of several workers into: by default a full one.
    """
    fs, plain = fsspec.core.url_to_fs(f"{folder}/sources/{source}")
    if fs.exists(f"{plain}/{SHARDED}"):
        from diloco import sharded

        return sharded.read(f"{folder}/sources/{source}", empty or _full)
    whole = fs.exists(f"{plain}/state.safetensors")
    return _read(f"{folder}/sources/{source}/state.safetensors") if whole else None


def module_path(key: ModuleKey) -> str:
    """Where a checkpoint keeps a module: `slot/index` becomes `modules/slot.index.safetensors`."""
    return f"modules/{key.replace('/', '.')}.safetensors"


def describe_modules(modules: Modules, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the manifest says of the layout, to be compared by `check_layout`."""
    return {slot: {name: list(shapes[name]) for name in names} for slot, names in modules.slots.items()}


def check_layout(saved: Mapping[str, Any], modules: Modules, shapes: Mapping[str, Shape]) -> None:
    """Raise ValueError, naming the differing parameters, unless the checkpoint fits this layout and model."""
    now = describe_modules(modules, shapes)
    flat_saved = {name: (slot, shape) for slot, names in saved.items() for name, shape in names.items()}
    flat_now = {name: (slot, shape) for slot, names in now.items() for name, shape in names.items()}
    differing = [n for n in {**flat_saved, **flat_now} if flat_saved.get(n) != flat_now.get(n)]
    if differing:
        first = differing[0]
        raise ValueError(
            f"the checkpoint's layout differs in {len(differing)} parameter(s), first {first}: it has"
            f" {flat_saved.get(first, 'nothing')}, this run {flat_now.get(first, 'nothing')}; use the saved"
            " model, layout and store.shards"
        )


def _full(name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _named(states: Mapping[ModuleKey, State]) -> dict[str, State]:
    return {module_path(key): state for key, state in states.items()}


def _write(path: str, state: State) -> str:
    fs, plain = fsspec.core.url_to_fs(path)
    fs.makedirs(plain.rpartition("/")[0], exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.tensors.items()}
    data = safetensors.torch.save(tensors, metadata={"meta": json.dumps(state.meta)})
    with fs.open(plain, "wb") as out:
        out.write(data)
    return hashlib.sha256(data).hexdigest()


def _read(path: str) -> State:
    with fsspec.open(path, "rb") as file:
        data = file.read()
    length = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["meta"])
    return State(tensors=safetensors.torch.load(data), meta=meta)


def _json_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
