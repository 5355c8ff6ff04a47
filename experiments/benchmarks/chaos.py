"""What faults cost: a run under kills and stalls against runs without, and the store against a replay of its journal.

Four islands as Ray actors for `--minutes`, under `--per-hour` faults drawn from `--seed`, half of them SIGKILL for a
worker of an island and half SIGSTOP for some seconds; before and after it half as long without faults. `ratio` is
committed tokens a second with faults / without. A process that is started again takes CPU seconds of the other islands'
for its imports; `ratio_net_of_restarts` leaves out that share. The journal has all contributions as they were encoded:
every checkpoint, the last one among them, is compared with a replay of those that counted. `--wan RATE` does so on a
host for each island behind such a link (see `wan`; root), with `--kinds` such as cut,slow,node,join. `--matrix`
instead ends each kind of process at each phase of a round, once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import diloco.async_  # noqa: F401 - registers its parts
from diloco import checkpoint as ckpt
from diloco.config import load
from diloco.jobs import make_job
from experiments import aftermath, chaos, journal
from experiments.benchmarks import chaos_matrix, common, wan
from experiments.benchmarks.pace import ROOT, environment_alone
from experiments.entry import MISTAKE

ISLANDS = 4
KINDS = "kill,stall"
START_LIMIT_S = 300.0
STOP_LIMIT_S = 120.0
SETTLE_COMMITS = 4  # before the time counts
STORE_BYTES = 200 << 20  # of a host
SETTINGS = [
    *("name=chaos", f"islands={ISLANDS}", "inner_steps=10", "segment_steps=5", "rounds=100000", "eval_every=50"),
    *("workload.model=micro", "data.tokenizer=bytes", "data.batch=8", "data.sequence_length=128", "inner.lr=1e-3"),
    *("schedule=first_come", "outer=delayed_nesterov", "codec=int8", "store.shards=2", "checkpoint.every=10"),
    *("checkpoint.keep=999", "patience=3", "metrics.live=false"),
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the runs are: on this machine, or on hosts made for them."""

    within: list[str] = field(default_factory=list)  # begins the command of a run
    environment: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)  # of `diloco chaos`

    def variables(self) -> dict[str, str]:
        """The environment of a process."""
        return {**environment_alone(), **self.environment}


@contextmanager
def _place(rate: str | None, journal_folder: Path) -> Iterator[Place]:
    """Hosts with a Ray node each, where a rate is given. More nodes come to the last one."""
    variables = {journal.FOLDER: str(journal_folder)}
    if rate is None:
        yield Place(environment=variables)
        return
    with (
        tempfile.TemporaryDirectory(prefix="wan", dir="/tmp") as name,  # the paths of Ray's sockets must be short
        wan.hosts(ISLANDS, rate_bit_s=wan.bits_per_s(rate)) as made,
    ):
        environment = wan.start_ray(made, Path(name), object_store_bytes=STORE_BYTES, variables=variables)
        join = shlex.join(wan.node_command(made, ISLANDS - 1, Path(name), object_store_bytes=STORE_BYTES))
        options = [f"--hosts={made.names[0].rpartition('-')[0]}", f"--rate={rate}", f"--join={join}"]
        yield Place(within=made.command(0, []), environment=environment, options=options)


@contextmanager
def _training(place: Place, folder: Path, options: Sequence[str]) -> Iterator[Path]:
    """A run that goes on in `folder` until the block ends, then is interrupted; its directory."""
    environment = place.variables()
    command = [*place.within, sys.executable, "-m", "experiments.train", *SETTINGS, *options]
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        run = folder / "runs" / "latest"

        def settled() -> bool:
            if process.poll() == MISTAKE:
                raise ValueError((folder / "output.txt").read_text().rpartition("error: ")[2].strip())
            if process.poll() is not None:
                raise RuntimeError(f"the run ended too early:\n{(folder / 'output.txt').read_text()[-2000:]}")
            return _commits(run) >= SETTLE_COMMITS

        try:
            common.wait_until(settled, limit_s=START_LIMIT_S, what="the first steps")
            directory = run.resolve()
            yield directory
            process.send_signal(signal.SIGINT)
            process.wait(STOP_LIMIT_S)
        finally:
            process.kill()
            process.wait()


def _commits(run: Path) -> int:
    return sum(1 for _ in aftermath.records(run, "commit"))


def _tokens(run: Path) -> tuple[float, int]:
    """When the newest outer step was told of, and the tokens behind all that were."""
    commits = list(aftermath.records(run, "commit"))
    return commits[-1]["time_s"], commits[-1]["total/tokens"]


def _calm(place: Place, folder: Path, seconds: float, extra: Sequence[str]) -> float:
    """Committed tokens a second without faults."""
    folder.mkdir()
    with _training(place, folder, extra) as run:
        begin_s, before = _tokens(run)
        time.sleep(seconds)
        end_s, after = _tokens(run)
    return (after - before) / (end_s - begin_s)


def _stormy(place: Place, folder: Path, options: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """The same under faults; with what they were and what came of them."""
    folder.mkdir()
    seconds = options.minutes * 60
    with _training(place, folder, ["--import", "experiments.journal", *extra]) as run:
        begin_s, before = _tokens(run)
        arguments = [
            str(run),
            f"--minutes={options.minutes}",
            f"--per-hour={options.per_hour}",
            f"--seed={options.seed}",
            f"--kinds={options.kinds}",
            *place.options,
        ]
        command = [sys.executable, "-m", "experiments.cli", "chaos", *arguments]
        with (folder / "chaos.txt").open("wb") as output:
            striker = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**wan.RAY_SETTINGS, **place.variables()},
            )
            time.sleep(seconds)
            end_s, after = _tokens(run)
            striker.wait(chaos.END_S + STOP_LIMIT_S)
        report = json.loads((run / "chaos.json").read_text())
        spent = [record["cpu_s"] for record in aftermath.records(run, "process") if record["time_s"] > begin_s]
    return {
        "run": run,
        "tokens_per_s": (after - before) / (end_s - begin_s),
        "seconds": end_s - begin_s,
        "restarts": len(spent),
        "restart_cpu_s": sum(spent),
        "report": report,
    }


def equal_to_replay(run: Path, journal_folder: Path) -> dict[str, int]:
    """How many modules of how many checkpoints are what a replay of the journal gives, to the bit."""
    config = load(run / "config.yaml")
    job = make_job(config)
    folder = ckpt.CheckpointFolder(str(run / "checkpoints"))
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads_per_worker)  # as shards have: sums have another order otherwise
    found = {"checkpoints": 0, "compared": 0, "equal": 0}
    try:
        shapes = job.workload.build_model(job.seed).named_parameters()
        modules = config.layout.build({name: tuple(p.shape) for name, p in shapes if p.requires_grad}, job.shards)
        replay = journal.Replay(job, job.steps_a_round(modules), journal_folder)
        for key in replay.modules:
            saved = _by_version(folder, key)
            found["checkpoints"] = max(found["checkpoints"], sum(map(len, saved.values())))
            for version, state in enumerate(replay.states(key)):
                for names in saved.get(version, []):
                    held = ckpt.read_modules(f"{folder.root}/{names}", [key])[key].tensors
                    found["compared"] += 1
                    found["equal"] += all(torch.equal(held[name], value) for name, value in state.items())
    finally:
        torch.set_num_threads(before)
    return found


def _by_version(folder: ckpt.CheckpointFolder, key: Any) -> dict[int, list[str]]:
    """Version of a module -> the checkpoints that have it."""
    found: dict[int, list[str]] = {}
    for name in folder.names():
        version = ckpt.read_modules(f"{folder.root}/{name}", [key])[key].meta["version"]
        found.setdefault(version, []).append(name)
    return found


def measure(options: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """Both sides, and the replay."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(options.to or scratch).resolve()
        (folder / "journal").mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(_place(options.wan, folder / "journal"))
        half_s = options.minutes * 60 / 2
        calm = [_calm(place, folder / "calm-before", half_s, extra)]
        common.show(f"without faults  {calm[0]:.0f} tokens/s")
        storm = _stormy(place, folder / "faults", options, extra)
        common.show(f"with faults     {storm['tokens_per_s']:.0f} tokens/s")
        if not options.quick and options.wan is None:  # a cluster whose nodes were killed is no longer the same
            calm.append(_calm(place, folder / "calm-after", half_s, extra))
            common.show(f"without faults  {calm[1]:.0f} tokens/s")
        compared = equal_to_replay(storm["run"], folder / "journal")
        summary = json.loads((storm["run"] / "summary.json").read_text())
    usual, report = sum(calm) / len(calm), storm["report"]
    ratio = storm["tokens_per_s"] / usual
    stolen = storm["restart_cpu_s"] / ((os.cpu_count() or 1) * storm["seconds"])
    return {
        "benchmark": "chaos",
        "minutes": options.minutes,
        "seed": options.seed,
        "tokens_per_s": [round(each) for each in (calm[0], storm["tokens_per_s"], *calm[1:])],
        "ratio": common.rounded(ratio, digits=3),
        "ratio_net_of_restarts": common.rounded(ratio / (1 - stolen), digits=3),
        "faults": report["faults"],
        "faults_per_hour": round(sum(report["faults"].values()) / storm["seconds"] * 3600),
        "recoveries": summary["recoveries"],
        "restarts": storm["restarts"],
        "restart_cpu_s": common.rounded(storm["restart_cpu_s"] / max(storm["restarts"], 1), digits=3),
        "rounds_lost": summary["rounds_again"],
        "next_commit_s": report["next_commit_s"],
        "contributes_again_s": report["contributes_again_s"],
        "not_back": report["not_back"],
        "checkpoints": compared["checkpoints"],
        "digests_equal": compared["equal"] / compared["compared"] if compared["compared"] else None,
        "contributions": summary["contributions"],
        **common.environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the options say."""
    parser = common.parser("chaos", "Committed tokens under faults against a run without.")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the run with faults; default 10")
    parser.add_argument("--per-hour", type=float, default=130.0, help="faults an hour; default 130")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=KINDS, help=f"as of `diloco chaos`; default {KINDS}")
    parser.add_argument("--wan", metavar="RATE", help="on hosts with links of this rate, such as 100mbit")
    parser.add_argument("--matrix", action="store_true", help="each kind of process at each phase of a round instead")
    parser.add_argument("--to", type=Path, help="keep the runs and the journal in this folder")
    parser.add_argument(
        "settings", nargs="*", default=[], help="key=value: other settings of the runs, the same for all"
    )
    options = parser.parse_intermixed_args(argv)
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if options.quick:
        options.minutes, options.per_hour = 0.15, 800.0
    return common.run(lambda: _matrix(options, given) if options.matrix else _checked(options))


def _matrix(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    names = {"settings": "key=value", "per_hour": "--per-hour"}
    if more := [names.get(name, f"--{name}") for name in given if name not in ("matrix", "quick")]:
        raise ValueError(f"--matrix has runs and kills of its own; leave {', '.join(more)} out")
    chosen = chaos_matrix.COMBINATIONS[: 1 if options.quick else None]
    return {"benchmark": "chaos --matrix", **chaos_matrix.measure(chosen)}


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    kinds = chaos.checked_kinds(options)
    if "driver" in kinds:
        raise ValueError("--kinds driver: the runs of this benchmark are not started again; --matrix has that kill")
    if options.wan is not None:
        wan.bits_per_s(options.wan)
        wan.check("--wan")
    elif far := [kind for kind in kinds if kind in (*chaos.NETWORK, "node", "join")]:
        raise ValueError(f"--kinds {far[0]} needs hosts: give --wan RATE")
    if chosen := [each for each in options.settings if each.startswith("runtime=")]:
        raise ValueError(f"{chosen[0]}: the runs are on Ray, whose processes are killed; leave it out")
    try:
        if options.to:
            options.to.mkdir(parents=True, exist_ok=True)
        used = options.to and any(options.to.iterdir())
    except OSError as error:
        raise ValueError(f"--to {options.to} cannot be made: {error.strerror}; give another folder") from error
    if used:
        raise ValueError(f"--to {options.to} is no empty folder; give one, or a new one")
    return measure(options, options.settings)


if __name__ == "__main__":
    sys.exit(main())
