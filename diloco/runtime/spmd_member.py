"""What each process of runtime `spmd` does on rank 0's orders: it is a worker of an island, and its first worker also
holds a part of the store.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import torch
from torch._C._distributed_c10d import PrefixStore

from diloco import checkpoint as ckpt
from diloco import workers
from diloco.events import CommitAll, Measure, Push, Run
from diloco.island import Island
from diloco.messages import (
    EVALUATOR,
    Contribution,
    IslandId,
    ModuleKey,
    Snapshot,
    SourceId,
    State,
    Task,
    Turn,
)
from diloco.runtime.base import LOADED, Job, placed
from diloco.runtime.spmd_exchange import Exchange, Transfer
from diloco.runtime.spmd_orders import Adopt, Answer, Build, Fill, Finish, Go, Hello, Load, Order, SetUp, Write
from diloco.runtime.spmd_start import Meeting, Place, Roster
from diloco.starting import StartingValues

INTERFACE = "GLOO_SOCKET_IFNAME"


class Member:
    """A worker of an island, and a shard or more of the store. All members get the same orders, in the same order."""

    def __init__(self, hello: Hello, meeting: Meeting, place: Place) -> None:
        self._job, self._timeout_s, self._meeting = hello.job, hello.timeout_s, meeting
        self._roster = Roster(self._job.workers)
        self._number, self._worker = self._roster.find(place.rank)
        self._rank, self._leads = place.rank, self._worker == 0
        self._device = _device(self._job, place)
        self._threads_before, self._interface_before = torch.get_num_threads(), os.environ.get(INTERFACE)
        torch.set_num_threads(self._job.threads_per_worker)
        self._exchange: Exchange | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Future[tuple[dict[str, str], str]]] = []
        self._frozen: dict[tuple[SourceId, int], State] = {}  # by source and round
        self._tasks: dict[int, deque[tuple[Task, list[Snapshot]]]] = {EVALUATOR: deque(), self._number: deque()}
        self._islands: dict[int, Island] = {}
        self._sent: dict[Turn, list[Contribution]] = {}
        self._initial: list[list[Snapshot]] = [[] for _ in self._job.workers]  # for each island, on rank 0
        self._under_way: Transfer | None = None  # contributions
        for module in self._job.imports:  # registers the user's own parts here too
            importlib.import_module(module)
        self._corpus = self._job.corpus()
        self._store = self._job.make_store()

    def carry_out(self, order: Order) -> Answer:
        """Raises ConnectionError where another process is gone."""
        answer = Answer()
        match order:
            case Build():
                self._build()
            case SetUp():
                self._modules = order.modules
                for island in self._islands.values():
                    island.setup(order.modules)
            case Fill():
                self._fill(answer)
            case Adopt():
                for number, island in self._islands.items():
                    held = island.adopt(order.digests)
                    answer.held |= {IslandId(number): held} if self._leads else {}
            case Load():
                self._load(order, answer)
            case Go():
                self._go(order, answer)
            case Finish():
                self._finish(order, answer)
        return answer

    def make_evaluator(self) -> Island:
        """On rank 0."""
        evaluator = self._job.make_island(self._corpus, workers.World(device=self._device))
        self._islands[EVALUATOR] = evaluator
        return evaluator

    def make_initial(self, init_from: str) -> None:
        """On rank 0: what all are filled with."""
        starting = StartingValues(init_from, self._modules) if init_from else None
        held = [self._held_by(island) for island in range(self._job.islands)]
        evaluator = self._islands[EVALUATOR]
        self._initial = [evaluator.initial(keys, starting.of(keys) if starting else None) for keys in held]

    def close(self) -> None:
        """Leave the others; gives torch its threads back."""
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._exchange = self._under_way = None
        if self._job.workers[self._number] > 1:
            workers.leave()
            if self._interface_before is None:
                os.environ.pop(INTERFACE, None)
        torch.set_num_threads(self._threads_before)

    def _build(self) -> None:
        size, host = self._job.workers[self._number], self._meeting.host
        if self._leads:
            self._exchange = Exchange(
                self._meeting, island=self._number, islands=self._job.islands, timeout_s=self._timeout_s
            )
        world = workers.World(device=self._device)
        if size > 1:
            store = PrefixStore(f"island-{self._number}", self._meeting.store)
            shared = self._job.gpus_per_worker < 1
            world = workers.join(store, host=host, rank=self._worker, size=size, device=self._device, shared=shared)
        self._islands[self._number] = self._job.make_island(self._corpus, world)

    def _load(self, order: Load, answer: Answer) -> None:
        if self._leads:
            self._store.load_state(ckpt.read_modules(order.checkpoint, self._held_by(self._number)))
        island = self._islands[self._number]
        for source in [source for source, number in order.sources.items() if number == self._number]:
            state = ckpt.read_source(order.checkpoint, source, island.empty)
            if state is not None:
                island.load(source, state)
                self._freeze(source, LOADED)  # it may have no more to do before the next checkpoint
                answer.loaded.append(source)

    def _fill(self, answer: Answer) -> None:
        if self._exchange is not None:
            answer.filled = self._store.fill(self._exchange.begin(self._initial).wait()[0])
        self._initial = []

    def _finish(self, order: Finish, answer: Answer) -> None:
        if self._exchange is not None:
            mine = self._own(order.wants)
            to = [mine if island == 0 else [] for island in range(self._job.islands)]
            answer.values = [snapshot for part in self._exchange.begin(to).wait() for snapshot in part]
        answer.digests = self._store.outer_digests()

    # --- a stretch of the run ---

    def _go(self, order: Go, answer: Answer) -> None:
        for kind, group in groupby(enumerate(order.commands), lambda numbered: type(numbered[1])):
            numbered = list(group)
            if kind is not Push:
                self._judge(answer)  # what was sent comes before what is asked for later
            if kind is Run:
                self._pull([command for _, command in numbered if isinstance(command, Run)])
            elif kind is Push:
                self._push([(number, command) for number, command in numbered if isinstance(command, Push)])
            for _, command in numbered:
                match command:
                    case CommitAll():
                        for commit in command.commits:
                            if self._holder(commit.module) == self._number and self._leads:
                                self._store.commit(commit)
                    case Measure():
                        answer.stats += self._store.measure()
                    case Write():
                        self._write(command)
        self._train(self._number, answer)  # while what was sent is under way
        self._judge(answer)
        self._train(EVALUATOR, answer)
        done = [future for future in self._writing if order.write or future.done()]
        answer.written += [future.result() for future in done]
        self._writing = [future for future in self._writing if future not in done]

    def _held_by(self, island: int) -> list[ModuleKey]:
        """The modules that an island's first worker holds: those of each of its shards."""
        shards = range(island, self._job.shards, self._job.islands)
        return [key for shard in shards for key in placed(self._modules, shard)]

    def _holder(self, module: ModuleKey) -> int:
        """The island whose first worker holds a module."""
        return self._modules.shards[module] % self._job.islands

    def _pull(self, runs: Sequence[Run]) -> None:
        """Bring each task what it is to install, as the store is now; one exchange for all of them."""
        numbers = [0 if run.task.island == EVALUATOR else int(run.task.island) for run in runs]
        snapshots: list[list[Snapshot]] = [[] for _ in runs]
        if self._exchange is not None and any(run.wants for run in runs):
            to: list[dict[int, list[Snapshot]]] = [{} for _ in self._job.workers]
            for index, (run, number) in enumerate(zip(runs, numbers, strict=True)):
                to[number][index] = self._own(run.wants)
            for part in self._exchange.begin(to).wait():
                for index, found in part.items():
                    snapshots[index] += found
        for run, found in zip(runs, snapshots, strict=True):
            if run.task.island == self._number or (run.task.island == EVALUATOR and self._rank == 0):
                self._tasks[run.task.island].append((run.task, found))

    def _own(self, wants: Mapping[ModuleKey, int | None]) -> list[Snapshot]:
        """What is wanted of the modules that are held here."""
        return self._store.pull({key: have for key, have in wants.items() if self._holder(key) == self._number})

    def _push(self, pushes: Sequence[tuple[int, Push]]) -> None:
        """Begin to send what this island contributed to who holds it."""
        if self._exchange is None:
            return
        to: list[list[tuple[int, Contribution]]] = [[] for _ in self._job.workers]
        for number, push in pushes:
            if push.task.island == self._number:
                for contribution in self._sent.pop(push.task.turn):
                    to[self._holder(contribution.module)].append((number, contribution))
        self._under_way = self._exchange.begin(to)

    def _judge(self, answer: Answer) -> None:
        """Hand to the store what has been sent to it."""
        if self._under_way is not None:
            parts, self._under_way = self._under_way.wait(), None
            answer.verdicts += [(number, self._store.push(sent)) for part in parts for number, sent in part]

    def _train(self, number: int, answer: Answer) -> None:
        """Do the first task that waits, if there is one."""
        if not self._tasks[number]:
            return
        task, snapshots = self._tasks[number].popleft()
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(cuda):  # an island seeds the generator, which on rank 0 is the user's own
            report, contributions = self._islands[number].run(task, snapshots)
        if task.send and self._leads:
            self._sent[task.turn] = contributions
        if task.save:
            self._freeze(task.source, task.round)
        if self._leads:
            answer.reports.append(report)

    def _freeze(self, source: SourceId, round_: int) -> None:
        island = self._islands[self._number]
        if island.saves:
            self._frozen[source, round_] = island.export(source)

    def _write(self, command: Write) -> None:
        """In a thread of its own, from copies."""
        modules = self._store.state() if self._leads else {}
        sources = {key: state for key, state in self._frozen.items() if command.sources.get(key[0]) == key[1]}
        for source, round_ in list(self._frozen):
            if round_ <= command.sources.get(source, LOADED - 1):
                del self._frozen[source, round_]
        world = self._islands[self._number].world

        def write() -> tuple[dict[str, str], str]:
            files: dict[str, str] = {}
            try:
                files |= ckpt.write_modules(command.folder, modules)
                for (source, _), state in sources.items():
                    files |= ckpt.write_source(command.folder, source, state, world)
            except OSError as error:
                return {}, str(error)
            return files, ""

        self._writing.append(self._writer.submit(write))


def _device(job: Job, place: Place) -> torch.device:
    """Workers of one machine have its GPUs in turn."""
    if job.gpus_per_worker <= 0:
        return torch.device("cpu")
    device = torch.device("cuda", int(place.local_rank * job.gpus_per_worker + 1e-6))
    torch.cuda.set_device(device)
    return device
