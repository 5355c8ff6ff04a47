"""Workloads so small that whole histories can be checked by hand. Registered as workload=constant and workload=line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diloco import Result, RunConfig, seats, train
from diloco.checkpoint import read_source
from diloco.config import register
from diloco.coordinator import Coordinator
from diloco.data import Data
from diloco.events import (
    Command,
    CommitAll,
    Committed,
    Event,
    Finished,
    Joined,
    Log,
    Lost,
    Measure,
    Push,
    Received,
    Respawn,
    Run,
    Save,
    Saved,
    Started,
    Stop,
)
from diloco.messages import (
    Commit,
    IslandId,
    ModuleKey,
    Modules,
    Report,
    ShardId,
    SlotName,
    SourceId,
    State,
    Task,
    Verdict,
)
from diloco.metrics import Metrics
from diloco.runtime.local import Local
from diloco.schedule import Barrier, Schedule
from diloco.views import RunView
from diloco.workload import Batch, Corpus, Workload
from tests.light import lighten

lighten()


@dataclass
class ToyCorpus:
    """Nothing but how many shards there are."""

    shards: int
    examples: list[int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"toy").hexdigest()  # of the data, however many shards it is dealt to

    def shard_examples(self) -> list[int]:
        return self.examples

    def describe(self) -> dict[str, object]:
        return {"documents": self.shards}


class Vector(nn.Module):
    """Two parameters, `a` and `b`, that are all there is."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), start))
        self.b = nn.Parameter(torch.full((2, 2), start))


@dataclass(kw_only=True)
class Constant(Workload):
    """The gradient of shard i is `gradients[i]` everywhere, whatever the weights; NaN at chosen steps."""

    gradients: list[float] = field(default_factory=lambda: [1.0, 3.0])
    start: float = 1.0
    poisoned_steps: list[int] = field(default_factory=list)  # steps of `poisoned_shards` whose gradient is not finite
    poisoned_shards: list[int] = field(default_factory=list)
    fails_after_step: int = -1  # raises a RuntimeError in the batch of this step

    def build_model(self, seed: int) -> nn.Module:
        return Vector(self.start)

    def corpus(self, data: Data, *, seed: int, shards: int) -> Corpus:
        return ToyCorpus(shards, [10 * (i + 1) for i in range(shards)])

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        if step == self.fails_after_step:
            raise RuntimeError("the batch cannot be made")
        gradient = self.gradients[shard % len(self.gradients)]
        if step in self.poisoned_steps and shard in self.poisoned_shards:
            gradient = float("nan")
        return {"gradient": torch.full((1,), gradient)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return sum(p.sum() for p in model.parameters()) * batch["gradient"].mean(), {}  # type: ignore[return-value]

    def tokens(self, batch: Batch) -> int:
        return 1

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        return {"loss": float(sum(p.detach().sum() for p in model.parameters()))}

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "model.pt")


class Perceptron(nn.Module):
    """A small network with dropout, so that randomness counts; its first and last layers are tied."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(torch.tanh(self.first(x)))))


class Deep(nn.Module):
    """Blocks, and parameters outside them: one with a single row, and one that is not trained."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 7)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.Tanh()) for _ in range(blocks)])
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.full((3,), 0.1), requires_grad=False)
        self.leave = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.leave(x) * self.scale + self.frozen.sum()


@dataclass(kw_only=True)
class Line(Workload):
    """Regression on random points: a different shard has different points."""

    dropout: float = 0.0
    batch_size: int = 8
    examples: int = 1000
    blocks: int = 0  # of a deeper model

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Deep(self.blocks) if self.blocks else Perceptron(self.dropout)

    def corpus(self, data: Data, *, seed: int, shards: int) -> Corpus:
        return ToyCorpus(shards, [self.examples] * shards)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * shard + step)
        x = torch.randn(self.batch_size, 4, generator=generator)
        return {"x": x, "y": x.flip(1).sin() + 0.1 * shard}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return (model(batch["x"]) - batch["y"]).square().mean(), {}

    def tokens(self, batch: Batch) -> int:
        return len(batch["x"])

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            loss, _ = self.loss(model, self.batch(corpus, ShardId(0), 10**6))
        model.train()
        return {"loss": float(loss)}

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "model.pt")


@dataclass(kw_only=True)
class Remembering(Line):
    """A workload with state of its own: how many batches its source has seen."""

    def __post_init__(self) -> None:
        self._seen = torch.zeros(())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self._seen += 1
        loss, _ = super().loss(model, batch)
        return loss * (1 + 0.01 * self._seen), {"seen": float(self._seen)}

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        seen = self._seen.clone()  # a function of its arguments: it neither counts nor is counted
        self._seen.zero_()
        found = super().evaluate(model, corpus, split)
        self._seen.copy_(seen)
        return found

    def state(self) -> State:
        return State(tensors={"seen": self._seen}, meta={"kind": "count"})

    def load_state(self, state: State) -> None:
        assert state.meta == {"kind": "count"}
        self._seen = state.tensors["seen"].clone()


register(group="workload", name="constant", node=Constant)
register(group="workload", name="line", node=Line)
register(group="workload", name="remembering", node=Remembering)


@dataclass(kw_only=True)
class Signalling(Line):
    """Sends a signal in the batch of one step, once: while `file` exists; to the process named in it, else its own.

    In the batch of another step, or first of all in the same one, it waits for `gate` to exist.
    """

    file: str = ""
    at_shard: int = 0
    at_step: int = 0
    number: int = 9  # SIGKILL
    gate: str = ""
    gate_shard: int = 0
    gate_step: int = -1
    at_worker: int = 0  # of the island
    at_evaluation: int = 0  # in the place of a batch: of the evaluator's, counted from 1

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        if (shard, step) == (self.gate_shard, self.gate_step):
            wait_for(Path(self.gate).exists, limit_s=200.0)
        worker = dist.get_rank() if dist.is_initialized() else 0
        if not self.at_evaluation and (shard, step, worker) == (self.at_shard, self.at_step, self.at_worker):
            self._signal()
        return super().batch(corpus, shard, step)

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        self._evaluations = getattr(self, "_evaluations", 0) + 1
        if self._evaluations == self.at_evaluation:
            self._signal()
        return super().evaluate(model, corpus, split)

    def _signal(self) -> None:
        path = Path(self.file)
        if path.is_file():
            process = int(path.read_text() or os.getpid())
            path.unlink()
            os.kill(process, self.number)


@dataclass(kw_only=True)
class WithBatchNorm(Line):
    """A model that no island accepts."""

    def build_model(self, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@dataclass(kw_only=True)
class FailingInRank1(Line):
    """One worker alone finds a mistake; the other waits for its gradients."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ValueError("this batch is not one")
        return super().loss(model, batch)


register(group="workload", name="failing_in_rank1", node=FailingInRank1)
register(group="workload", name="signalling", node=Signalling)
register(group="workload", name="with_batch_norm", node=WithBatchNorm)


def wait_for(condition: Callable[[], bool], *, limit_s: float = 180.0) -> None:
    """Look again and again. TimeoutError where it takes too long."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > limit_s:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.05)


# --- a run of a toy workload in this process, and what it left behind ---


def launch(directory: Path, **settings: Any) -> Result:
    """A run in `directory`: three rounds of six steps in segments of two, in runtime `local` unless said otherwise."""
    given: dict[str, Any] = {"workload": Line(), "runtime": Local(), "metrics": Metrics(live=False)}
    given |= {"rounds": 3, "inner_steps": 6, "segment_steps": 2}
    return train(RunConfig(**{**given, **settings}), directory)


def digests(result: Result) -> tuple[str, str]:
    """Of the weights and of the outer state."""
    return result.summary["weights_sha256"], result.summary["outer_state_sha256"]


def records(directory: Path, *events: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of these events or of all, but not half a line that is being written."""
    whole, _, _ = (directory / "metrics.jsonl").read_bytes().rpartition(b"\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if not events or line["event"] in events]


def logged(directory: Path) -> list[str]:
    """The lines of log.txt, without the time, round and version before them."""
    lines = (directory / "log.txt").read_text().splitlines()
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d round \d+ version \d+: ", "", line, count=1) for line in lines]


def warned(directory: Path) -> list[str]:
    """The messages of a run's warnings."""
    return [record["message"] for record in records(directory, "warning")]


def assert_same_sources(found: Path, expected: Path, *, rounds: int, sources: int = 2) -> None:
    """The checkpoints of these runs, one a round, have every source to the bit."""
    for round_ in range(1, rounds + 1):
        name = f"checkpoints/round-{round_:06d}"
        for source in map(SourceId, range(sources)):
            mine, theirs = (read_source(str(directory / name), source) for directory in (found, expected))
            assert mine is not None and theirs is not None
            assert all(torch.equal(mine.tensors[key], value) for key, value in theirs.tensors.items())


# --- a runtime without islands, to drive a coordinator by events ---

Asked: TypeAlias = Run | Push | Measure | Save | Respawn


def make_view(*, islands: int = 2, slots: Sequence[str] = ("whole.0", "whole.1"), **settings: Any) -> RunView:
    """A run at its start: three rounds of six steps in segments of two, evaluated and saved after each."""
    path = {SlotName(slot): ModuleKey(f"{slot}/0") for slot in slots}
    modules = Modules(
        slots={slot: (f"{slot}.weight",) for slot in path},
        paths=(path,),
        shards={key: index for index, key in enumerate(path.values())},
    )
    given = {"seed": 0, "rounds": 3, "inner_steps": 6, "segment_steps": 2, "eval_every": 1, "save_every": 1}
    examples = [10 * (i + 1) for i in range(islands)]
    view = RunView(paths=modules.paths, shard_examples=examples, **{**given, **settings})
    seats.begin(view, modules, islands)
    return view


class FakeRuntime:
    """Keeps what a coordinator asks for, and answers it in an order that the test chooses, or at random."""

    def __init__(self, view: RunView, schedule: Schedule | None = None, *, seed: int = 0) -> None:
        self.view = view
        self.coordinator = Coordinator(schedule=schedule or Barrier(), run=view)
        self.said: list[Command] = []  # all commands, in their order
        self.asked: list[Asked] = []  # those not answered yet
        self.stop: Stop | None = None
        self.bad: set[tuple[int, int]] = set()  # (source, round) of contributions that are not finite
        self._random = random.Random(seed)
        self._now_s = 0.0

    def start(self) -> list[Command]:
        """The first event."""
        return self.tell(Started(now_s=self.now_s()))

    def tell(self, event: Event) -> list[Command]:
        """Have the coordinator handle an event."""
        commands = self.coordinator.handle(event)
        for command in commands:
            self.said.append(command)
            if isinstance(command, Asked):
                self.asked.append(command)
            elif isinstance(command, Stop):
                assert self.stop is None, "stopped twice"
                self.stop = command
            elif isinstance(command, CommitAll):
                self.commit(command)
        return commands

    def now_s(self) -> float:
        self._now_s += 1.0
        return self._now_s

    def answer(self, command: Asked) -> list[Command]:
        """Carry out one command that was asked for, and tell the coordinator."""
        index = next(i for i, other in enumerate(self.asked) if other is command)
        del self.asked[index]
        match command:
            case Run():
                return self.tell(Finished(now_s=self.now_s(), report=self.report(command.task)))
            case Push(task=task):
                verdicts = self.verdicts(task)
                return self.tell(
                    Received(
                        now_s=self.now_s(),
                        turn=task.turn,
                        verdicts=verdicts,
                        attempt=task.attempt,
                    )
                )
            case Measure():
                return self.tell(Committed(now_s=self.now_s(), stats=()))
            case Save():
                return self.tell(Saved(now_s=self.now_s(), path=command.name, seconds=1.0))
            case Respawn():
                return self.tell(Joined(now_s=self.now_s(), island=command.island))

    def lose(self, island: int) -> list[Command]:
        """An island dies with all that it was given."""
        self.asked = [c for c in self.asked if not (isinstance(c, Run) and c.task.island == island)]
        return self.tell(Lost(now_s=self.now_s(), island=IslandId(island), reason="gone"))

    def ready(self, *hold: type[Command]) -> list[Asked]:
        """What can be answered now: of each island's tasks the first; nothing of the types in `hold`."""
        busy: set[int] = set()
        found: list[Asked] = []
        for command in self.asked:
            if isinstance(command, Run):
                if command.task.island in busy:
                    continue
                busy.add(command.task.island)
            if not isinstance(command, hold):
                found.append(command)
        return found

    def go(self, *hold: type[Command], until: Callable[[], bool] = lambda: False) -> None:
        """Answer at random until the run stops, `until` holds, or nothing but `hold` is left."""
        while self.stop is None and not until() and (ready := self.ready(*hold)):
            self.answer(self._random.choice(ready))

    def tasks(self, island: int | None = None) -> list[Task]:
        """The training tasks given out so far, in their order."""
        given = [c.task for c in self.said if isinstance(c, Run) and c.task.steps > 0]
        return [task for task in given if island is None or task.island == island]

    def commits(self) -> list[Commit]:
        """All outer steps so far."""
        return [commit for c in self.said if isinstance(c, CommitAll) for commit in c.commits]

    def logged(self, event: str) -> list[Mapping[str, Any]]:
        """The records of one kind."""
        return [c.record for c in self.said if isinstance(c, Log) and c.record["event"] == event]

    # --- what tests with real islands and stores override ---

    def report(self, task: Task) -> Report:
        """Ten tokens a step; the loss of an evaluation is its round."""
        metrics = {} if task.evaluate is None else {"eval/loss": float(task.round)}
        sent, got = 100 * len(task.send), 100 * len(task.install)
        return Report(
            task=task,
            tokens=10 * task.steps,
            seconds=0.5 * task.steps,
            clock_s=0.5 * task.steps,
            waiting_s=0.25 * task.steps,
            bytes_up=sent,
            bytes_down=got,
            metrics=metrics,
        )

    def verdicts(self, task: Task) -> tuple[Verdict, ...]:
        """Bad ones are not finite in their last module only."""
        keys = [task.modules[slot] for slot in task.send]
        good = (task.source, task.round) not in self.bad
        return tuple(
            Verdict(
                module=key,
                source=task.source,
                round=task.round,
                finite=good or key != keys[-1],
                shape_ok=True,
                norm=1.0,
            )
            for key in keys
        )

    def commit(self, command: CommitAll) -> None:
        """Nothing is there to be changed."""
