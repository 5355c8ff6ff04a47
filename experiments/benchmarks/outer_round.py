"""Exposed time of one outer round, of this project on Ray and of torchft's DiLoCo, block by block.

Exposed is the time in which no island trains: from when the last island begins the last inner step of a round (the
steps cost nothing) until all islands have asked for the first batch of the next. It is read from the islands' own
clocks, in the same way for both sides; block by block one side rests while the other works.

Over loopback, or with --wan between hosts behind rate-limited links, an island and a shard of the store on each. There
the least possible time is known: what each host must send and receive, over what its line carries.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.benchmarks import common, peers, wan
from experiments.benchmarks.pace import Side, alternate, training

ROUND_STEPS = 2
REST_S = 0.3  # sleep in the first step of a round, on both sides: what a real run does beside its training is done then
STORE_COPIES = 12  # of the parameters in a Ray node's object store: a round's on their way, those of the last, anchors
LEAST_STORE_BYTES = 256 << 20


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options or where torchft, or what --wan needs, is missing."""
    options = common.parser("outer_round", __doc__.partition("\n")[0])
    options.add_argument("--islands", type=common.several, default=[2, 4], help="numbers of islands (2,4)")
    options.add_argument("--parameters", type=common.positive, default=25_000_000, help="float32 values (25000000)")
    options.add_argument("--blocks", type=common.positive, default=6, help="turns of each side (6)")
    options.add_argument("--rounds", type=common.positive, default=4, help="measured outer rounds a turn (4)")
    options.add_argument("--alone", action="store_true", help="without torchft, to look at this project only")
    options.add_argument("--gpus-per-worker", type=float, default=0.0, help="with --alone, such as 0.5 (0)")
    options.add_argument("--codec", help="what this project sends up (its default)")
    options.add_argument("--codec-down", help="what it sends down (its default)")
    options.add_argument("--wan", metavar="RATE", help="over links of this rate, such as 200mbit; needs root")
    options.add_argument("--hosts", type=common.positive, default=3, help="with --wan, an island on each (3)")
    given = options.parse_args(argv)
    if given.quick:
        given.islands, given.parameters, given.blocks, given.rounds = [2], 100_000, 1, 2
    return common.run(lambda: _over_links(given) if given.wan else _over_loopback(given))


@dataclass(kw_only=True)
class _Where:
    """Where both sides run."""

    command: list[str] = field(default_factory=list)  # that starts a side's command in its place
    environment: Mapping[str, str] = field(default_factory=dict)  # of this project's driver
    peers: list[str] = field(default_factory=list)  # options of `peers`


def _over_loopback(given: Any) -> dict[str, Any]:
    if not given.alone:
        if given.gpus_per_worker:
            raise ValueError(f"--gpus-per-worker={given.gpus_per_worker:g}: torchft's side has none; add --alone")
        peers.check()
    found: dict[str, dict[str, float]] = {}
    for islands in given.islands:
        with tempfile.TemporaryDirectory(prefix="outer_round") as folder:
            found[str(islands)] = _times(given, Path(folder), _Where(), islands=islands)
    figures: dict[str, Any] = {"benchmark": "outer_round", "parameters": given.parameters, "islands": found}
    if not given.alone:
        figures["ratio"] = max(entry["ratio"] for entry in found.values())
    return figures


def _over_links(given: Any) -> dict[str, Any]:
    if not given.alone:
        peers.check()
    if given.hosts < 2:
        raise ValueError("--hosts=1 has no links; give at least 2")
    rate_bit_s = wan.bits_per_s(given.wan)
    store_bytes = max(STORE_COPIES * 4 * given.parameters, LEAST_STORE_BYTES)
    with tempfile.TemporaryDirectory(prefix="wan", dir="/tmp") as name:  # the paths of Ray's sockets must be short
        folder = Path(name)
        with wan.hosts(given.hosts, rate_bit_s=rate_bit_s) as made:
            lines = wan.line_mbit(made)
            common.show("lines carry " + " ".join(f"{line:.1f}" for line in lines) + " Mbit/s")
            line_mbit = statistics.median(lines)
            where = _Where(
                command=made.command(0, []),
                environment=wan.start_ray(made, folder, object_store_bytes=store_bytes),
                peers=["--namespaces", *made.names, "--addresses", *made.addresses],
            )
            times = _times(given, folder, where, islands=given.hosts)
        summary = json.loads((folder / "runs" / "latest" / "summary.json").read_text())
    times_sent = {"up": summary["rounds"], "down": summary["rounds"] - 1}  # what they start with they built themselves
    sent = {way: summary[f"bytes_{way}"] / times_sent[way] / given.hosts for way in ("up", "down")}
    bound = bound_s(sum(sent.values()), hosts=given.hosts, line_mbit=line_mbit)
    return {
        "benchmark": "outer_round",
        "parameters": given.parameters,
        "wan": given.wan,
        "hosts": given.hosts,
        "line_mbit": common.rounded(line_mbit),
        "bytes_up": round(sent["up"]),
        "bytes_down": round(sent["down"]),
        "bound_s": common.rounded(bound),
        "ratio_to_bound": common.rounded(times["ours_s"] / bound),
        **times,
    }


def bound_s(sent_bytes: float, *, hosts: int, line_mbit: float) -> float:
    """The least time of an outer round where each host has an island and an equal part of the store.

    `sent_bytes`: of an island in a round, up and down. What it exchanges with the part on its own host crosses no
    link; a host's link carries as much out as in, at once: for N bytes each way 2N(1 - 1/R)/W.
    """
    return sent_bytes * 8 / 1e6 * (1 - 1 / hosts) / line_mbit


def _times(given: Any, folder: Path, where: _Where, *, islands: int) -> dict[str, float]:
    # The first round of a turn is not measured: what it needs may have been paged out or gone to sleep.
    block_steps = (given.rounds + 1) * ROUND_STEPS
    rounds = (given.blocks + 1) * (given.rounds + 1) + 1
    sides = [_ours(given, folder, where, islands=islands, rounds=rounds, block_steps=block_steps)]
    try:
        if not given.alone:
            sides.append(_torchft(given, folder, where, islands=islands, rounds=rounds, block_steps=block_steps))
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


def _ours(given: Any, folder: Path, where: _Where, *, islands: int, rounds: int, block_steps: int) -> Side:
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
        "gpus_per_worker": given.gpus_per_worker,
    }
    chosen = {"codec": given.codec, "codec@codec_down": given.codec_down}
    overrides |= {key: name for key, name in chosen.items() if name is not None}
    command = [*where.command, *training(overrides, workload="idle")]
    return Side(command, folder=folder, side="ours", members=islands, environment=where.environment)


def _torchft(given: Any, folder: Path, where: _Where, *, islands: int, rounds: int, block_steps: int) -> Side:
    numbers: dict[str, float] = {
        "replicas": islands,
        "parameters": given.parameters,
        "rounds": rounds,
        "round-steps": ROUND_STEPS,
        "block-steps": block_steps,
        "rest-s": REST_S,
    }
    command = [*where.command, sys.executable, "-m", "experiments.benchmarks.peers", "--folder", str(folder)]
    command += [f"--{key}={value}" for key, value in numbers.items()] + where.peers
    return Side(command, folder=folder, side="torchft", members=islands, environment={"PYTHONWARNINGS": "ignore"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
