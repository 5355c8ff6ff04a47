"""Exposed time of one outer round over loopback, of this project on Ray and of torchft's DiLoCo, block by block.

Exposed is the time in which no island trains: from when the last island begins the last inner step of a round (the
steps cost nothing) until all islands have asked for the first batch of the next. It is read from the islands' own
clocks, in the same way for both sides; block by block one side rests while the other works.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import common, peers
from experiments.benchmarks.pace import Side, alternate, training

ROUND_STEPS = 2
REST_S = 0.3  # sleep in the first step of a round, on both sides: what a real run does beside its training is done then


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options or where torchft is missing."""
    options = common.parser("outer_round", __doc__.partition("\n")[0])
    options.add_argument("--islands", type=common.several, default=[2, 4], help="numbers of islands (2,4)")
    options.add_argument("--parameters", type=common.positive, default=25_000_000, help="float32 values (25000000)")
    options.add_argument("--blocks", type=common.positive, default=6, help="turns of each side (6)")
    options.add_argument("--rounds", type=common.positive, default=4, help="measured outer rounds a turn (4)")
    options.add_argument("--alone", action="store_true", help="without torchft, to look at this project only")
    given = options.parse_args(argv)
    if given.quick:
        given.islands, given.parameters, given.blocks, given.rounds = [2], 100_000, 1, 2
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if not given.alone:
        peers.check()
    found = {str(islands): _of(given, islands) for islands in given.islands}
    figures: dict[str, Any] = {"benchmark": "outer_round", "parameters": given.parameters, "islands": found}
    if not given.alone:
        figures["ratio"] = max(entry["ratio"] for entry in found.values())
    return figures


def _of(given: Any, islands: int) -> dict[str, Any]:
    # The first round of a turn is not measured: what it needs may have been paged out or gone to sleep.
    block_steps = (given.rounds + 1) * ROUND_STEPS
    rounds = (given.blocks + 1) * (given.rounds + 1) + 1
    with tempfile.TemporaryDirectory(prefix="outer_round") as name:
        folder = Path(name)
        sides = [_ours(given, folder, islands=islands, rounds=rounds, block_steps=block_steps)]
        try:
            if not given.alone:
                sides.append(_torchft(given, folder, islands=islands, rounds=rounds, block_steps=block_steps))
            alternate(sides, blocks=given.blocks + 1, block_steps=block_steps)
            times = {side.side: _exposed(side, given, block_steps) for side in sides}
            for side in sides:
                side.join()
        finally:
            for side in sides:
                side.close()
    for side_name, values in times.items():
        common.show(f"{islands} islands, {side_name}: " + " ".join(f"{value:.3f}" for value in values))
    figures = {f"{side_name}_s": common.median(values) for side_name, values in times.items()}
    if not given.alone:
        figures["ratio"] = common.rounded(figures["ours_s"] / figures["torchft_s"])
    return figures


def _exposed(side: Side, given: Any, block_steps: int) -> list[float]:
    """Of each measured round, those of the first block and the first of each block left out."""
    members = side.steps().values()
    found = []
    for first in range(block_steps, (given.blocks + 1) * block_steps, block_steps):
        for last in range(first + 2 * ROUND_STEPS - 1, first + block_steps, ROUND_STEPS):
            done_s = max(member.start(last).monotonic_s for member in members)
            found.append(max(member.asked[last + 1].monotonic_s for member in members) - done_s)
    return found


def _ours(given: Any, folder: Path, *, islands: int, rounds: int, block_steps: int) -> Side:
    overrides = {
        "islands": islands,
        "rounds": rounds,
        "inner_steps": ROUND_STEPS,
        "inner": "sgd",
        "workload.parameters": given.parameters,
        "workload.folder": folder,
        "workload.block_steps": block_steps,
        "workload.round_steps": ROUND_STEPS,
        "workload.rest_s": REST_S,
    }
    command = training(overrides, workload="idle")
    return Side(command, folder=folder, side="ours", members=islands, environment={})


def _torchft(given: Any, folder: Path, *, islands: int, rounds: int, block_steps: int) -> Side:
    numbers: dict[str, float] = {
        "replicas": islands,
        "parameters": given.parameters,
        "rounds": rounds,
        "round-steps": ROUND_STEPS,
        "block-steps": block_steps,
        "rest-s": REST_S,
    }
    command = [sys.executable, "-m", "experiments.benchmarks.peers", "--folder", str(folder)]
    command += [f"--{key}={value}" for key, value in numbers.items()]
    return Side(command, folder=folder, side="torchft", members=islands, environment={"PYTHONWARNINGS": "ignore"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
