"""What more paths cost at the same size of a path: each link, each shard of the store, an island, and a task.

    python -m experiments.benchmarks.dipaco_cost [--sides 2,4,8,16] [--quick]

P = side * side paths through two levels of `side` modules each, on as many islands, with as many shards of the store.
- Bytes of an island and round come from runs of two rounds, told by the islands themselves.
- Those of a shard of the store follow from where `Modules.shards` places modules, for embeddings that all paths share
  and for each path's own (`layout.private`), and are checked against what the runs sent.
- An island's memory is that of a process with one Island object, in which two sources took turns: tensors that it
  reaches, what is kept of a source that is not there, and what the process shares with nobody (USS).
- A task's cost is that of `coordinator`, events without training: on as many islands as paths and on four, with as
  many shards as there are by default; and with P of them, where levels are cut so that all are busy.

At last 256 paths take turns on 32 islands, each once a round. The last line is JSON; `growth` is a figure of the most
paths by that of the fewest. That of a link, an island and a task should be 1, and the shares should fall. A shard's
bytes grow where embeddings are shared: one shard hears all paths of them, since a tensor is never cut.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from diloco import RunConfig, seats, train
from diloco.messages import Modules, Shape
from diloco.metrics import Metrics
from diloco.placing import elements
from diloco.runtime.base import Store
from diloco.runtime.local import Local
from diloco.views import RunView
from diloco.workloads.presets import PRESETS
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from experiments.benchmarks import common
from experiments.benchmarks.alone import Drawn, alone
from experiments.benchmarks.coordinator import Game

BYTES = 4  # of a float32
WAVES = {"side": 16, "islands": 32}
QUICK_WAVES = {"side": 3, "islands": 4}
ROUNDS = 2
FEW_ISLANDS = 4
EMBEDDING = "embed_tokens"


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("dipaco_cost", __doc__.partition("\n")[0])
    options.add_argument("--sides", type=common.several, default=[2, 4, 8, 16], help="modules of a level (2,4,8,16)")
    options.add_argument("--largest-run", type=common.positive, default=8, help="side of the largest run (8)")
    options.add_argument("--model", choices=sorted(PRESETS), default="10m", help="preset of an island alone (10m)")
    options.add_argument("--small", choices=sorted(PRESETS), default="micro", help="preset of runs (micro)")
    options.add_argument("--tasks", type=common.positive, default=2000, help="at least so many tasks a block (2000)")
    options.add_argument("--blocks", type=common.positive, default=5, help="blocks of each size, in turn (5)")
    given = options.parse_args(argv)
    if given.quick:
        given.sides, given.model, given.tasks, given.blocks = [2, 3], "micro", 30, 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    shapes = _shapes(given.model)
    tasks = _task_costs(given, shapes)
    found: dict[int, dict[str, float]] = {}  # by paths
    for side in given.sides:
        row = _of_run(given, side=side, islands=side * side) if side <= given.largest_run else {}
        row |= {f"shared: {name}": value for name, value in busy(_layout(side), shapes).items()}
        row |= {f"own: {name}": value for name, value in busy(_layout(side, own=True), shapes).items()}
        found[side * side] = row | _alone(side, given.model) | {name: costs[side] for name, costs in tasks.items()}
    growth = {}
    for name in dict.fromkeys(name for row in found.values() for name in row):
        values = [row[name] for row in found.values() if name in row]
        growth[name] = common.rounded(values[-1] / values[0], digits=4)
        common.show(f"{name:24}" + "".join(f"{value:16,.4g}" for value in values) + f"   x {growth[name]:g}")
    waves = QUICK_WAVES if given.quick else WAVES
    return {
        "benchmark": "dipaco_cost",
        "model": given.model,
        "parameters": elements(shapes, shapes),
        "by_paths": {str(paths): row for paths, row in found.items()},
        "growth": growth,
        "waves": {"paths": waves["side"] ** 2, "islands": waves["islands"], **_of_run(given, **waves)},
    }


def _shapes(model: str) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in Drawn(model=model).build_model(0).named_parameters()}


def _layout(side: int, *, own: bool = False) -> Paths:
    return Paths(levels=[side, side], private=[EMBEDDING] if own else [])


# --- links ---


def _of_run(given: Any, *, side: int, islands: int) -> dict[str, float]:
    """What a run of two rounds told: the most bytes of a task, and that each path contributed once a round."""
    config = RunConfig(
        islands=islands,
        inner_steps=1,
        rounds=ROUNDS,
        eval_every=0,
        workload=Drawn(model=given.small),
        layout=_layout(side),
        schedule=PathRounds(replicas=1),
        store=Store(shards=islands),
        runtime=Local(),
        metrics=Metrics(live=False),
    )
    with tempfile.TemporaryDirectory(prefix="dipaco_cost") as folder, Path(os.devnull).open("w") as nowhere:
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            result = train(config, Path(folder, "run"))
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    told = [record for record in map(json.loads, lines) if record["event"] == "segment"]
    paths = side * side
    assert Counter((r["source"], r["round"]) for r in told) == Counter(
        (path, round_) for path in range(paths) for round_ in range(ROUNDS)
    )
    assert result.summary["contributions"]["accepted"] == paths * ROUNDS
    assert result.summary["bytes_up"] == sum(r["comm/bytes_up"] for r in told)
    return {
        "bytes up": max(r["comm/bytes_up"] for r in told),
        "bytes down": max(r["comm/bytes_down"] for r in told),
    }


# --- shards of the store ---


def busy(layout: Paths, shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Of a store with as many shards as paths: the largest shares of one shard, and the bytes that it gets in a round.

    As many leave it. In float32, without headers.
    """
    shards = layout.num_paths()
    modules = layout.build(shapes, shards)
    paths = Counter(key for path in modules.paths for key in path.values())
    sizes = {key: elements(modules.slots[modules.slot_of(key)], shapes) for key in modules.shards}
    held, heard, count = [0] * shards, [0] * shards, [0] * shards
    for key, shard in modules.shards.items():
        held[shard] += sizes[key]
        heard[shard] += sizes[key] * paths[key]
        count[shard] += 1
    return {
        "share of modules": common.rounded(max(count) / len(modules.shards)),
        "share of bytes": common.rounded(max(held) / sum(held)),
        "bytes held": BYTES * max(held),
        "bytes heard": BYTES * max(heard),
    }


# --- an island ---


def _alone(side: int, model: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(alone, _layout(side), model).result()


# --- tasks ---


def _task_costs(given: Any, shapes: Mapping[str, Shape]) -> dict[str, dict[int, float]]:
    """Microseconds a task by side, of blocks in turn."""
    spent: dict[str, dict[int, list[float]]] = {}
    for _ in range(given.blocks):
        for side in given.sides:
            paths = side * side
            usual = Store().resolved(paths)
            for name, islands, shards in (
                ("us a task", paths, usual),
                (f"us a task, {FEW_ISLANDS} islands", FEW_ISLANDS, usual),
                ("us a task, P shards", paths, paths),
            ):
                game = Game(_view(_layout(side).build(shapes, shards), islands), PathRounds(replicas=1))
                game.play(1)
                block = game.play(-(-given.tasks // paths))
                spent.setdefault(name, {}).setdefault(side, []).append(1e6 * block.seconds / block.tasks)
    return {
        name: {side: common.median(costs, digits=4) for side, costs in by_side.items()}
        for name, by_side in spent.items()
    }


def _view(modules: Modules, islands: int) -> RunView:
    view = RunView(
        seed=0,
        rounds=10**9,
        inner_steps=1,
        segment_steps=0,
        eval_every=0,
        save_every=0,
        paths=modules.paths,
        fragments=modules.fragments,
        shard_examples=[1] * len(modules.paths),
        moving=True,
    )
    seats.begin(view, modules, islands)
    return view


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
