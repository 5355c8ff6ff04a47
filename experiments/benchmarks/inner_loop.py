"""Tokens a second of an island's inner loop, as it is in a run on Ray, beside a bare PyTorch loop of the same training.

Both train the same model on the same batches with the same optimizer, turn by turn; a turn is a round, cut into
segments as usual. Timed is from the beginning of a round's first step to that of its last, which leaves out the outer
round and holds all that happens between segments. The bare loop runs twice: in a process of its own, and in a worker
of Ray, whose memory allocator is at times kinder; `ratio` is to the faster of the two. It is of tokens a second by the
clock, `cpu_ratio` of tokens a second of CPU: the steadier one where other processes are busy.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diloco.workloads.presets import PRESETS
from experiments.benchmarks import bare, common
from experiments.benchmarks.pace import Side, alternate

SEGMENT_STEPS = 10  # the default of a run
BARE = ("bare", "bare_in_ray")


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("inner_loop", __doc__.partition("\n")[0])
    options.add_argument("--model", choices=sorted(PRESETS), default="tiny", help="preset (tiny)")
    options.add_argument("--batch", type=common.positive, default=4, help="sequences a step (4)")
    options.add_argument("--accumulation", type=common.positive, default=1, help="parts of a batch (1)")
    options.add_argument("--sequence-length", type=common.positive, default=128, help="tokens (128)")
    options.add_argument("--steps", type=common.positive, default=30, help="inner steps a turn (30)")
    options.add_argument("--blocks", type=common.positive, default=8, help="measured turns of each side (8)")
    options.add_argument("--threads", type=common.positive, default=1, help="of each side (1)")
    given = options.parse_args(argv)
    if given.quick:
        given.batch, given.sequence_length, given.steps, given.blocks = 2, 16, 4, 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if given.batch % given.accumulation:
        raise ValueError(f"--accumulation {given.accumulation} does not divide --batch {given.batch}")
    if given.steps < 2:
        raise ValueError(f"--steps {given.steps}: a turn has at least 2")
    with tempfile.TemporaryDirectory(prefix="inner_loop") as folder:
        settings = bare.Settings(
            folder=folder,
            model=given.model,
            batch=given.batch,
            accumulation=given.accumulation,
            sequence_length=given.sequence_length,
            block_steps=given.steps,
            blocks=given.blocks + 1,  # the first one warms up
            threads=given.threads,
        )
        sides = [bare.island(settings, shards=1)]
        try:
            sides += [bare.side(settings), bare.side(replace(settings, in_ray=True))]
            alternate(sides, blocks=settings.blocks, block_steps=given.steps)
            rates = {side.side: _rates(side, settings) for side in sides}
            for side in sides:
                side.join()
        finally:
            for side in sides:
                side.close()
        difference = _loss_difference(Path(folder), block_steps=given.steps)
    walls = {name: [wall for wall, _ in found] for name, found in rates.items()}
    cpus = {name: [cpu for _, cpu in found] for name, found in rates.items()}
    for name, values in walls.items():
        common.show(f"{name}: " + " ".join(f"{value:.0f}" for value in values) + " tokens/s")
    return {
        "benchmark": "inner_loop",
        "model": given.model,
        "tokens_per_step": given.batch * given.sequence_length,
        "tokens_per_s": common.median(walls["ours"]),
        "bare_tokens_per_s": {name: common.median(walls[name]) for name in BARE},
        "ratios": {name: _median_ratio(walls, name) for name in BARE},
        "ratio": min(_median_ratio(walls, name) for name in BARE),
        "tokens_per_cpu_s": common.median(cpus["ours"]),
        "cpu_ratios": {name: _median_ratio(cpus, name) for name in BARE},
        "cpu_ratio": min(_median_ratio(cpus, name) for name in BARE),
        "loss_difference": difference,
    }


def _median_ratio(rates: dict[str, list[float]], name: str) -> float:
    """To one side, of the turns next to each other, since they see the most alike machine."""
    return common.median([ours / plain for ours, plain in zip(rates["ours"], rates[name], strict=True)])


def _rates(side: Side, settings: bare.Settings) -> list[tuple[float, float]]:
    """Tokens a second of each block but the first: by the clock, and of CPU."""
    member = side.steps()[0]
    steps = settings.block_steps - 1
    tokens = steps * settings.batch * settings.sequence_length
    found = []
    for first in range(settings.block_steps, settings.blocks * settings.block_steps, settings.block_steps):
        begin, end = member.began[first], member.asked[first + steps]
        found.append((tokens / (end.monotonic_s - begin.monotonic_s), tokens / (end.cpu_s - begin.cpu_s)))
    return found


def _loss_difference(folder: Path, *, block_steps: int) -> float:
    """Of the last segment's mean loss. Raises RuntimeError where the two did not do the same work."""
    lines = (folder / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["event"] == "segment"][-1]
    losses = json.loads((folder / "bare.json").read_text())
    steps = block_steps % SEGMENT_STEPS or SEGMENT_STEPS
    ours, plain = last["inner/loss"], losses[last["step"] - steps : last["step"]]
    difference = abs(ours - sum(plain) / steps)
    if not difference < 1e-3 * abs(ours):
        raise RuntimeError(f"the loss is {ours} on the island and {sum(plain) / steps} in the bare loop")
    return common.rounded(difference)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
