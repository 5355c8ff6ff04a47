"""What a runtime is: it carries out the coordinator's commands and tells it what happened."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from diloco.codec import Codec
from diloco.events import CommitAll, Event, FoldAll, Measure, Push, Respawn, Run
from diloco.inner import Inner
from diloco.island import Island
from diloco.merge import Merge
from diloco.messages import EVALUATOR, Commit, Fold, IslandId, ModuleKey, Modules, Shape, SourceId, Written
from diloco.outer import OuterOptimizer
from diloco.replica import Ddp, Replica, ReplicaKind, Single
from diloco.schedule import Schedule
from diloco.store import ModuleStore
from diloco.workers import World
from diloco.workload import Corpus, Workload

if TYPE_CHECKING:
    from diloco.data import Data

Order = TypeVar("Order", Commit, Fold)

MAX_DERIVED_SHARDS = 8
LOADED = -1  # in place of a round: of a source's state that came from a checkpoint


@dataclass(kw_only=True)
class Store:
    """The module store; the Hydra group `store`."""

    shards: int = 0  # actors that the store is spread over; 0 = as many as islands, at most 8
    norm_mads: float = 6.0  # by so many MADs a contribution's log norm may be above the median of the last; 0 = any

    def __post_init__(self) -> None:
        if self.shards < 0:
            raise ValueError(f"store.shards={self.shards} must not be negative (0 = derived from islands)")
        if not 0 <= self.norm_mads < float("inf"):
            raise ValueError(f"store.norm_mads={self.norm_mads} must not be negative; 0 accepts any norm")

    def resolved(self, islands: int) -> int:
        """How many shards there are."""
        return self.shards or min(islands, MAX_DERIVED_SHARDS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of a run, as every process of it gets them."""

    workload: Workload
    data: Data
    inner: Inner
    merge: Merge
    outer: OuterOptimizer
    codec: Codec
    codec_down: Codec
    seed: int
    workers: tuple[int, ...]  # of each island
    replica: ReplicaKind
    shards: int
    total_steps: int
    threads_per_worker: int
    gpus_per_worker: float
    imports: tuple[str, ...]
    schedule: Schedule
    sources: int = 0  # that contribute, each with a shard of the data; 0 = as many as islands
    moving: bool = False  # they go from island to island: what belongs to one is kept between its tasks
    min_islands: int = 0  # for which there has to be room at the start; 0 = all
    goes_on: bool = False  # after a loss: the rest of the cluster is enough, and room for `min_islands` is waited for
    patience: float = 0.0  # see diloco/patience.py
    pauses_s: tuple[float, ...] = ()  # after each inner step of an island, to make it slow; () = none

    @property
    def islands(self) -> int:
        """How many there are."""
        return len(self.workers)

    def corpus(self) -> Corpus:
        """The prepared corpus, from the cache of this machine where it is there."""
        return self.workload.corpus(self.data, seed=self.seed, shards=self.sources or self.islands)

    def make_island(self, corpus: Corpus, world: World, number: IslandId = EVALUATOR) -> Island:
        """An island, or the evaluator; where it has several workers, what one of them holds."""
        workload = copy.deepcopy(self.workload)  # it may keep state of its source
        return Island(
            workload=workload,
            corpus=corpus,
            inner=self.inner,
            codec=self.codec,
            codec_down=self.codec_down,
            replica=self._make_replica(workload.build_model(self.seed), world),
            accumulation=self.data.accumulation,
            seed=self.seed,
            total_steps=self.total_steps,
            pause_s=self.pauses_s[number] if self.pauses_s and number != EVALUATOR else 0.0,
        )

    def _make_replica(self, model: nn.Module, world: World) -> Replica:
        if world.size == 1:  # has all of the model whatever the kind
            return Single(model, world)
        if self.replica is ReplicaKind.ddp:
            return Ddp(model, world)
        from diloco.fsdp2 import Fsdp2  # a second of imports that others need not

        return Fsdp2(model, world)

    def steps_a_round(self, modules: Modules) -> dict[ModuleKey, int]:
        """How many outer steps each module takes in a round."""
        replicas = (self.sources or self.islands) // len(modules.paths)
        through = Counter(key for path in modules.paths for key in path.values())
        return {key: self.schedule.commits_a_round(paths * replicas) for key, paths in through.items()}

    def make_store(self) -> ModuleStore:
        """One shard of the store, empty."""
        return ModuleStore(outer=self.outer, merge=self.merge, codec=self.codec, codec_down=self.codec_down)


@dataclass(frozen=True, kw_only=True)
class Final:
    """What the evaluator and the store say at the end."""

    parameters: int  # frozen ones too
    weights_sha256: str
    outer_digests: dict[str, str]
    written: Written


class StoreLost(RuntimeError):
    """More is lost than islands: the run can go on from its newest checkpoint only."""


class Abandoned(RuntimeError):
    """The process that drives the run is gone, or gave it up and says why; this one has nothing to add but its text."""


class Backend(ABC):
    """The processes of one run. Used in the order of the methods; `close` in any case."""

    relocates = False  # an interruption was asked for by the backend, so that the run goes on elsewhere

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Start what is needed to know the model, and tell its trainable parameters."""

    @abstractmethod
    def setup(self, modules: Modules) -> None:
        """Start islands and shards, and tell them the layout."""

    def absent(self) -> frozenset[IslandId]:
        """Islands for which there was no place yet; each is told of by a `Joined`."""
        return frozenset()

    def check_folder(self, folder: str) -> None:
        """Raise ValueError where `folder`, in which checkpoints are to be kept, is not the same to all processes."""
        return None

    @abstractmethod
    def fill(self, init_from: str) -> Mapping[IslandId, list[ModuleKey]]:
        """Fill the store with the model's initial values, or with those of `starting.StartingValues`.

        Returns who has them already, having built the same model: of which modules.
        """

    @abstractmethod
    def load(self, checkpoint: str, sources: Mapping[SourceId, int], now_s: float) -> None:
        """Give store and islands what a checkpoint holds; the clock goes on from `now_s`.

        `sources`: source -> the island that lends it its workers. Where sources move, what belongs to them is kept.
        """

    @abstractmethod
    def carry_out(self, command: Run | Push | FoldAll | CommitAll | Measure | Respawn) -> None:
        """Begin what the coordinator asked for; what was asked for earlier takes effect first."""

    @abstractmethod
    def save(self, root: str, name: str, manifest: Mapping[str, Any], keep: int) -> None:
        """Begin to write a checkpoint of the store as it is after all commands so far."""

    @abstractmethod
    def next_event(self, wake_s: Callable[[], float | None]) -> Event:
        """Wait for the next thing that happens: a `Tick` where it is nothing up to `wake_s()`, if it tells a time."""

    @abstractmethod
    def now_s(self) -> float:
        """The runtime's clock."""

    @abstractmethod
    def interrupt(self) -> None:
        """Make the next event an `Interrupted`. Called by a signal handler."""

    @abstractmethod
    def finish(self, present: Run, folder: str | None, prompt: str) -> Final:
        """Have the evaluator install the global weights, digest them, and export to `folder` where one is given."""

    def sinks(self, run: str) -> list[Any]:
        """What else takes the records of metrics.jsonl."""
        return []

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Tell processes that follow this one what the run came to; `close` is next."""
        return None

    @abstractmethod
    def close(self) -> None:
        """End all processes and free what they held. Never raises for what is already gone."""


@dataclass(kw_only=True)
class Runtime(ABC):
    """Where the parts of a run live; the Hydra group `runtime`."""

    waits_for_all: ClassVar[bool] = False  # no island may be late, or missing
    loses_islands: ClassVar[bool] = False  # nodes come and go, and islands with them

    def suited(self, schedule: Schedule) -> Schedule:
        """The schedule as it is to be followed here. Raises ValueError where it cannot be."""
        return schedule

    def follow(self, workers: tuple[int, ...]) -> Mapping[str, Any] | None:
        """Where another process drives this run: work for it to its end, and return the summary; else None.

        Raises Abandoned where that process came to no end.
        """
        return None

    @abstractmethod
    def open(self, job: Job) -> Backend:
        """Check that `job` can run here (ValueError: what was asked, what there is) and prepare to start it."""


def one_each(key: str, numbers: Sequence[float], islands: int) -> None:
    """Raise ValueError where `numbers`, if there are any, are not one for each island."""
    if numbers and len(numbers) != islands:
        raise ValueError(f"{key} has {len(numbers)} numbers for {islands} islands; give one each")


def placed(modules: Modules, shard: int) -> list[ModuleKey]:
    """The modules that a shard of the store holds."""
    return [key for key, holder in modules.shards.items() if holder == shard]


def by_shard(modules: Modules, orders: Iterable[Order]) -> dict[int, list[Order]]:
    """What is asked of each shard of the store: the orders about modules that it holds."""
    found: dict[int, list[Order]] = {}
    for order in orders:
        found.setdefault(modules.shards[order.module], []).append(order)
    return found
