"""Tokens a second of an island's inner loop, as it is in a run on Ray, beside a bare PyTorch loop of the same training.

Both train the same model on the same batches with the same optimizer, turn by turn; a turn is a round, cut into
segments as usual. Timed is from the beginning of a round's first step to that of its last, which leaves out the outer
round and holds all that happens between segments. The bare loop runs twice: in a process of its own, and in a worker
of Ray, whose memory allocator is at times kinder; `ratio` is to the faster of the two. It is of tokens a second by the
clock, `cpu_ratio` of tokens a second of CPU: the steadier one where other processes are busy.

With --device cuda both compute in bfloat16 on the one GPU, and the bare loop runs once. Also told: the most that
tensors took of the GPU, while it trained and from the beginning of a round's last step to that of the next round's
first, and `outer_round_s`, which is the time of the latter less a step's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diloco.workloads.presets import PRESETS
from experiments.benchmarks import bare, common
from experiments.benchmarks.pace import Side, alternate

SEGMENT_STEPS = 10  # the default of a run
LOSS_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}  # as a share; bfloat16 on a GPU is not the same to the bit even twice


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
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides (cpu)")
    options.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    given = options.parse_args(argv)
    if given.quick:
        given.batch, given.sequence_length, given.steps, given.blocks = 2, 16, 4, 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    if given.batch % given.accumulation:
        raise ValueError(f"--accumulation {given.accumulation} does not divide --batch {given.batch}")
    if given.steps < 2:
        raise ValueError(f"--steps {given.steps}: a turn has at least 2")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees none here; use --device cpu")
    with tempfile.TemporaryDirectory(prefix="inner_loop", ignore_cleanup_errors=True) as folder:
        settings = bare.Settings(
            folder=folder,
            model=given.model,
            batch=given.batch,
            accumulation=given.accumulation,
            sequence_length=given.sequence_length,
            block_steps=given.steps,
            blocks=given.blocks + 1,  # the first one warms up
            threads=given.threads,
            device=given.device,
            compile=given.compile,
        )
        sides = [bare.island(settings, shards=1)]
        try:
            sides.append(bare.side(settings))
            if given.device == "cpu" and not given.quick:
                sides.append(bare.side(replace(settings, in_ray=True)))
            alternate(sides, blocks=settings.blocks, block_steps=given.steps)
            rates = {side.side: _rates(side, settings) for side in sides}
            on_gpu = _on_gpu(sides, settings) if given.device == "cuda" else {}
            # With a larger model, what a run writes at its end is gigabytes, which a GPU need not wait for.
            for side in sides if given.device == "cpu" else sides[1:]:
                side.join()
        finally:
            for side in sides:
                side.close()
        figures = {**_figures(given, rates), **on_gpu}
        return {**figures, "loss_difference": _loss_difference(Path(folder), settings)}


def _figures(given: Any, rates: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    names = [name for name in rates if name != "ours"]
    walls = {name: [wall for wall, _ in found] for name, found in rates.items()}
    cpus = {name: [cpu for _, cpu in found] for name, found in rates.items()}
    for name, values in walls.items():
        common.show(f"{name}: " + " ".join(f"{value:.0f}" for value in values) + " tokens/s")
    return {
        "benchmark": "inner_loop",
        "model": given.model,
        "tokens_per_step": given.batch * given.sequence_length,
        "tokens_per_s": common.median(walls["ours"]),
        "bare_tokens_per_s": {name: common.median(walls[name]) for name in names},
        "ratios": {name: _median_ratio(walls, name) for name in names},
        "ratio": min(_median_ratio(walls, name) for name in names),
        "tokens_per_cpu_s": common.median(cpus["ours"]),
        "cpu_ratios": {name: _median_ratio(cpus, name) for name in names},
        "cpu_ratio": min(_median_ratio(cpus, name) for name in names),
    }


def _on_gpu(sides: Sequence[Side], settings: bare.Settings) -> dict[str, Any]:
    """Memory of each side, and the time of the island's outer rounds; the first block left out."""
    blocks = range(settings.block_steps, settings.blocks * settings.block_steps, settings.block_steps)
    steps = settings.block_steps - 1
    most: dict[str, dict[str, int]] = {}
    for side in sides:
        asked = side.steps()[0].asked
        training = max(asked[first + steps].gpu_bytes for first in blocks)
        most[side.side] = {"training": training, "outer": max(asked[first + steps + 1].gpu_bytes for first in blocks)}
    ours, outer_s = sides[0].steps()[0], []
    for first in blocks:
        begin_s, end_s = ours.began[first].monotonic_s, ours.asked[first + steps].monotonic_s
        outer_s.append(ours.asked[first + steps + 1].monotonic_s - end_s - (end_s - begin_s) / steps)
    return {
        "gpu": torch.cuda.get_device_name(),
        "compile": settings.compile,
        "outer_round_s": common.median(outer_s),
        "gpu_bytes": most,
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


def _loss_difference(folder: Path, settings: bare.Settings) -> float:
    """Of the last segment's mean loss. Raises RuntimeError where the two did not do the same work."""
    lines = (folder / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["event"] == "segment"][-1]
    losses = json.loads((folder / "bare.json").read_text())
    steps = settings.block_steps % SEGMENT_STEPS or SEGMENT_STEPS
    ours, plain = last["inner/loss"], losses[last["step"] - steps : last["step"]]
    difference = abs(ours - sum(plain) / steps)
    if not difference < LOSS_TOLERANCE[settings.device] * abs(ours):
        raise RuntimeError(f"the loss is {ours} on the island and {sum(plain) / steps} in the bare loop")
    return common.rounded(difference)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
