"""A journal of all that a store was sent and did, on disk; and the same outer steps taken again from it.

A module of parts of one's own: `--import experiments.journal`, with DILOCO_JOURNAL naming a folder in the environment
of all processes. It shows what no summary can: that after any faults the store holds what the contributions that
counted make of the starting values, each once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diloco.messages import Commit, Contribution, ModuleKey, Payload, Snapshot, SourceId, State, Verdict
from diloco.runtime.base import Job
from diloco.store import ModuleStore

FOLDER = "DILOCO_JOURNAL"  # variable of the environment
LENGTH_BYTES = 8  # of a header, little-endian, before it


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One thing that happened to a shard of the store: filled, pushed, committed or loaded."""

    header: Mapping[str, Any]
    body: np.ndarray[Any, np.dtype[np.uint8]]  # uint8[n_bytes]: of a payload, or empty


# --- writing, in the shards ---


def begin(folder: Path) -> BufferedIOBase | RawIOBase:
    """Keep a journal of all stores of this process in a file of its own below `folder`; the file."""
    file = (folder / f"{time.time_ns()}-{os.getpid()}.journal").open("ab", buffering=0)

    def write(kind: str, header: Mapping[str, Any], payload: Payload | None = None) -> None:
        told = json.dumps({"kind": kind, "at_ns": time.time_ns(), **header, **_told(payload)}).encode()
        content = b"" if payload is None else payload.body.tobytes()
        file.write(len(told).to_bytes(LENGTH_BYTES, "little") + told + content)  # at once: a kill leaves it whole

    fill, push, commit, load = ModuleStore.fill, ModuleStore.push, ModuleStore.commit, ModuleStore.load_state

    def filled(self: ModuleStore, snapshots: Sequence[Snapshot]) -> dict[ModuleKey, str]:
        for snapshot in snapshots:
            write("fill", {"module": snapshot.module}, snapshot.payload)
        return fill(self, snapshots)

    def pushed(self: ModuleStore, sent: Contribution) -> Verdict:
        told = {name: value for name, value in vars(sent).items() if name != "payload"}
        write("push", told, sent.payload)
        return push(self, sent)

    def committed(self: ModuleStore, order: Commit) -> int:
        chosen = self._modules[order.module].inbox.chosen(order)
        digests = [contribution.payload.sha256() for contribution, _ in chosen]
        version = commit(self, order)
        write("commit", {"order": asdict(order), "digests": digests, "version": version})
        return version

    def loaded(self: ModuleStore, states: Mapping[ModuleKey, State]) -> None:
        load(self, states)
        for key, state in states.items():
            write("load", {"module": key, "version": state.meta["version"]})

    for name, wrapper in {"fill": filled, "push": pushed, "commit": committed, "load_state": loaded}.items():
        setattr(ModuleStore, name, wrapper)
    return file


def _told(payload: Payload | None) -> dict[str, Any]:
    if payload is None:
        return {}
    return {"codec": payload.codec, "header": payload.header.decode(), "nbytes": int(payload.body.nbytes)}


# --- reading ---


def entries(folder: Path) -> list[Entry]:
    """All that was written, in the order of time. What a kill has cut off at a file's end is left out."""
    found = [entry for path in sorted(folder.glob("*.journal")) for entry in _of_file(path)]
    return sorted(found, key=lambda entry: int(entry.header["at_ns"]))


def _of_file(path: Path) -> Iterator[Entry]:
    data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
    at = 0
    while at + LENGTH_BYTES <= data.size:
        end = at + LENGTH_BYTES + int.from_bytes(data[at : at + LENGTH_BYTES].tobytes(), "little")
        header = json.loads(data[at + LENGTH_BYTES : end].tobytes()) if end <= data.size else None
        if header is None or end + header.get("nbytes", 0) > data.size:
            return
        yield Entry(header=header, body=data[end : end + header.get("nbytes", 0)])
        at = end + header.get("nbytes", 0)


class Replay:
    """The outer steps that counted in the end, taken again one after the other on a store without processes."""

    def __init__(self, job: Job, steps_a_round: Mapping[ModuleKey, int], folder: Path) -> None:
        """`job` and `steps_a_round` of the run; `folder`: its journal."""
        self._sent: dict[str, Entry] = {}  # contributions by their digest
        self._start: dict[ModuleKey, Entry] = {}
        self._commits: dict[ModuleKey, list[Entry]] = {}
        for entry in entries(folder):
            self._take(entry)
        self._store = job.make_store()
        self._store.setup(steps_a_round)

    def _take(self, entry: Entry) -> None:
        header = entry.header
        match header["kind"]:
            case "fill":
                self._start[header["module"]], self._commits[header["module"]] = entry, []
            case "push":
                self._sent[hashlib.sha256(entry.body.data).hexdigest()] = entry
            case "commit":
                self._commits[header["order"]["module"]].append(entry)
            case "load":  # what came after is lost
                kept = self._commits[header["module"]]
                del kept[header["version"] :]

    @property
    def modules(self) -> list[ModuleKey]:
        """All of them."""
        return list(self._start)

    def versions(self, key: ModuleKey) -> int:
        """How many outer steps of a module counted."""
        return len(self._commits[key])

    def states(self, key: ModuleKey) -> Iterator[dict[str, torch.Tensor]]:
        """Values and outer state of a module: at its start, and after each outer step. Valid until the next one."""
        start = self._start[key]
        self._store.fill([Snapshot(module=key, version=0, base_version=None, payload=_restored(start))])
        yield self._present(key)
        for number, entry in enumerate(self._commits[key]):
            assert entry.header["version"] == number + 1, f"{key}: a step is missing, or counted twice"
            order = entry.header["order"]
            told: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in order.items()}
            commit = Commit(**told)
            for digest, (round_, source) in zip(entry.header["digests"], commit.keys, strict=True):
                self._store.push(_contribution(self._sent[digest], commit.module, round_, source))
            self._store.commit(commit)
            yield self._present(key)

    def _present(self, key: ModuleKey) -> dict[str, torch.Tensor]:
        tensors = self._store.state()[key].tensors
        return {name: value for name, value in tensors.items() if name.startswith(("values/", "outer/"))}


def _restored(entry: Entry) -> Payload:
    header = entry.header
    return Payload(codec=header["codec"], header=header["header"].encode(), body=np.array(entry.body))


def _contribution(entry: Entry, module: ModuleKey, round_: int, source: SourceId) -> Contribution:
    told = entry.header
    assert (told["module"], told["round"], told["source"]) == (module, round_, source), "it was sent for another step"
    sent = Contribution(
        module=module,
        source=source,
        island=told["island"],
        round=round_,
        base_version=told["base_version"],
        payload=_restored(entry),
    )
    return replace(sent, attempt=told["attempt"])


if folder := os.environ.get(FOLDER):
    begin(Path(folder))
