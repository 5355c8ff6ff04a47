"""Workloads so small that whole histories can be checked by hand. Registered as workload=constant and workload=line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diloco.config import register
from diloco.data import Data
from diloco.messages import ShardId, State
from diloco.workload import Batch, Corpus, Workload


@dataclass
class ToyCorpus:
    """Nothing but how many shards there are."""

    shards: int
    examples: list[int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(str(self.examples).encode()).hexdigest()

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


@dataclass(kw_only=True)
class Line(Workload):
    """Regression on random points: a different shard has different points."""

    dropout: float = 0.0
    batch_size: int = 8
    examples: int = 1000

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Perceptron(self.dropout)

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

    def state(self) -> State:
        return State(tensors={"seen": self._seen}, meta={"kind": "count"})

    def load_state(self, state: State) -> None:
        assert state.meta == {"kind": "count"}
        self._seen = state.tensors["seen"].clone()


register(group="workload", name="constant", node=Constant)
register(group="workload", name="line", node=Line)
register(group="workload", name="remembering", node=Remembering)
