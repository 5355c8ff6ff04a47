"""`diloco plan`: what a configuration will send, how long its islands will wait, and what link it needs.

Nothing is started or written but, with `--measure`, the prepared corpus in its cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from experiments import entry
from experiments.entry import FINISHED, INTERRUPTED, Parser

if TYPE_CHECKING:
    from diloco import RunConfig
    from diloco.messages import Modules, Shape, Task
    from diloco.plan import Plan
    from diloco.workload import Workload
    from experiments.composition import Member

UNITS = {"kbit": 1e-6, "mbit": 1e-3, "gbit": 1.0, "": 1.0}
WARM_UP_STEPS = 2
MEASURED_STEPS = 5
ABOUT = (
    "What a configuration will send, how long its islands will wait, and what bandwidth it needs, before anything"
    " starts. Overrides are those of diloco train."
)


@dataclass(kw_only=True)
class Known:
    """What is known of the machines, and where from."""

    step_s: float | None
    link_gbits: float | None
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str], *, program: str = "diloco plan") -> int:
    """Print the plan of what `argv` asks for and return the exit status: 0, 2 for a mistake, or 130."""
    arguments = _parser(program).parse_intermixed_args(argv)
    try:
        members = _members(arguments)
        found = [_plan(member, arguments) for member in members]
    except ValueError as error:
        return entry.tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        shown = [_json(member, *each) for member, each in zip(members, found, strict=True)]
        print(json.dumps(shown[0] if len(shown) == 1 else shown))
    else:
        for number, (member, (plan, known)) in enumerate(zip(members, found, strict=True)):
            if number:
                print()
            _show(member, plan, known)
    return FINISHED


def _parser(program: str) -> Parser:
    parser = Parser(prog=program, description=ABOUT, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in +experiment=quickstart islands=4")
    parser.add_argument("--step-s", metavar="S", type=_seconds, help="seconds that an inner step takes")
    parser.add_argument(
        "--link", metavar="GBITS", type=gbits, help="of an island, each way: 200mbit, 1gbit; a bare number is Gbit/s"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure what is not given: some steps in this process; with RAY_ADDRESS the link between its nodes",
    )
    parser.add_argument("--json", action="store_true", help="one JSON value instead of a table")
    parser.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[])
    parser.add_argument("--config-dir", metavar="DIR", default="")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, such as 0.2")
    return seconds


def gbits(text: str) -> float:
    """Gbit/s of `1gbit`, `200mbit` or `0.5`."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmg]bit|)(/s)?", text.strip().lower())
    gbits = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not (math.isfinite(gbits) and gbits > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth; give one such as 200mbit, 1gbit or 0.5 (Gbit/s)")
    return gbits


def _members(arguments: argparse.Namespace) -> list[Member]:
    from experiments import composition

    request = composition.Request(
        overrides=tuple(arguments.overrides), imports=tuple(arguments.imports), config_dir=arguments.config_dir
    )
    composition.import_parts(request.imports)
    return composition.named(request) or [composition.single(request)]


def _plan(member: Member, arguments: argparse.Namespace) -> tuple[Plan, Known]:
    from diloco import planner

    config = member.config
    config = replace(config, store=replace(config.store, shards=config.store.resolved(config.islands)))
    shapes = shapes_of(config.workload, config.seed)
    modules = config.layout.build(shapes, config.store.shards)
    known = Known(step_s=arguments.step_s, link_gbits=arguments.link)
    if max(config.workers_by_island()) > 1:
        known.notes.append("what the workers of an island send each other on every step is not counted")
    if arguments.measure:
        _measure(known, config, modules)
    return planner.plan_of(config, modules, shapes, step_s=known.step_s, link_gbits=known.link_gbits), known


def shapes_of(workload: Workload, seed: int) -> dict[str, Shape]:
    """Name -> shape of the trainable parameters, where possible without memory for their values."""
    import torch

    from diloco.replica import Single
    from diloco.workers import World

    nowhere = torch.device("meta")
    try:
        with nowhere:
            model = workload.build_model(seed)
    except (RuntimeError, NotImplementedError):  # it looks at values, or reads them from files
        model = workload.build_model(seed)
    return Single(model, World(device=nowhere)).shapes()


def _measure(known: Known, config: RunConfig, modules: Modules) -> None:
    """Fill in what is unknown."""
    if known.step_s is None:
        print(f"measuring {WARM_UP_STEPS + MEASURED_STEPS} steps", file=sys.stderr, flush=True)
        known.step_s = measured_step_s(config, modules)
        known.notes.append(f"step: median of {MEASURED_STEPS}, of one worker alone on this machine")
    if known.link_gbits is None and config.islands > 1:
        address = os.environ.get("RAY_ADDRESS", "")
        if address:
            from diloco.runtime.ray_address import listens
            from diloco.runtime.ray_link import measured_gbits

            if not listens(address):  # Ray itself would look for minutes
                raise ValueError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}; start it, unset that, or give --link"
                )
            print("measuring the link", file=sys.stderr, flush=True)
            known.link_gbits = measured_gbits(address)
        if known.link_gbits is None:
            known.notes.append("link: one node has none to measure; --link says what lies between yours")
        else:
            known.notes.append("link: the slowest of those measured between the cluster's nodes")


def measured_step_s(config: RunConfig, modules: Modules) -> float:
    """The median time of some inner steps of a worker, in this process.

    Of the island with the fewest workers, each of which takes its part of the batch. Raises ValueError.
    """
    import torch

    from diloco.jobs import make_job
    from diloco.workers import World

    if config.gpus_per_worker and not torch.cuda.is_available():
        raise ValueError(f"--measure with gpus_per_worker={config.gpus_per_worker:g}: there is no CUDA device here")
    share = replace(config.data, batch=config.data.batch // min(config.workers_by_island()))
    job = make_job(replace(config, data=share, workers=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads_per_worker)
    try:
        island = job.make_island(job.corpus(), World(device=torch.device("cuda" if config.gpus_per_worker else "cpu")))
        island.setup(modules)
        steps = [step % job.total_steps for step in range(WARM_UP_STEPS + MEASURED_STEPS)]
        spent_s = [island.train(_task(modules, step), []).seconds for step in steps]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(spent_s[WARM_UP_STEPS:])


def _task(modules: Modules, step: int) -> Task:
    """One inner step on the first shard of the data, which installs and sends nothing."""
    from diloco.messages import IslandId, ShardId, SourceId, Task

    return Task(
        source=SourceId(0),
        island=IslandId(0),
        round=0,
        segment=step,
        modules=modules.paths[0],
        install={},
        keep=1.0,
        shard=ShardId(0),
        first_step=step,
        steps=1,
        send=(),
        last=False,
    )


def _show(member: Member, plan: Plan, known: Known) -> None:
    from diloco import planner

    title = " ".join(filter(None, ("plan", member.config.experiment, member.name)))
    where = "1 island" if plan.islands == 1 else f"{plan.islands} islands, each on a node of its own"
    print(f"{title}: {where}")
    for name, text in planner.rows(plan, rounds=member.config.rounds):
        print(f"  {name:20}  {text}")
    for note in known.notes:
        print(f"  ({note})")
    if said := planner.warning(plan):
        print(f"warning: {said}")


def _json(member: Member, plan: Plan, known: Known) -> dict[str, object]:
    from diloco import planner

    config = member.config
    named = {"name": config.name, "experiment": config.experiment, "member": member.name or None}
    return {**named, **planner.as_json(plan, rounds=config.rounds), "notes": known.notes}
