"""Workloads of the benchmarks, which keep pace with the other side: workload=paced_causal_lm and workload=idle."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diloco.config import register
from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads.causal_lm import CausalLM
from experiments.benchmarks.pace import Pace

TENSORS = 24  # so that 2, 3, 4, 6, 8 or 12 shards hold the same number of bytes


@dataclass(kw_only=True)
class PacedCausalLM(CausalLM):
    """Language modelling as it is, but for the notes of when steps began."""

    folder: str = ""
    block_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pace = Pace(folder=self.folder, side="ours", block_steps=self.block_steps)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """Waits where it is not this side's turn."""
        self._pace.step(shard, step)
        return super().batch(corpus, shard, step)


class Nothing:
    """A corpus without data."""

    def __init__(self, shards: int) -> None:
        self._shards = shards

    @property
    def sha256(self) -> str:
        """Of no bytes."""
        return hashlib.sha256().hexdigest()

    def shard_examples(self) -> list[int]:
        """One each."""
        return [1] * self._shards

    def describe(self) -> dict[str, object]:
        """Nothing."""
        return {}


class Block(nn.Module):
    """Parameters in equal tensors that nothing is computed with."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        rows = math.isqrt(parameters // TENSORS)
        sizes = [(rows, parameters // TENSORS // rows)] * TENSORS
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])


@dataclass(kw_only=True)
class Idle(Workload):
    """Inner steps that cost nothing: no parameter gets a gradient, so optimizers pass over them.

    The first one of a round sleeps, since what is done beside the training has all of it for its time.
    """

    parameters: int = 25_000_000
    round_steps: int = 2
    rest_s: float = 0.0
    folder: str = ""
    block_steps: int = 1

    def __post_init__(self) -> None:
        self._pace = Pace(folder=self.folder, side="ours", block_steps=self.block_steps)

    def build_model(self, seed: int) -> nn.Module:
        """The same values everywhere."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Block(self.parameters)

    def corpus(self, data: Data, *, seed: int, shards: int) -> Corpus:
        """None."""
        return Nothing(shards)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """Waits where it is not this side's turn."""
        self._pace.step(shard, step)
        if step % self.round_steps == 0:
            time.sleep(self.rest_s)
        return {"x": torch.zeros(1)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Zero, of no parameter."""
        return batch["x"].sum().requires_grad_(), {}

    def tokens(self, batch: Batch) -> int:
        """One."""
        return 1

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """Zero."""
        return {"loss": 0.0}

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Nothing."""


register(group="workload", name="paced_causal_lm", node=PacedCausalLM)
register(group="workload", name="idle", node=Idle)
