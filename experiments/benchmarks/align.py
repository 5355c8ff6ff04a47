"""What the benchmarks of alignment share: prose, a small policy pre-trained on it, and runs that begin with it.

1.3 M parameters, half a million words of documentation cut into paragraphs: their first six words are prompts. All
methods of one seed start from the same policy, and those with as many islands see the same prompts in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from diloco import RunConfig, prompts
from diloco.checkpoint import Checkpoint
from diloco.data import Data
from diloco.inner import AdamW, RateSchedule
from diloco.merge import Mean, Merge
from diloco.messages import Tensors
from diloco.metrics import Metrics
from diloco.outer import OuterOptimizer, Sgd
from diloco.replica import Single
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.sources import Document
from diloco.workload import Workload
from diloco.workloads.causal_lm import CausalLM
from experiments.benchmarks.common import environment
from experiments.benchmarks.kinds import KINDS
from experiments.benchmarks.lab import PRETRAIN_SEED, Lab

WORDS = 6  # of a prompt
SEQUENCE_LENGTH = 64
KIND = ("manuals", "help")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and measured."""

    pretrain_steps: int = 400
    pretrain_batch: int = 16
    steps: int = 60  # of an island or worker, where there are four
    batch: int = 8  # prompts a step and island
    eval_sequences: int = 256
    completion_tokens: int = 24
    paragraphs: int | None = None  # at most; None = all there are


FULL = Size()
QUICK = Size(
    pretrain_steps=2, pretrain_batch=2, steps=2, batch=2, eval_sequences=4, completion_tokens=4, paragraphs=400
)


def prose(folder: Path, most: int | None) -> Path:
    """JSON lines with text, prompt and completion of distinct paragraphs, made in `folder` unless it is there."""
    path = folder / ("prose.jsonl" if most is None else f"prose_{most}.jsonl")
    if not path.is_file():
        documents = (Document(text, kind) for kind in KIND for text in KINDS[kind]())
        found = islice(prompts.rows_of(documents, WORDS), most)
        rows = {f"{row.values['prompt']}{row.values['completion']}": row for row in found}
        lines = [json.dumps({"text": text, **row.values}) for text, row in rows.items()]
        random.Random(0).shuffle(lines)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.rename(path)
    return path


class Policies:
    """Policies of a lab, and configurations of what is trained from them."""

    def __init__(self, lab: Lab, size: Size) -> None:
        self.lab, self.size = lab, size
        self.file = prose(lab.folder, size.paragraphs)

    def start(self, seed: int) -> Path:
        """The export of this seed's pre-trained policy, trained now unless it was."""
        data = self.data(self.size.pretrain_batch)
        chosen = self._config(seed + PRETRAIN_SEED, CausalLM(model="tiny"), data, lr=2e-3)
        pretrained = replace(chosen, inner_steps=self.size.pretrain_steps, rounds=1, inner=AdamW(lr=2e-3))
        return self.lab.kept(pretrained) / "export"

    def config(
        self,
        seed: int,
        workload: Workload,
        *,
        islands: int = 1,
        inner_steps: int = 0,
        rounds: int = 1,
        batch: int = 0,
        lr: float = 2e-4,
        merge: Merge | None = None,
        outer: OuterOptimizer | None = None,
        eval_every: int = 1,
    ) -> RunConfig:
        """A run from the policy of a seed; `inner_steps` and `batch`: 0 = as `Size` says."""
        base = self._config(seed, workload, self.data(batch or self.size.batch), lr=lr)
        return replace(
            base,
            islands=islands,
            inner_steps=inner_steps or self.size.steps,
            rounds=rounds,
            merge=merge or Mean(),
            outer=outer or Sgd(lr=1.0),
            eval_every=eval_every,
        )

    def measure(self, workload: Workload, seed: int, values: Tensors) -> dict[str, float]:
        """What `workload` measures of a policy with these weights, on the held-out prompts."""
        model = workload.build_model(seed)
        Single(model).install(list(values), values, keep=0.0)
        return workload.evaluate(model, workload.corpus(self.data(1), seed=seed, shards=1), "validation")

    def data(self, batch: int) -> Data:
        """The paragraphs."""
        return Data(
            files=[str(self.file)],
            batch=batch,
            sequence_length=SEQUENCE_LENGTH,
            validation_fraction=0.1,
            eval_sequences=self.size.eval_sequences,
        )

    def _config(self, seed: int, workload: Workload, data: Data, *, lr: float) -> RunConfig:
        return RunConfig(
            name="align",
            seed=seed,
            islands=1,
            segment_steps=0,
            workload=workload,
            data=data,
            inner=AdamW(lr=lr, warmup_steps=10, rate=RateSchedule.constant),
            outer=Sgd(lr=1.0),
            store=Store(shards=1),
            runtime=Local(),
            checkpoint=Checkpoint(every=0),
            metrics=Metrics(live=False),
        )


def curve(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(kl, reward) of each evaluation of a run, in its order."""
    return [(float(r["eval/kl"]), float(r["eval/reward"])) for r in records if r["event"] == "evaluation"]


def reward_at(points: Sequence[tuple[float, float]], kl: float) -> float:
    """The reward of a curve at this divergence: of the best of its points so far, between two of them linearly."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] >= best[-1][1]:
            best.append(point)
    return float(np.interp(kl, [x for x, _ in best], [y for _, y in best]))


def rows(found: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[str]) -> str:
    """Markdown: the mean of each column over the seeds, by method; in brackets seed by seed."""
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in found.items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds]
            mean, each = fmean(values), " ".join(f"{value:.3g}" for value in values)
            cells.append(f"{mean:.4g} ({each})" if len(values) > 1 else f"{mean:.4g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conclude(
    lab: Lab,
    *,
    benchmark: str,
    seeds: Sequence[int],
    size: Size,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    text: str,
    orders: Mapping[str, Sequence[float]],
) -> None:
    """Print the table and the orders, and as the last line one JSON object; the same into `<folder>/<benchmark>`.

    `orders`: by what is claimed, the differences seed by seed, which are to be at least 0.
    """
    judged = {
        name: {"per_seed": [round(value, 5) for value in values], "holds": all(value >= 0 for value in values)}
        for name, values in orders.items()
    }
    result = {"benchmark": benchmark, "seeds": list(seeds), "size": vars(size), "found": found, "orders": judged}
    folder = lab.folder / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    print(f"\n{text}\n")
    for name, told in judged.items():
        print(f"{'holds' if told['holds'] else 'FAILS'}: {name}: {told['per_seed']}")
    print(json.dumps(result), flush=True)
