"""The reference of `inner_loop` and `memory`: the same training as a PyTorch loop in the plainest way.

`python -m experiments.benchmarks.bare JSON` runs it with the `Settings` in JSON, in this process or in a Ray worker.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diloco.data import Data
from diloco.inner import AdamW, RateSchedule
from diloco.messages import ShardId
from diloco.workloads.causal_lm import CausalLM
from experiments.benchmarks.pace import Pace, Side, training

LR, CLIP = 1e-3, 1.0
MAX_TOKENS = 200_000  # of the corpus: enough for what is trained on here


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides train, and in which turns."""

    folder: str
    model: str
    batch: int
    accumulation: int
    sequence_length: int
    block_steps: int
    blocks: int
    threads: int
    in_ray: bool = False  # in a worker of Ray, whose imports then take as much memory as an island's
    device: str = "cpu"  # or "cuda": in bfloat16, like an island
    compile: bool = False

    @property
    def side(self) -> str:
        """What this side is called."""
        return "bare_in_ray" if self.in_ray else "bare"

    @property
    def steps(self) -> int:
        """All of them; the last block is there to end the one before."""
        return (self.blocks + 1) * self.block_steps

    def data(self) -> Data:
        """Bytes are tokens, so that no tokenizer need be made."""
        return Data(
            tokenizer="bytes",
            max_tokens=MAX_TOKENS,
            batch=self.batch,
            accumulation=self.accumulation,
            sequence_length=self.sequence_length,
        )


def side(settings: Settings) -> Side:
    """The plain loop, in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.bare", json.dumps(asdict(settings))]
    return Side(command, folder=Path(settings.folder), side=settings.side, members=1, environment={})


def island(settings: Settings, *, shards: int) -> Side:
    """A run with one island that trains the same: each block is a round, whose outer step adopts what was trained."""
    overrides = {
        "islands": 1,
        "store.shards": shards,
        "inner_steps": settings.block_steps,
        "rounds": settings.blocks + 1,
        "threads_per_worker": settings.threads,
        "gpus_per_worker": int(settings.device == "cuda"),
        "workload.model": settings.model,
        "workload.folder": settings.folder,
        "workload.block_steps": settings.block_steps,
        "data.tokenizer": "bytes",
        "data.max_tokens": MAX_TOKENS,
        "data.batch": settings.batch,
        "data.accumulation": settings.accumulation,
        "data.sequence_length": settings.sequence_length,
        "data.eval_sequences": 1,
        "inner.lr": LR,
        "inner.clip": CLIP,
        "inner.rate": "constant",
        "inner.compile": settings.compile,
        "outer": "sgd",
        "outer.lr": 1.0,
    }
    command = training(overrides, workload="paced_causal_lm")
    return Side(command, folder=Path(settings.folder), side="ours", members=1, environment={})


def train(settings: Settings) -> None:
    """The loop. Writes the loss of each step to `bare.json`, or `bare_in_ray.json`."""
    torch.set_num_threads(settings.threads)
    pace = Pace(folder=settings.folder, side=settings.side, block_steps=settings.block_steps)
    workload = CausalLM(model=settings.model)
    corpus = workload.corpus(settings.data(), seed=0, shards=1)
    model: Any = workload.build_model(seed=0).to(device=settings.device)
    optimizer = _optimizer(model)
    forward: Any = torch.compile(model) if settings.compile else model
    losses: list[torch.Tensor] = []  # fetched at the end, so that no step waits for the device
    for step in range(settings.steps):
        pace.step(0, step)
        tokens = corpus.sequences(ShardId(0), first=step * settings.batch, count=settings.batch).to(settings.device)
        total = torch.zeros((), device=settings.device)
        for part in tokens.chunk(settings.accumulation):
            with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=settings.device == "cuda"):
                logits = forward(input_ids=part[:, :-1]).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / settings.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    (Path(settings.folder) / f"{settings.side}.json").write_text(json.dumps([float(loss) for loss in losses]))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    settings = AdamW(lr=LR, rate=RateSchedule.constant)  # for its defaults
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def _train_in_ray(settings: Settings) -> None:
    import diloco.runtime.ray_actors  # noqa: F401

    train(settings)


def main(argv: list[str]) -> None:
    """Train as the JSON says."""
    settings = Settings(**json.loads(argv[0]))
    if not settings.in_ray:
        return train(settings)
    import ray

    ray.init(address="local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    task: Any = ray.remote(num_cpus=1)(_train_in_ray)
    ray.get(task.remote(settings))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
