"""A SIGKILL for each kind of process of a run at each phase of a round: what is durable stays, nothing is left over.

Used by `python -m experiments.benchmarks.chaos --matrix`, and for some combinations by the tests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco.checkpoint import CheckpointFolder
from experiments import aftermath, ambush
from experiments.ambush import PHASES, VICTIMS
from experiments.benchmarks import common
from experiments.benchmarks.pace import environment_alone

FIRST, EVERY, AFTER = 2, 2, 3  # round of the first kill; rounds between two, so that they do not meet; after the last
STEPS, BATCH, LENGTH = 4, 4, 32
LIMIT_S, MORE_S = 240.0, 120.0  # for a run with one kill, for each further one
LEFT_S = 45.0  # for what a killed run has started to be gone
COMBINATIONS = [(victim, phase) for victim in VICTIMS for phase in PHASES]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run with kills; without `problems` all is well."""

    seconds: float
    recoveries: int
    rounds_again: int
    islands_lost: int
    problems: tuple[str, ...]


def settings(corpus: Path, rounds: int) -> list[str]:
    """A run of seconds: two islands, of which the second has two workers, two shards, a checkpoint every round."""
    return [
        *("name=ambush", "islands=2", "workers=[1,2]", "store.shards=2", f"rounds={rounds}", f"inner_steps={STEPS}"),
        *("segment_steps=2", "checkpoint.every=1", "checkpoint.keep=9", "patience=3", "eval_every=2"),
        *(
            "workload.model=micro",
            "data.tokenizer=bytes",
            f"data.files={corpus}",
            "data.document=line",
            f"data.batch={BATCH}",
        ),
        *(f"data.sequence_length={LENGTH}", "metrics.live=false", "resume=auto"),
    ]


def ambushed(*combinations: tuple[str, str]) -> Outcome:
    """A run in which those processes (of VICTIMS) are killed at those moments (of PHASES), one after the other.

    It is started again by itself where the one that drives it was killed, or its node.
    """
    begun_s = time.monotonic()
    kills = [ambush.named(*each, FIRST + EVERY * index) for index, each in enumerate(combinations)]
    rounds = FIRST + EVERY * (len(kills) - 1) + AFTER
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = folder / "corpus.txt"
        corpus.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(4000)))
        command = [sys.executable, "-m", "experiments.train", "--import", "experiments.ambush"]
        command += [f"--restarts={2 + len(kills)}", *settings(corpus, rounds)]
        environment = {**environment_alone(), ambush.VARIABLE: f"{','.join(kills)}@{folder}"}
        with (folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                status = process.wait(LIMIT_S + MORE_S * (len(kills) - 1))
            except subprocess.TimeoutExpired:
                status = 128 + signal.SIGKILL
            finally:
                process.kill()
                process.wait()
        problems = [f"no kill {each}" for each in kills if not _has_text(folder / each)]
        problems += _problems(folder, status, rounds)
        summary: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            summary = json.loads((folder / "runs" / "latest" / "summary.json").read_text())
        problems += [f"process {pid} is left: {what}" for pid, what in _left(environment[ambush.VARIABLE])]
        if problems:
            problems.append((folder / "output.txt").read_text()[-3000:])
    return Outcome(
        seconds=round(time.monotonic() - begun_s, 1),
        recoveries=summary.get("recoveries", 0),
        rounds_again=summary.get("rounds_again", 0),
        islands_lost=summary.get("islands_lost", 0),
        problems=tuple(problems),
    )


def _has_text(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def _problems(folder: Path, status: int, last: int) -> list[str]:
    """What is wrong with what the run left behind."""
    if status != 0:
        return [f"exit status {status}"]
    run = folder / "runs" / "latest"
    problems = []
    summary = json.loads((run / "summary.json").read_text())
    commits = list(aftermath.records(run, "commit"))
    rounds = [record["round"] for record in commits]
    if summary["status"] != "finished" or rounds != list(range(1, last + 1)):
        problems.append(f"it {summary['status']}, with the rounds {rounds}")
    contributions = sum(len(record["outer/contributors"]) for record in commits)
    if summary["contributions"]["accepted"] != contributions:
        problems.append(f"{summary['contributions']['accepted']} contributions counted, {contributions} in the log")
    if summary["tokens"] != contributions * STEPS * BATCH * LENGTH:
        problems.append(f"{summary['tokens']} tokens, where {contributions} contributions have other")
    if summary["rounds_again"] > summary["recoveries"]:  # a checkpoint every round
        problems.append(f"{summary['rounds_again']} rounds were trained again")
    newest, _ = CheckpointFolder(str(run / "checkpoints")).newest()
    if not newest.endswith(f"round-{last:06d}"):
        problems.append(f"the newest sound checkpoint is {newest}")
    if list((run / "checkpoints").glob("*.tmp")):
        problems.append("half a checkpoint is left")
    return problems


def _left(mark: str) -> list[tuple[int, str]]:
    """Processes of that run which do not end by themselves."""
    end_s = time.monotonic() + LEFT_S
    while (found := _with(mark)) and time.monotonic() < end_s:
        time.sleep(0.5)
    return found


def _with(mark: str) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{ambush.VARIABLE}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                what = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if what.strip():  # not one that has ended and was not asked for its status yet
                    found.append((int(folder.name), what[:80]))
    return found


def measure(combinations: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The figures of these combinations."""
    outcomes = []
    for victim, phase in combinations:
        outcome = ambushed((victim, phase))
        outcomes.append(outcome)
        state = "well" if not outcome.problems else f"NOT WELL: {'; '.join(outcome.problems)}"
        common.show(
            f"{victim:10} {phase:14} {outcome.seconds:6.1f} s  recoveries {outcome.recoveries}"
            f"  rounds again {outcome.rounds_again}  islands lost {outcome.islands_lost}  {state}"
        )
    return {
        "combinations": len(outcomes),
        "well": sum(not outcome.problems for outcome in outcomes),
        "rounds_again_most": max(outcome.rounds_again for outcome in outcomes),
    }
