"""What an outer round is made of, part by part, with islands on a GPU (or the CPU) and a shard of the store on the CPU.

One process and one thread, without Ray: no time goes to transport. A turn trains a step, and then does for each codec
what a round does one after the other: the island makes its contributions (`contribute`), the shard judges those of all
islands (`push`), takes the outer step (`commit`) and gives out what is new (`pull`), and the island installs it
(`install`). `gpu_bytes` is what making contributions took of the GPU beside what was there. `copies` are those of all
parameters between the devices, from and to ordinary (pageable) memory, which islands and store have, and pinned memory.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from diloco import buffers
from diloco.codec import Codec, Float32, Int4, Int8, TopK
from diloco.config import RunConfig
from diloco.data import Data
from diloco.island import Island
from diloco.jobs import make_job
from diloco.messages import Commit, IslandId, Modules, ShardId, SourceId, Task
from diloco.runtime.base import Job, Store
from diloco.store import ModuleStore
from diloco.workers import World
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.presets import PRESETS
from experiments.benchmarks import common

Found = TypeVar("Found")
PARTS = ("contribute", "push", "commit", "pull", "install")
WAYS: dict[str, tuple[Codec, Codec]] = {  # up and down
    "float32": (Float32(), Float32()),
    "int8": (Int8(), Float32()),
    "int4": (Int4(), Float32()),
    "int4 both ways": (Int4(), Int4()),
    "topk": (TopK(), Float32()),
}


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("outer_parts", __doc__.partition("\n")[0])
    options.add_argument("--model", choices=sorted(PRESETS), default="60m", help="preset (60m)")
    options.add_argument("--islands", type=common.positive, default=2, help="whose contributions are merged (2)")
    options.add_argument("--ways", default=",".join(WAYS), help="codecs, with commas between (all)")
    options.add_argument("--blocks", type=common.positive, default=5, help="measured turns of each codec (5)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the island (cpu)")
    given = options.parse_args(argv)
    if given.quick:
        given.model, given.blocks = "tiny", 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees none here; use --device cpu")
    if unknown := [name for name in given.ways.split(",") if name not in WAYS]:
        raise ValueError(f"--ways {unknown[0]} is unknown; use {', '.join(WAYS)}")
    config = RunConfig(
        islands=given.islands,
        workload=CausalLM(model=given.model),
        data=Data(tokenizer="bytes", max_tokens=200_000, batch=1, sequence_length=16),
        store=Store(shards=1),
        gpus_per_worker=float(given.device == "cuda"),
    ).resolved()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _figures(given, make_job(config), config)
    finally:
        torch.set_num_threads(threads)


def _figures(given: Any, job: Job, config: RunConfig) -> dict[str, Any]:
    corpus, world = job.corpus(), World(device=torch.device(given.device))
    found: dict[str, dict[str, Any]] = {}
    for name in given.ways.split(","):
        up, down = WAYS[name]
        coded = replace(job, codec=up, codec_down=down)
        island = coded.make_island(corpus, world)
        modules = config.layout.build(island.shapes(), 1)
        rounds = Rounds(island=island, store=coded.make_store(), modules=modules, codec=up, islands=given.islands)
        for _ in range(given.blocks + 1):  # the first turn warms up
            rounds.turn()
        found[name] = rounds.figures()
        common.show(f"{name}: " + " ".join(f"{key}={value}" for key, value in found[name].items()))
        parameters = island.num_parameters()
    return {
        "benchmark": "outer_parts",
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "model": given.model,
        "parameters": parameters,
        "islands": given.islands,
        "copies": _copies(parameters, given.blocks) if given.device == "cuda" else {},
        "codecs": found,
    }


@dataclass(kw_only=True)
class Rounds:
    """One island and one shard of the store, and the seconds of each turn by part."""

    island: Island
    store: ModuleStore
    modules: Modules
    codec: Codec
    islands: int

    def __post_init__(self) -> None:
        self._times: dict[str, list[float]] = defaultdict(list)
        self._round = self._gpu_bytes = self._bytes_up = self._bytes_down = 0
        self.island.setup(self.modules)
        self.store.setup(dict.fromkeys(self.modules.shards, 1))
        self.island.adopt(self.store.fill(self.island.initial(list(self.modules.shards))))

    def turn(self) -> None:
        """A step, and an outer round in which all islands contribute the same."""
        task = self._task()
        self.island.train(task, [])
        on_gpu = self.island.world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        made = self._timed("contribute", lambda: [self.island.contribution(task, slot) for slot in task.send])
        sent = [contribution for contribution in made if contribution is not None]
        self._bytes_up = sum(contribution.payload.nbytes for contribution in sent)
        if on_gpu:
            self._gpu_bytes = torch.cuda.max_memory_allocated() - before
        sources = tuple(map(SourceId, range(self.islands)))
        self._timed("push", lambda: [self.store.push(replace(c, source=source)) for source in sources for c in sent])
        commits = [
            Commit(module=c.module, round=self._round, sources=sources, weights=(1.0,) * self.islands) for c in sent
        ]
        self._timed("commit", lambda: [self.store.commit(commit) for commit in commits])
        snapshots = self._timed("pull", lambda: self.store.pull(dict.fromkeys(self.modules.shards, self._round)))
        self._bytes_down = sum(snapshot.payload.nbytes for snapshot in snapshots)
        self._timed("install", lambda: self.island.install(snapshots))
        self.store.measure()  # off the way of a round, as in a run; prepares the next outer step
        self._round += 1

    def figures(self) -> dict[str, Any]:
        """Medians without the first turn."""
        parts = {part: common.median(self._times[part][1:], digits=4) for part in PARTS}
        return {
            **{f"{part}_s": seconds for part, seconds in parts.items()},
            "round_s": common.rounded(sum(parts.values()), digits=4),
            "bytes_up": self._bytes_up,
            "bytes_down": self._bytes_down,
            "gpu_bytes": self._gpu_bytes,
        }

    def _timed(self, part: str, call: Callable[[], Found]) -> Found:
        begun_s = time.perf_counter()
        found = call()
        if self.island.world.device.type == "cuda":
            torch.cuda.synchronize()
        self._times[part].append(time.perf_counter() - begun_s)
        return found

    def _task(self) -> Task:
        """One step of a round, which contributes all."""
        return Task(
            source=SourceId(0),
            island=IslandId(0),
            round=self._round,
            segment=0,
            modules=self.modules.paths[0],
            install={},
            keep=0.0,
            shard=ShardId(0),
            first_step=self._round,
            steps=1,
            send=tuple(self.modules.slots),
            last=True,
        )


def _copies(parameters: int, blocks: int) -> dict[str, float]:
    """Seconds for all parameters in one piece, each way, from and to pageable and pinned memory."""
    device = torch.empty(parameters, device="cuda")
    memories = {"pageable": buffers.flat(parameters).zero_(), "pinned": torch.zeros(parameters, pin_memory=True)}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(blocks + 1):
        for name, memory in memories.items():
            for way, to, source in (("down", memory, device), ("up", device, memory)):
                torch.cuda.synchronize()
                begun_s = time.perf_counter()
                to.copy_(source)
                torch.cuda.synchronize()
                times[f"{name}_{way}_s"].append(time.perf_counter() - begun_s)
    return {name: common.median(found[1:], digits=4) for name, found in times.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
