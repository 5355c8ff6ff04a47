"""Memory of one island in a process of its own, and the workload of random tokens: workload=drawn_causal_lm."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
from torch import nn

from diloco.codec import Float32
from diloco.config import register
from diloco.data import Data
from diloco.inner import AdamW
from diloco.layout import Layout
from diloco.merge import Mean
from diloco.messages import IslandId, Modules, ShardId, SourceId, State, Task
from diloco.outer import Nesterov
from diloco.replica import ReplicaKind
from diloco.runtime.base import Job
from diloco.schedule import Barrier
from diloco.workers import World
from diloco.workload import Batch, Corpus
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.presets import PRESETS
from experiments.benchmarks import common
from experiments.benchmarks.paced import Nothing

LENGTH = 16  # tokens of a sequence
PARTS = {"local": "parameters", "anchor": "anchors", "inner": "optimizer"}  # of what is kept of a source
ROUNDS = 2


@dataclass(kw_only=True)
class Drawn(CausalLM):
    """Language modelling on random tokens."""

    def corpus(self, data: Data, *, seed: int, shards: int) -> Corpus:  # type: ignore[override]
        """None."""
        return Nothing(shards)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """One sequence."""
        random = torch.Generator().manual_seed(1_000_003 * shard + step)
        return {"tokens": torch.randint(PRESETS[self.model].vocab_size, (1, LENGTH + 1), generator=random)}

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """Zero."""
        return {"loss": 0.0}

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Nothing."""

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """Nothing."""
        return ""


register(group="workload", name="drawn_causal_lm", node=Drawn)


def alone(layout: Layout, model: str) -> dict[str, float]:
    """Memory of this process and of the one island that it makes, where the first and the last path took turns."""
    torch.set_num_threads(1)
    paths = layout.num_paths()
    island = _job(model).make_island(Nothing(paths), World())
    modules = layout.build(island.shapes(), paths)
    island.setup(modules)
    kept: dict[SourceId, State] = {}
    for round_, source in [(round_, SourceId(source)) for round_ in range(2) for source in (0, paths - 1)]:
        if source in kept:
            island.load(source, kept.pop(source))
        snapshots = island.initial(list(modules.paths[source].values()))
        island.run(_task(source, round_, modules), snapshots)
        kept = {source: island.export(source, sheds=True)}  # of one source, which here is the island's own
    del snapshots
    gc.collect()
    parts = Counter[str]()
    uss_bytes = common.uss_bytes(os.getpid())
    for name, value in island.export(source).tensors.items():
        parts[PARTS[name.partition("/")[0]]] += value.nbytes
    return {
        **parts,
        "kept of a source": sum(value.nbytes for value in kept[source].tensors.values()),
        "island's tensors": tensor_bytes(island),
        "process USS": uss_bytes,
    }


def tensor_bytes(root: object) -> int:
    """Of all tensors that can be reached from an object; memory that several share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(root)}.values())


def _tensors(root: object) -> Iterator[torch.Tensor]:
    seen, ahead = set(), [root]
    while ahead:
        found = ahead.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | FunctionType | BuiltinFunctionType):
            continue  # through a function's globals one reaches everything
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            yield found
            ahead.append(found.grad)
        ahead += gc.get_referents(found)


def _job(model: str) -> Job:
    return Job(
        workload=Drawn(model=model),
        data=Data(),
        inner=AdamW(),
        merge=Mean(),
        outer=Nesterov(),
        codec=Float32(),
        codec_down=Float32(),
        seed=0,
        workers=(1,),
        replica=ReplicaKind.ddp,
        shards=1,
        total_steps=ROUNDS,
        threads_per_worker=1,
        gpus_per_worker=0.0,
        imports=(),
        schedule=Barrier(),
    )


def _task(source: SourceId, round_: int, modules: Modules) -> Task:
    path = modules.paths[source]
    return Task(
        source=source,
        island=IslandId(0),
        round=round_,
        segment=0,
        modules=path,
        install=dict.fromkeys(path, 0),
        keep=0.0,
        shard=ShardId(source),
        first_step=round_,
        steps=1,
        send=tuple(path),
        last=True,
    )
