"""What the benchmarks of learning share: one small setting, common pre-training, cached runs, tables and records.

A 0.16 M-parameter Llama on the bytes of the Python installation. Methods are compared in pairs: for one seed they all
start from the same pre-trained weights, and two with the same number of islands see the same shards in the same order.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diloco import RunConfig, config, train
from diloco.async_.outer import DelayedNesterov
from diloco.async_.schedule import FirstCome
from diloco.checkpoint import Checkpoint
from diloco.codec import Codec, Float32
from diloco.data import Data
from diloco.dealing import ShardSplit
from diloco.inner import AdamW, RateSchedule
from diloco.merge import Mean, MeanBy
from diloco.metrics import Metrics
from diloco.outer import Nesterov, OuterOptimizer, Sgd
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.schedule import Barrier
from diloco.workloads.causal_lm import CausalLM
from experiments.benchmarks.common import environment

PRETRAIN_SEED = 1000  # added to the seed: pre-training reads the data in another order than what follows it
PRETRAIN_BATCHES = 4  # times the batch of one worker
DEFAULT_FOLDER = Path("runs/lab")  # shared by the benchmarks, which so have the runs that are common to them once


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is trained."""

    steps: int = 400  # inner steps a worker after the pre-training: N
    pretrain_steps: int = 150
    warmup_steps: int = 20
    batch: int = 8  # sequences a step and worker
    sequence_length: int = 128  # bytes
    validation_fraction: float = 0.08  # of the documents
    eval_sequences: int = 1024
    max_tokens: int = 0  # of the corpus; 0 = all of it
    shorter: int = 1  # rounds have 1/shorter of a method's H


FULL = Scale()
QUICK = Scale(  # shows that everything works, and nothing else
    steps=5, pretrain_steps=2, batch=1, sequence_length=8, eval_sequences=8, max_tokens=2_000_000, shorter=10
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train, as differences from the common setting. Without `inner_steps`: islands=1 and no rounds."""

    islands: int = 1
    inner_steps: int = 0  # H; 0 = all steps in one round, which is training without an outer optimizer
    outer_lr: float = 1.0
    momentum: float = 0.0
    times_batch: int = 1  # sequences a step, as a multiple of one worker's
    times_steps: int = 1  # inner steps, as a multiple of one worker's
    lr: float = 2e-3
    drop_probability: float = 0.0
    split: ShardSplit = ShardSplit.iid
    by: MeanBy = MeanBy.uniform
    codec: Codec = field(default_factory=Float32)
    codec_down: Codec = field(default_factory=Float32)
    free: FirstCome | None = None  # how islands go on without waiting for each other; None = with a barrier
    delayed: bool = False  # delayed Nesterov instead of Nesterov
    speeds: tuple[float, ...] = ()  # virtual ones, steps a second of each island; empty = 1 for all
    eval_every: int = 0  # rounds; 0 = only at the start and the end


class Lab:
    """Trains methods in a folder and remembers what came out; a run that is there already is not done again."""

    def __init__(self, folder: Path, scale: Scale, data: Data | None = None) -> None:
        """`data`: where the documents come from, if not from the Python installation; it is cut as `scale` says."""
        self.folder, self.scale, self._data = folder.absolute(), scale, data or Data()
        self.rows: list[dict[str, Any]] = []  # of metrics.csv: each run that was asked for

    def loss(self, label: str, method: Method, seed: int, chosen: RunConfig | None = None) -> float:
        """Validation loss in nats a byte after training `method`, as `chosen` or `begun`; infinite if it diverged."""
        summary = self.summary(chosen or self.begun(method, seed))
        loss = float("inf") if summary["val_loss"] is None else float(summary["val_loss"])
        sent = ("bytes_up", "bytes_down", "bytes_data_parallel")
        kept = ("islands", "inner_steps", "rounds", "tokens", *sent, "wall_s", "weights_sha256")
        row = {"label": label, "seed": seed, "initial_val_loss": summary["initial_val_loss"], "val_loss": loss}
        settings: dict[str, Any] = {"outer_lr": method.outer_lr, "momentum": method.momentum, "lr": method.lr}
        settings |= {name: str(vars(method)[name]) for name in ("codec", "codec_down", "free", "delayed", "speeds")}
        self.rows.append({**row, **settings, **{key: summary[key] for key in kept}})
        print(f"  seed {seed}  {label:44} {loss:.4f}  ({summary['wall_s']:.0f} s)", flush=True)
        return loss

    def begun(self, method: Method, seed: int) -> RunConfig:
        """The configuration of a run from this seed's common start, which is trained now unless it was."""
        return self.config(method, seed, init_from=str(self._pretrained(seed)))

    def records(self, chosen: RunConfig) -> list[dict[str, Any]]:
        """metrics.jsonl of this configuration's run, done now unless it was."""
        self.summary(chosen)
        return [json.loads(line) for line in (self._directory(chosen) / "metrics.jsonl").read_text().splitlines()]

    def config(self, method: Method, seed: int, *, init_from: str) -> RunConfig:
        """The whole configuration of a run."""
        scale = self.scale
        steps = scale.steps * method.times_steps
        inner_steps = max(method.inner_steps // scale.shorter, 1) if method.inner_steps else steps
        assert steps % inner_steps == 0, f"H={inner_steps} does not divide {steps} steps"
        return RunConfig(
            name="lab",
            seed=seed,
            islands=method.islands,
            inner_steps=inner_steps,
            rounds=steps // inner_steps,
            segment_steps=0,
            eval_every=method.eval_every,
            init_from=init_from,
            workload=CausalLM(model="micro"),
            data=replace(
                self._data,
                tokenizer="bytes",
                batch=scale.batch * method.times_batch,
                sequence_length=scale.sequence_length,
                max_tokens=scale.max_tokens,
                validation_fraction=scale.validation_fraction,
                eval_sequences=scale.eval_sequences,
                split=method.split,
            ),
            inner=AdamW(lr=method.lr, warmup_steps=scale.warmup_steps),
            schedule=method.free or Barrier(drop_probability=method.drop_probability),
            merge=Mean(by=method.by),
            outer=_outer(method),
            codec=method.codec,
            codec_down=method.codec_down,
            store=Store(shards=1),
            runtime=Local(seconds_per_step=[1 / speed for speed in method.speeds]),
            checkpoint=Checkpoint(every=0),
            metrics=Metrics(live=False),
        )

    def _pretrained(self, seed: int) -> Path:
        """The run that all methods of this seed start from: constant rate, so that it breaks off in mid-training."""
        method = Method(times_batch=PRETRAIN_BATCHES)
        base = self.config(method, seed + PRETRAIN_SEED, init_from="")
        inner = AdamW(lr=method.lr, warmup_steps=self.scale.warmup_steps, rate=RateSchedule.constant)
        return self.kept(replace(base, inner=inner, inner_steps=self.scale.pretrain_steps))

    def kept(self, chosen: RunConfig) -> Path:
        """The directory of a run, done now unless it was, with checkpoint and export: to build on."""
        self.summary(chosen, keep=True)
        return self._directory(chosen)

    def _directory(self, chosen: RunConfig) -> Path:
        digest = hashlib.sha256(config.to_yaml(chosen).encode()).hexdigest()[:12]
        return self.folder / f"seed{chosen.seed}_k{chosen.islands}_h{chosen.inner_steps}_{digest}"

    def summary(self, chosen: RunConfig, *, keep: bool = False) -> dict[str, Any]:
        """summary.json of this configuration's run, done now unless it was; see `kept`."""
        directory = self._directory(chosen)
        file = directory / "summary.json"
        if file.is_file() and (not keep or (directory / "export").is_dir()):
            found: dict[str, Any] = json.loads(file.read_text())
            if found["status"] in ("finished", "stopped"):
                return found
        shutil.rmtree(directory, ignore_errors=True)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            summary = train(chosen, directory).summary
        if summary["status"] == "interrupted":
            raise KeyboardInterrupt
        for name in () if keep else ("checkpoints", "export"):
            shutil.rmtree(directory / name, ignore_errors=True)
        return summary


def _outer(method: Method) -> OuterOptimizer:
    if method.delayed:
        return DelayedNesterov(lr=method.outer_lr, momentum=method.momentum)
    if method.momentum:
        return Nesterov(lr=method.outer_lr, momentum=method.momentum)
    return Sgd(lr=method.outer_lr)


@dataclass(frozen=True, kw_only=True)
class Order:
    """That `better` ends at least `threshold` nats a byte below `worse`, in every seed."""

    better: str
    worse: str
    threshold: float  # negative: it may be so much above

    def judge(self, losses: Mapping[str, Sequence[float]]) -> dict[str, object]:
        """The paired differences worse - better, and whether the order holds in each."""
        pairs = zip(losses[self.better], losses[self.worse], strict=True)
        differences = [worse - better for better, worse in pairs]
        return {
            "threshold": self.threshold,
            "per_seed": [round(difference, 4) for difference in differences],
            "holds": all(difference >= self.threshold for difference in differences),
        }


def options(about: str) -> argparse.ArgumentParser:
    """The command line that the benchmarks share."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2", help="seeds with commas between; default 0,1,2")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it works, its figures mean nothing")
    parser.add_argument("--to", type=Path, default=DEFAULT_FOLDER, help="folder of the runs; finished ones are kept")
    return parser


def arguments(about: str, argv: Sequence[str] | None) -> tuple[Lab, list[int]]:
    """Read the command line of a benchmark without options of its own: the lab to work in, and the seeds."""
    return opened(options(about).parse_args(argv))


def opened(given: argparse.Namespace, data: Data | None = None) -> tuple[Lab, list[int]]:
    """What `options` read: the lab to work in, with documents as `data` says, and the seeds."""
    seeds = [0] if given.quick else [int(seed) for seed in given.seeds.split(",")]
    return Lab(given.to, QUICK if given.quick else FULL, data), seeds


def table(losses: Mapping[str, Sequence[float]], *, against: str) -> str:
    """Markdown: mean and sd of each method over the seeds, and the paired differences from `against`."""
    lines = [f"| method | loss, mean (sd) | against {against}, mean (sd) | ... by seed |", "|---|---|---|---|"]
    for name, found in losses.items():
        differences = [loss - base for loss, base in zip(found, losses[against], strict=True)]
        paired = " ".join(f"{difference:+.4f}" for difference in differences)
        shown = "" if name == against else f"{_mean_sd(differences, '+.4f')} | {paired}"
        lines.append(f"| {name} | {_mean_sd(found, '.4f')} | {shown or '|'} |")
    return "\n".join(lines)


def conclude(
    lab: Lab,
    *,
    benchmark: str,
    seeds: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    text: str,
    orders: Mapping[str, Order],
    more: Mapping[str, object],
) -> None:
    """Print the table `text`, the orders and, as the last line, one JSON object, with the figures in `more`.

    What a record needs goes to `<folder>/<benchmark>`.
    """
    judged = {name: order.judge(losses) for name, order in orders.items()}
    result = {
        "benchmark": benchmark,
        "unit": "nats a byte",
        "seeds": list(seeds),
        "scale": vars(lab.scale),
        "losses": {name: [round(loss, 5) for loss in found] for name, found in losses.items()},
        "mean": {name: round(statistics.fmean(found), 5) for name, found in losses.items()},
        "sd": {name: round(_sd(found), 5) for name, found in losses.items()},
        **more,
        "orders": judged,
    }
    record = lab.folder / benchmark
    record.mkdir(parents=True, exist_ok=True)
    (record / "table.md").write_text(text + "\n")
    (record / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (record / "config.yaml").write_text(config.to_yaml(lab.config(Method(), seeds[0], init_from="")))
    (record / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    with (record / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lab.rows[0]))
        writer.writeheader()
        writer.writerows(lab.rows)
    print(f"\n{text}\n")
    for name, found in judged.items():
        print(f"{'holds' if found['holds'] else 'FAILS'}: {name} (>= {found['threshold']}): {found['per_seed']}")
    print(json.dumps(result), flush=True)


def _mean_sd(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({_sd(values):.4f})"


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
