"""`diloco chaos RUN`: faults for a run that is going on, drawn from a seed, and a report of what they cost.

It acts on processes of that run only, which the run's metrics tell by number, and on network namespaces that are named.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from experiments import aftermath
from experiments.cast import Cast

NETWORK = ("cut", "slow")
KINDS = {
    "kill": "SIGKILL for a worker of an island",
    "stall": "SIGSTOP for a worker of an island, SIGCONT some time later",
    "evaluator": "SIGKILL for the evaluator",
    "store": "SIGKILL for a shard of the store",
    "driver": "SIGKILL for the process that drives the run, which `--restarts` starts again",
    "node": "SIGKILL for the Ray node of an island, if that is not the driver's",
    "cut": "a host's link is cut, and healed some time later (--hosts)",
    "slow": "a host's link has --rate for some time (--hosts)",
    "join": "run the command --join, such as one that starts a Ray node",
}
POLL_S = 0.1
END_S = 60.0  # for the run to show that it goes on after the last fault
GONE_STATUS = 1  # exit status where the run did not outlive its faults


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, before anybody knows which processes there will be."""

    at_s: float  # after the start
    kind: str
    victim: float  # 0 to 1: which of those that there are
    lasts_s: float  # where it has an end


@dataclass(frozen=True, kw_only=True)
class Act:
    """What was done."""

    unix_s: float
    kind: str
    target: str  # such as "island 2" or "host wan12-1"
    pid: int | None = None
    island: int | None = None
    lasts_s: float = 0.0


def drawn(
    *, seed: int, minutes: float, per_hour: float, kinds: Sequence[str], lasts_s: tuple[float, float]
) -> list[Fault]:
    """A schedule: the same for the same arguments. One fault in each stretch of 1/per_hour, at a random moment of it.

    The first of each kind in `kinds` come in turn, so that a short schedule has all of them.
    """
    draw = random.Random(f"chaos/{seed}")
    stretch_s = 3600 / per_hour
    return [
        Fault(
            at_s=(index + draw.random()) * stretch_s,
            kind=kinds[index % len(kinds)],
            victim=draw.random(),
            lasts_s=draw.uniform(*lasts_s),
        )
        for index in range(_count(minutes, per_hour))
    ]


def _count(minutes: float, per_hour: float) -> int:
    return int(minutes * per_hour / 60)


class Chaos:
    """Does what is due, and undoes it when that is due."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self._cast, self._options = Cast(run), options
        self.acts: list[Act] = []
        self.missed = 0  # faults for which there was nobody
        self._ends: list[tuple[float, Callable[[], object]]] = []  # when to undo what

    def go(self, faults: Sequence[Fault], over: Callable[[], bool]) -> None:
        """The whole schedule, or up to the run's end. What is stopped, cut or slow goes on in any case."""
        start_s = time.monotonic()
        try:
            for fault in faults:
                while (now_s := time.monotonic() - start_s) < fault.at_s and not over():
                    self._undo(now_s)
                    time.sleep(POLL_S)
                if over():
                    break
                self._do(fault, now_s)
            while self._ends and not over():
                self._undo(time.monotonic() - start_s)
                time.sleep(POLL_S)
        finally:
            self._undo(float("inf"))

    def _undo(self, now_s: float) -> None:
        due = [undo for at_s, undo in self._ends if at_s <= now_s]
        self._ends = [(at_s, undo) for at_s, undo in self._ends if at_s > now_s]
        for undo in due:
            with suppress(ProcessLookupError):
                undo()

    def _do(self, fault: Fault, now_s: float) -> None:
        if fault.kind == "join":
            subprocess.Popen(shlex.split(self._options.join), start_new_session=True)
            self._say(Act(unix_s=time.time(), kind="join", target=self._options.join))
        elif fault.kind in NETWORK:
            self._link(fault, now_s)
        else:
            self._signal(fault, now_s)

    def _signal(self, fault: Fault, now_s: float) -> None:
        role = {"evaluator": "evaluator", "store": "shard", "driver": "driver"}.get(fault.kind, "island")
        there = self._cast.living(role)
        if fault.kind == "node":
            drivers = {each.raylet for each in self._cast.living("evaluator")}  # which lives where the driver does
            there = [each for each in there if each.raylet not in drivers]
        if not there:
            self.missed += 1
            print(f"{time.strftime('%H:%M:%S')}  {fault.kind:9} there is no {role} now", flush=True)
            return
        chosen = there[int(fault.victim * len(there))]
        pid = chosen.raylet if fault.kind == "node" else chosen.pid
        stall = fault.kind == "stall"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if stall else signal.SIGKILL)
        if stall:
            self._ends.append((now_s + fault.lasts_s, partial(os.kill, pid, signal.SIGCONT)))
        island = chosen.number if role == "island" else None
        target = f"{role} {chosen.number}" + (f" rank {chosen.rank}" if chosen.rank else "")
        lasts_s = fault.lasts_s if stall else 0.0
        self._say(Act(unix_s=time.time(), kind=fault.kind, target=target, pid=pid, island=island, lasts_s=lasts_s))

    def _link(self, fault: Fault, now_s: float) -> None:
        from experiments.benchmarks import wan

        hosts = wan.found(self._options.hosts)
        host = 1 + int(fault.victim * (len(hosts.names) - 1))  # the first has the driver
        undo: Callable[[], object]
        if fault.kind == "cut":
            hosts.cut(host)
            undo = partial(hosts.heal, host)
        else:
            hosts.set_rate(host, wan.bits_per_s(self._options.slow_rate))
            undo = partial(hosts.set_rate, host, wan.bits_per_s(self._options.rate))
        self._ends.append((now_s + fault.lasts_s, undo))
        target = f"host {hosts.names[host]}"
        self._say(Act(unix_s=time.time(), kind=fault.kind, target=target, lasts_s=fault.lasts_s))

    def _say(self, act: Act) -> None:
        self.acts.append(act)
        lasts = f" for {act.lasts_s:.0f} s" if act.lasts_s else ""
        print(f"{time.strftime('%H:%M:%S')}  {act.kind:9} {act.target}{lasts}", flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run that goes on, as runs/latest")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; default 10")
    parser.add_argument("--per-hour", type=float, default=125.0, help="faults an hour; default 125")
    parser.add_argument("--kinds", default="kill,stall", help=f"{', '.join(KINDS)}; default kill,stall")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another schedule")
    parser.add_argument("--lasts", metavar="S:S", default="2:15", help="seconds of a stall, cut or slow link")
    parser.add_argument("--hosts", metavar="PREFIX", default="", help="network namespaces PREFIX-0 ... to cut and slow")
    parser.add_argument("--rate", default="200mbit", help="the hosts' usual rate, after a slow time")
    parser.add_argument("--slow-rate", default="1mbit", help="the rate of a slow link")
    parser.add_argument("--join", metavar="COMMAND", default="", help="for the kind join")


def strike(options: argparse.Namespace) -> int:
    """Carry out the command. Raises ValueError for a mistake. Returns the exit status."""
    kinds, lasts_s = _checked(options)
    run = options.run.resolve()
    faults = drawn(seed=options.seed, minutes=options.minutes, per_hour=options.per_hour, kinds=kinds, lasts_s=lasts_s)
    chaos = Chaos(run, options)
    print(f"{len(faults)} faults in {options.minutes:g} minutes for {run}", flush=True)

    over = partial(_is_over, run)
    begun_s = time.time()
    chaos.go(faults, over)
    end_s = time.monotonic() + END_S
    print(f"that was the last; waiting until the run has gone on, for at most {END_S:.0f} s", flush=True)
    while not over() and not aftermath.went_on(run, chaos.acts) and time.monotonic() < end_s:
        time.sleep(POLL_S)
    there = bool(Cast(run).living("driver"))
    report = {"missed": chaos.missed, **aftermath.told(run, chaos.acts, begun_s, there=there)}
    told = {"schedule": [asdict(fault) for fault in faults], "acts": [asdict(act) for act in chaos.acts], **report}
    (run / "chaos.json").write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(aftermath.lines(report)))
    print(run / "chaos.json")
    return 0 if report["status"] != aftermath.GONE else GONE_STATUS


def _is_over(run: Path) -> bool:
    return any(record["event"] == "end" for record in aftermath.newest(run)[-1:])


def _checked(options: argparse.Namespace) -> tuple[list[str], tuple[float, float]]:
    if not (options.run / "metrics.jsonl").is_file():
        raise ValueError(f"{options.run} is no run that has begun; give its directory, such as runs/latest")
    if _is_over(options.run):
        raise ValueError(f"{options.run} is over; give a run that is going on")
    kinds = checked_kinds(options)
    try:
        least_s, most_s = map(float, options.lasts.split(":"))
    except ValueError:
        raise ValueError(f"--lasts {options.lasts} is not two numbers of seconds, such as 2:15") from None
    if not 0 <= least_s <= most_s < math.inf:
        raise ValueError(f"--lasts {options.lasts}: give two finite numbers, 0 <= first <= second")
    if set(kinds) & set(NETWORK):
        _check_hosts(options)
    if "join" in kinds:
        _check_command(options.join)
    if sys.platform != "linux":
        raise ValueError("diloco chaos looks processes up in /proc, which only Linux has")
    return kinds, (least_s, most_s)


def checked_kinds(options: argparse.Namespace) -> list[str]:
    """The kinds of faults that are asked for. Raises ValueError for one that is none, and where there is no fault."""
    kinds: list[str] = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"--kinds {unknown[0] or 'nothing'} is unknown; use some of {', '.join(KINDS)}")
    given = f"--minutes {options.minutes:g} and --per-hour {options.per_hour:g}"
    if not (0 < options.minutes < math.inf and 0 < options.per_hour < math.inf):
        raise ValueError(f"{given} must be positive and finite")
    if not _count(options.minutes, options.per_hour):
        raise ValueError(f"{given} are less than one fault; give more of one of them")
    return kinds


def _check_hosts(options: argparse.Namespace) -> None:
    from experiments.benchmarks import wan

    if not options.hosts:
        raise ValueError("--kinds cut and slow need --hosts PREFIX, the network namespaces of the run's hosts")
    wan.check("--hosts", ("ip", "tc"))
    wan.found(options.hosts)
    for name, rate in (("--rate", options.rate), ("--slow-rate", options.slow_rate)):
        try:
            wan.bits_per_s(rate)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _check_command(join: str) -> None:
    if not join.strip():
        raise ValueError("--kinds join needs --join COMMAND, such as one that starts a Ray node")
    try:
        program = shlex.split(join)[0]
    except ValueError as error:
        raise ValueError(f"--join {join!r} is no command: {error}") from None
    if shutil.which(program) is None:
        raise ValueError(f"--join {join!r}: there is no program {program} here")
