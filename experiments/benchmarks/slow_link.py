"""The same model on the same tokens over slow links: data parallel, DiLoCo, streaming, and streaming in four bits.

    python -m experiments.benchmarks.slow_link [--rates 20mbit,200mbit,1gbit] [--rounds 3] [--quick]

An island (data parallel: a worker) on each of a few hosts behind rate-limited links, see `wan`; needs root. Told of
each method and rate, from its first inner step to its last outer step: tokens a second, utilisation, bytes, and the
validation loss at the end. Utilisation is the share of that time that islands spend in inner steps; data parallel's
steps hold its communication, so that for it the steps of synchronous DiLoCo, which have none, are counted instead.

On slow links data parallel takes a few steps only, at whose rate it would go on: what it learns does not depend on the
link, so that its loss is that of its whole run on the fastest one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks import common, wan
from experiments.benchmarks.pace import search_path

PARALLEL, DILOCO, STREAMING, CODED = "data parallel", "diloco", "streaming", "streaming int4"
LAG = 5
STREAM = {"layout": "fragments", "schedule.lag": LAG, "schedule.keep": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    DILOCO: {},
    STREAMING: STREAM,
    CODED: {**STREAM, "codec": "int4", "codec@codec_down": "int4"},
}
BATCH = 2  # sequences a step of an island, or of a worker
LENGTH = 128
LEARNING = {"inner.lr": 1e-3, "inner.warmup_steps": 10}
SHORT_S = 60.0  # data parallel on a slow link: steps that take about so long
LEAST_STEPS = 4
STORE_BYTES = 400 << 20


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run of one method on one rate."""

    steps: int  # of an island
    wall_s: float  # from the first step to the last outer step
    inner_s: float  # of an island, in steps
    tokens: int
    bytes_sent: int
    val_loss: float

    def figures(self, *, inner_s: float, val_loss: float) -> dict[str, float]:
        """As told, with the seconds of its steps that are not communication."""
        return {
            "tokens_per_s": common.rounded(self.tokens / self.wall_s),
            "utilization": common.rounded(min(inner_s / self.wall_s, 1.0)),
            "bytes_sent": self.bytes_sent,
            "bytes_sent_a_step": common.rounded(self.bytes_sent / self.steps),
            "val_loss": common.rounded(val_loss),
            "steps": self.steps,
            "wall_s": common.rounded(self.wall_s),
        }


class Lab:
    """Runs on the hosts, each in a directory of its own."""

    def __init__(self, given: argparse.Namespace, made: wan.Hosts, environment: dict[str, str], folder: Path) -> None:
        self._given, self._made, self._environment, self._folder = given, made, environment, folder
        self._count = 0

    def run(self, settings: dict[str, Any]) -> Ran:
        """Train; raises RuntimeError with the run's last words where that fails."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        fixed = {
            "workload.model": self._given.model,
            "data.sequence_length": LENGTH,
            "data.max_tokens": 2_000_000,
            "data.cache": self._folder / "cache",
            "segment_steps": 5,
            "eval_every": 0,
            "checkpoint.every": 0,
            "metrics.live": "false",
            **LEARNING,
        }
        overrides = [f"{key}={value}" for key, value in {**fixed, **settings}.items()]
        command = self._made.command(0, [sys.executable, "-m", "experiments.train", *overrides])
        environment = {**os.environ, "PYTHONPATH": search_path(), **self._environment}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(" | ".join([line for line in done.stderr.splitlines() if line.strip()][-4:]))
        return ran(folder / "runs" / "latest")


def ran(directory: Path) -> Ran:
    """What a run's directory tells."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    segments = [record for record in records if record["event"] == "segment"]
    islands = {record["island"] for record in segments}
    begin_s = min(record["time_s"] - record["seconds"] for record in segments)
    end_s = max(record["time_s"] for record in records if record["event"] in ("segment", "commit"))
    return Ran(
        steps=max(record["step"] for record in segments),
        wall_s=end_s - begin_s,
        inner_s=sum(record["seconds"] for record in segments) / len(islands),
        tokens=sum(record["tokens"] for record in segments),
        bytes_sent=summary["bytes_sent"],
        val_loss=summary["val_loss"],
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options or where hosts cannot be made."""
    options = common.parser("slow_link", __doc__.partition("\n")[0])
    options.add_argument("--rates", default="20mbit,200mbit,1gbit", help="of the links (20mbit,200mbit,1gbit)")
    options.add_argument("--hosts", type=common.positive, default=2, help="with an island each (2)")
    options.add_argument("--rounds", type=common.positive, default=3, help="outer rounds (3)")
    options.add_argument("--inner-steps", type=common.positive, default=30, help="of a round (30)")
    options.add_argument("--model", default="10m", help="workload.model (10m)")
    options.add_argument("--alone", action="store_true", help=f"{CODED} only, to look at it")
    given = options.parse_args(argv)
    if given.quick:
        given.rates, given.rounds, given.inner_steps, given.model = "200mbit", 1, 12, "tiny"
    return common.run(lambda: _measure(given))


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    rates = sorted(given.rates.split(","), key=wan.bits_per_s, reverse=True)  # the fastest first
    if given.hosts < 2:
        raise ValueError("--hosts=1 has no links; give at least 2")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="wan", dir="/tmp") as name:  # the paths of Ray's sockets must be short
        folder = Path(name)
        with wan.hosts(given.hosts, rate_bit_s=wan.bits_per_s(rates[0])) as made:
            environment = wan.start_ray(made, folder, object_store_bytes=STORE_BYTES)
            lab = Lab(given, made, environment, folder)
            parallel: Ran | None = None
            for rate in rates:
                for host in range(given.hosts):
                    made.set_rate(host, wan.bits_per_s(rate))
                found[rate] = {"line_mbit": common.rounded(statistics.median(wan.line_mbit(made)))}
                parallel = _on(rate, given, lab, parallel, found[rate])
    slowest = found[rates[-1]]
    figures = {
        "benchmark": "slow_link",
        "model": given.model,
        "hosts": given.hosts,
        "inner_steps": given.inner_steps,
        "rounds": given.rounds,
        "rates": found,
        "slowest": rates[-1],
        "utilization": slowest[CODED]["utilization"],
    }
    if not given.alone:
        figures["utilization_data_parallel"] = slowest[PARALLEL]["utilization"]
        figures["ratio"] = common.rounded(slowest[CODED]["tokens_per_s"] / slowest[PARALLEL]["tokens_per_s"])
    return figures


def _on(rate: str, given: argparse.Namespace, lab: Lab, parallel: Ran | None, figures: dict[str, Any]) -> Ran | None:
    """All methods on one rate, written to `figures`. `parallel`: data parallel's whole run, which is returned."""
    alike = {
        "outer.momentum": 0.5,
        "islands": given.hosts,
        "inner_steps": given.inner_steps,
        "rounds": given.rounds,
        "data.batch": BATCH,
    }
    chosen = {CODED: METHODS[CODED]} if given.alone else METHODS
    done = {name: lab.run({**alike, **settings}) for name, settings in chosen.items()}
    for name, one in done.items():
        figures[name] = one.figures(inner_s=one.inner_s, val_loss=one.val_loss)
        _tell(rate, name, figures[name])
    if given.alone:
        return None
    step_s = done[DILOCO].inner_s / done[DILOCO].steps
    steps = given.inner_steps * given.rounds
    if parallel is not None:  # steps that last SHORT_S in all, as far as one can tell from a faster link
        steps = min(steps, max(LEAST_STEPS, round(SHORT_S / _slow_step_s(given, parallel, figures["line_mbit"]))))
    joint = {"islands": 1, "workers": given.hosts, "data.batch": BATCH * given.hosts, "outer": "sgd"}
    short = lab.run({**joint, "inner_steps": steps, "rounds": 1})
    parallel = parallel or short
    figures[PARALLEL] = short.figures(inner_s=step_s * short.steps, val_loss=parallel.val_loss)
    _tell(rate, PARALLEL, figures[PARALLEL])
    return parallel


def _tell(rate: str, name: str, told: dict[str, float]) -> None:
    common.show(
        f"{rate}, {name}: {told['tokens_per_s']:.0f} tokens/s, {100 * told['utilization']:.1f} % in steps,"
        f" {told['bytes_sent_a_step'] / 1e6:.3f} MB a step, loss {told['val_loss']:.3f}"
    )


def _slow_step_s(given: argparse.Namespace, parallel: Ran, line_mbit: float) -> float:
    """About how long a step of data parallel takes on such a line: a ring all-reduce of float32 gradients."""
    sent_mbit = 8 * parallel.bytes_sent / parallel.steps / given.hosts / 1e6
    return float(sent_mbit / line_mbit + parallel.wall_s / parallel.steps)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
